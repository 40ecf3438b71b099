"""LangVAE: a latent space between a frozen pretrained encoder and a frozen pretrained decoder (arXiv 2505.00004).

p(z)      = N(0, I), one vector z [latent_size]
p(x | z)  = Π_t p(x_t | z, BOS, x_<t) by a pretrained causal LM, each of whose layers sees keys and values made of z
q(z | x)  = N(μ, σ²), linear in the pooled states of a pretrained encoder; or by gradient steps (`VariationalConfig`)

Only what stands between them trains: z → keys and values (section 3.2, h = W_m z), and pooled states → μ, log σ².

Where we differ: training is one parallel pass over the text itself (teacher forcing), where the published code decodes
its own argmax token by token; z's keys and values stand beside the cache, not in it (`layers.injection`), which is the
same attention and cannot be lost to a window; padding is not trained; a text's own EOS is.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Independent
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from latentlm.data.datasets import collate, length_buckets
from latentlm.data.embeddings import Embeddings
from latentlm.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from latentlm.distributions import sequence_keys, standard_normal
from latentlm.errors import InputError
from latentlm.hosted_lm import HostedLM
from latentlm.layers import pool
from latentlm.layers.injection import Slots, slot_shapes
from latentlm.pretrained import (
    DeviceMap,
    add_lora,
    device_maps,
    device_of,
    encoder_tokens,
    fingerprint,
    load_decoder,
    load_encoder,
    pooling_of,
)
from latentlm.variational import VariationalConfig, VariationalLM


@strict
class LangVAEConfig(VariationalConfig):
    """LangVAE; see `VariationalConfig` for the fields of inference.

    Args:
        decoder_name: folder or hub name of a causal language model, whose tokenizer is the texts'.
        decoder_revision, encoder_revision: of a hub name, so that it stays the same model.
        decoder_fingerprint, encoder_fingerprint: of their weights, filled in when they are first loaded; another
            model of that name is then refused.
        encoder_name: folder or hub name of a text encoder with its own tokenizer. Inference by gradient has none.
        frozen_precision: in which both models' weights are kept; None as they were saved. What is ours is float32.
        max_position_embeddings: the longest text, T, in tokens of the decoder after BOS.
        latent_size: numbers of z.
        injection: "prefix": `latent_slots` keys and values of z before the text, in every layer, for every token.
            "interleaved": each token from BOS on brings one more, so that token t sees slots 0 … t, slot t being made
            by the map t mod `latent_slots`.
        latent_slots: how many different keys and values z becomes in each layer.
        injection_rank: the map from z goes through so many numbers; None for a full map.
        lora_rank: of adapters in every linear map of the decoder's layers (Hu et al. 2021, arXiv 2106.09685), which
            train with what is ours; 0 for none. Their scale α ÷ rank is 1.
        pooling: how the encoder's states become one vector: their "mean", the "first", the "last"; None takes what
            comes with the encoder (sentence-transformers), or the last of a causal encoder and the mean of any other.
        normalise: the pooled vector is of unit length; None as comes with the encoder.
    """

    model_type = "latentlm_lang_vae"

    decoder_name: str = ""
    decoder_revision: str | None = None
    decoder_fingerprint: str | None = None
    encoder_name: str | None = None
    encoder_revision: str | None = None
    encoder_fingerprint: str | None = None
    frozen_precision: Literal["float32", "bfloat16", "float16", "4bit"] | None = None
    max_position_embeddings: int = 64
    latent_size: int = 128
    injection: Literal["prefix", "interleaved"] = "prefix"
    latent_slots: int = 1
    injection_rank: int | None = None
    lora_rank: int = 0
    pooling: Literal["mean", "first", "last"] | None = None
    normalise: bool | None = None
    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "amortised"

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("latent_size", "latent_slots", "injection_rank", "max_position_embeddings"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, not {self.lora_rank}")

    def validate_parts(self) -> None:
        """Part of the validation of `@strict`."""
        if self.has_encoder and self.decoder_name and not self.encoder_name:
            raise ValueError(f"inference {self.inference} needs an encoder: give encoder_name, or take gradient")


class Bottleneck(nn.Module):
    """q_φ(z | x) from a frozen encoder's pooled states."""

    def __init__(self, size: int, config: LangVAEConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mean = nn.Linear(size, config.latent_size)
        self.log_variance = nn.Linear(size, config.latent_size)

    def forward(self, pooled: Float[Tensor, "batch size"]) -> tuple[Tensor, Tensor]:
        pooled = self.norm(pooled.to(self.mean.weight.dtype))
        return self.mean(pooled).float(), self.log_variance(pooled).float()


class Injection(nn.Module):
    """z → keys and values of each layer, [batch, heads, slots, width]; a layer's heads and widths are its own."""

    def __init__(self, config: LangVAEConfig, shapes: list[tuple[int, int, int]]):
        super().__init__()
        self.shapes, self.slots = shapes, config.latent_slots
        size = config.latent_slots * sum(heads * (key + value) for heads, key, value in shapes)
        if config.injection_rank is None:
            self.map: nn.Module = nn.Linear(config.latent_size, size)
        else:
            down = nn.Linear(config.latent_size, config.injection_rank, bias=False)
            self.map = nn.Sequential(down, nn.Linear(config.injection_rank, size))

    def forward(self, latents: Float[Tensor, "batch size"]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        weight = next(self.map.parameters())
        given = iter(self.map(latents.to(weight.dtype)).split(self._sizes, -1))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for heads, *widths in self.shapes:
            for found, width in zip((keys, values), widths, strict=True):
                found.append(next(given).view(len(latents), heads, self.slots, width))
        return tuple(keys), tuple(values)

    @property
    def _sizes(self) -> list[int]:
        return [self.slots * heads * width for heads, *widths in self.shapes for width in widths]


class LangVAE(HostedLM, VariationalLM):
    """A bottleneck between two frozen models, which are loaded by the names in the config.

    The text is tokenised for the decoder. What the encoder reads is the same text, tokenised anew for it, so q is a
    function of `input_ids` alone.
    """

    config: LangVAEConfig
    config_class = LangVAEConfig
    tokenizer_of = "decoder_name"
    #: beginnings of the names of weights that are not ours
    frozen = ("language_model.", "text_encoder.")

    def __init__(self, config: LangVAEConfig, device_map: DeviceMap | None = None):
        super().__init__(config)
        how, maps = config.frozen_precision, device_maps(device_map, "language_model", "text_encoder")
        language_model = load_decoder(config.decoder_name, config.decoder_revision, how, maps[0])
        longest = getattr(language_model.config, "max_position_embeddings", None) or config.max_position_embeddings
        if longest < config.max_position_embeddings:
            raise InputError(f"max_position_embeddings exceeds the context of {config.decoder_name}, {longest}.")
        self.injection = Injection(config, slot_shapes(language_model))
        text_encoder, size = None, 0
        if config.has_encoder:
            assert config.encoder_name is not None
            text_encoder = load_encoder(config.encoder_name, config.encoder_revision, how, maps[1])
            self._how = pooling_of(config.encoder_name, config.encoder_revision, text_encoder)
            size = text_encoder.config.hidden_size
        self.add_inference(functools.partial(Bottleneck, size), (config.latent_size,))
        self.post_init()
        self.to(device_of(language_model))
        # after our own weights are made, which would make theirs anew, and are moved
        self.language_model, self.text_encoder = language_model, text_encoder
        if config.lora_rank:
            add_lora(language_model, config.lora_rank)
        self._know_again("decoder")
        if text_encoder is not None:
            self._know_again("encoder")
        self._kept: Embeddings | None = None
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def _know_again(self, part: str) -> None:
        if self.device.type == "meta":
            return
        config = self.config
        name = getattr(config, f"{part}_name")
        found = fingerprint(name, getattr(config, f"{part}_revision"))
        if (getattr(config, f"{part}_fingerprint") or found) != found:
            raise InputError(f"{name} is not the {part} that this model was trained with: its weights differ.")
        setattr(config, f"{part}_fingerprint", found)
        if Path(name).is_dir():  # found again from anywhere on this machine
            setattr(config, f"{part}_name", str(Path(name).resolve()))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.log_variance.bias, self.config.inference_start_log_variance)

    def train(self, mode: bool = True) -> "LangVAE":
        super().train(mode)
        for part in (self.language_model, self.text_encoder):
            if part is not None:
                part.eval()  # frozen as they are: without dropout
        return self

    # ---- the three sentences -------------------------------------------------------------------------------------

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        return standard_normal(batch_size, self.latent_shape, self.device)

    def encode(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch size"], Float[Tensor, "batch size"]]:
        return self.encoder(self.embed(input_ids, attention_mask))

    @torch.no_grad()
    def embed(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch size"]:
        """The frozen encoder's pooled states of each text, from what is kept or anew."""
        if self._kept is None:
            return self._embed(input_ids, attention_mask)
        found, there = self._kept.find(sequence_keys(input_ids, attention_mask))
        if not bool(there.all()):
            mask = None if attention_mask is None else attention_mask[~there]
            found[~there] = self._embed(input_ids[~there], mask)
        return found

    def keep_embeddings(
        self,
        folder: str | Path,
        sequences: Dataset | None = None,
        *,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """From here on takes what the encoder says of a text from a folder, if it is there (`data.embeddings`).

        Args:
            sequences: what is missing of these is computed and kept first.
            on_progress: called with (sequences done, sequences in all).
        """
        assert self.text_encoder is not None
        tokenizers = [tokenizer_fingerprint(self._tokenizer(part)) for part in ("encoder", "decoder")]
        what = [self.config.encoder_fingerprint, self.config.frozen_precision, *tokenizers, *self._pooled_how()]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        self._kept = Embeddings(folder, digest, self.text_encoder.config.hidden_size)
        if sequences is None:
            return

        kept, number = self._kept, len(sequences)  # type: ignore[arg-type]
        lengths = [len(sequences[index]["input_ids"]) for index in range(number)]

        def missing() -> Iterator[tuple[Tensor, Tensor]]:
            done = 0
            for indices in length_buckets(lengths, batch_size, seed=0, shuffle=False):
                batch = collate([sequences[index] for index in indices], self.config.pad_token_id or 0)
                input_ids, attention_mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
                keys = sequence_keys(input_ids, attention_mask)
                new = ~kept.find(keys)[1]
                if bool(new.any()):
                    yield keys[new], self._embed(input_ids[new], attention_mask[new])
                done += len(indices)
                if on_progress is not None:
                    on_progress(done, number)

        with torch.no_grad():
            kept.add(missing())

    def _pooled_how(self) -> tuple[Literal["mean", "first", "last"], bool]:
        how, normalised = self._how
        return self.config.pooling or how, normalised if self.config.normalise is None else self.config.normalise

    def _embed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch size"]:
        assert self.text_encoder is not None
        texts = self.texts_of(input_ids, attention_mask)
        longest = getattr(self.text_encoder.config, "max_position_embeddings", None)
        batch = encoder_tokens(self._tokenizer("encoder"), texts, longest).to(device_of(self.text_encoder))
        states = self.text_encoder(**batch).last_hidden_state
        how, unit = self._pooled_how()
        pooled = pool(states.float(), batch["attention_mask"], how).to(self.device)
        return nn.functional.normalize(pooled, dim=-1) if unit else pooled

    def texts_of(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """The text of each row's scored tokens, without the ends that a tokenizer adds."""
        tokenizer = self._tokenizer("decoder")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[mask.bool()][1:].tolist() for ids, mask in zip(input_ids.cpu(), real.cpu(), strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def given_latents(self, latents: Float[Tensor, "batch size"], position_ids: Tensor) -> dict[str, Any]:
        self.check_latent_shape(latents)
        keys, values = self.injection(latents)
        return {"latent_slots": Slots(keys, values, self._scores(position_ids))}

    def _scores(self, position_ids: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch 1 time slots"]:
        """ln of how often the token at a position sees each slot."""
        slots = torch.arange(self.config.latent_slots, device=position_ids.device)
        if self.config.injection == "prefix":
            return torch.zeros((*position_ids.shape, len(slots)), device=slots.device)[:, None]
        brought = (position_ids[..., None] - slots).div(len(slots), rounding_mode="floor") + 1
        return brought.clamp_min(0).float().log()[:, None]

    # ---- the parts, and what is saved ----------------------------------------------------------------------------

    def _tokenizer(self, part: str) -> PreTrainedTokenizerBase:
        if part not in self._tokenizers:
            self._tokenizers[part] = load_tokenizer(getattr(self.config, f"{part}_name"), needs_end=part == "decoder")
        return self._tokenizers[part]

    def _ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All but the weights of the frozen models; adapters in them are ours."""
        return {name: value for name, value in weights.items() if not name.startswith(self.frozen) or ".lora_" in name}

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As any model's, of our own weights alone; the config names the frozen models."""
        ours = self._ours(kwargs.pop("state_dict", None) or self.state_dict())
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=ours, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *args: Any,
        config: LangVAEConfig | None = None,
        device_map: DeviceMap | None = None,
        **kwargs: Any,
    ) -> Any:
        """Our own weights from a folder or a hub name, and the frozen models by the names in its config.

        Args:
            device_map: of the frozen models, as transformers has it: "auto", or names such as "text_encoder" and
                "language_model.lm_head" to devices, "" for a model that is not named. What is ours goes where the
                decoder begins.

        Raises:
            InputError: a frozen model that is not found, or is another than in training.
        """
        of_hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
        config = config or LangVAEConfig.from_pretrained(path, **of_hub)
        model = cls(config, device_map)
        weights = load_file(str(cached_file(path, "model.safetensors", **of_hub)))
        own = model._ours(model.state_dict())
        wrong = [
            (name, value.shape, own[name].shape)
            for name, value in weights.items()
            if name in own and value.shape != own[name].shape
        ]
        fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
        model.load_state_dict(fitting, strict=False)
        info = {
            "missing_keys": own.keys() - weights.keys(),
            "unexpected_keys": weights.keys() - own.keys(),
            "mismatched_keys": wrong,
        }
        return (model.eval(), info) if kwargs.get("output_loading_info") else model.eval()
