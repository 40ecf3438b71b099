"""LangVAE: a latent space between a frozen pretrained encoder and a frozen pretrained decoder (arXiv 2505.00004).

p(z)      = N(0, I), one vector z [latent_size]
p(x | z)  = Π_t p(x_t | z, BOS, x_<t) by a pretrained causal LM, each of whose layers sees keys and values made of z
q(z | x)  = N(μ, σ²), linear in the pooled states of a pretrained encoder; or by gradient steps (`VariationalConfig`)

Of annotated texts (labels of each word or text; the paper's conditional variant) both are given them: p(x | z, c) and
q(z | x, c), with p(z) as it is.

Only what stands between them trains: z → keys and values (section 3.2, h = W_m z), and pooled states → μ, log σ².

Where we differ: training is one parallel pass over the text itself (teacher forcing), where the published code decodes
its own argmax token by token; z's keys and values stand beside the cache, not in it (`layers.injection`), which is the
same attention and cannot be lost to a window; padding is not trained; a text's own EOS is.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Independent
from torch.utils.data import Dataset
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from latentlm.data.datasets import NO_LABEL
from latentlm.data.embeddings import Embeddings
from latentlm.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from latentlm.distributions import sequence_keys, standard_normal
from latentlm.errors import InputError
from latentlm.hosted_lm import HostedLM
from latentlm.layers import AttentionPooling, pool
from latentlm.layers.injection import Slots, slot_shapes
from latentlm.pretrained import (
    DeviceMap,
    Retokeniser,
    add_lora,
    device_maps,
    device_of,
    fingerprint,
    load_decoder,
    load_encoder,
    load_fitting,
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
        pooling: how the encoder's states become one vector: their "mean", the "first", the "last", or by "attention" of
            a query that trains; None takes what comes with the encoder (sentence-transformers), or the last of a causal
            encoder and the mean of any other.
        normalise: the pooled vector is of unit length; None as comes with the encoder.
        annotation_labels: names of the labels that texts are annotated with, from the data; None where they are not.
        annotation_size: numbers that a text's labels become; 0 leaves them out, and the model is not conditional.
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
    pooling: Literal["mean", "first", "last", "attention"] | None = None
    normalise: bool | None = None
    annotation_labels: list[str] | None = None
    annotation_size: int = 64
    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "amortised"

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("latent_size", "latent_slots", "injection_rank", "max_position_embeddings"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lora_rank", "annotation_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.annotation_labels is not None and not self.annotation_size:
            raise ValueError("annotation_labels become annotation_size numbers, which must not be 0")

    def validate_parts(self) -> None:
        """Part of the validation of `@strict`."""
        if self.has_encoder and self.decoder_name and not self.encoder_name:
            raise ValueError(f"inference {self.inference} needs an encoder: give encoder_name, or take gradient")

    @property
    def numbers_of_labels(self) -> int:
        """Of the vector that a text's labels become; 0 where texts have none."""
        return 0 if self.annotation_labels is None else self.annotation_size


class Annotations(nn.Module):
    """c: a text's labels l_1 … l_M, in their order, as one vector Σ_m w_m ⊙ e(l_m) ÷ √M, with w and e learned.

    Each position weights a label's embedding in its own way, so the same labels in another order are another c. The
    published code pools one-hot vectors by position.
    """

    def __init__(self, config: LangVAEConfig):
        super().__init__()
        assert config.annotation_labels is not None
        self.labels = nn.Parameter(torch.empty(len(config.annotation_labels), config.annotation_size))
        self.positions = nn.Parameter(torch.empty(config.max_position_embeddings, config.annotation_size))

    def forward(self, annotations: Int64[Tensor, "batch words"]) -> Float[Tensor, "batch size"]:
        there = annotations != NO_LABEL
        weights = self.positions[: annotations.shape[1]]
        found = (self.labels[annotations.clamp_min(0)] * weights).masked_fill(~there[..., None], 0.0)
        return found.sum(1) / there.sum(1, keepdim=True).clamp_min(1).sqrt()


class Bottleneck(nn.Module):
    """q_φ(z | x, c) from a frozen encoder's states."""

    def __init__(self, encoder_config: PreTrainedConfig, config: LangVAEConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        size = encoder_config.hidden_size
        self.pooling = AttentionPooling(encoder_config, 1) if config.pooling == "attention" else None
        self.norm = nn.LayerNorm(size)
        self.mean = nn.Linear(size + config.numbers_of_labels, config.latent_size)
        self.log_variance = nn.Linear(size + config.numbers_of_labels, config.latent_size)

    def forward(self, pooled: Float[Tensor, "batch size"], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        pooled = self.norm(pooled.to(self.mean.weight.dtype))
        if labels is not None:
            pooled = torch.cat((pooled, labels.to(pooled.dtype)), -1)
        return self.mean(pooled).float(), self.log_variance(pooled).float()


class Injection(nn.Module):
    """z, and c beside it → keys and values of each layer, [batch, heads, slots, width], each of its own sizes."""

    def __init__(self, config: LangVAEConfig, shapes: list[tuple[int, int, int]]):
        super().__init__()
        self.shapes, self.slots = shapes, config.latent_slots
        size = config.latent_slots * sum(heads * (key + value) for heads, key, value in shapes)
        given = config.latent_size + config.numbers_of_labels
        if config.injection_rank is None:
            self.map: nn.Module = nn.Linear(given, size)
        else:
            down = nn.Linear(given, config.injection_rank, bias=False)
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
    annotations: Annotations | None
    encoder_weights = (*VariationalLM.encoder_alone, "annotations.")

    def __init__(self, config: LangVAEConfig, device_map: DeviceMap | None = None):
        super().__init__(config)
        how, maps = config.frozen_precision, device_maps(device_map, "language_model", "text_encoder")
        language_model = load_decoder(config.decoder_name, config.decoder_revision, how, maps[0])
        longest = getattr(language_model.config, "max_position_embeddings", None) or config.max_position_embeddings
        if longest < config.max_position_embeddings:
            raise InputError(
                f"the context of {config.decoder_name} is {longest} tokens, and texts may have "
                f"{config.max_position_embeddings} (max_position_embeddings, in a recipe data.length): give less."
            )
        self.injection = Injection(config, slot_shapes(language_model))
        self.annotations = None if config.annotation_labels is None else Annotations(config)
        text_encoder, of_encoder = None, None
        if config.has_encoder:
            assert config.encoder_name is not None
            text_encoder = load_encoder(config.encoder_name, config.encoder_revision, how, maps[1])
            self._how = pooling_of(config.encoder_name, config.encoder_revision, text_encoder)
            of_encoder = text_encoder.config
        self.add_inference(functools.partial(Bottleneck, of_encoder), (config.latent_size,))
        self.post_init()
        self.to(device_of(language_model))
        # here, since in `_init_weights` what a linear map was given stays: keys and values of the size of z's numbers
        for module in self.injection.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if text_encoder is not None:
            bottleneck: Any = self.encoder
            nn.init.constant_(bottleneck.log_variance.bias, config.inference_start_log_variance)
        # after our own weights are made, which would make theirs anew, and are moved
        self.language_model, self.text_encoder = language_model, text_encoder
        if config.lora_rank:
            add_lora(language_model, config.lora_rank)
        self._know_again("decoder")
        if text_encoder is not None:
            self._know_again("encoder")
        self._kept: Embeddings | None = None
        self._retokenise: Retokeniser | None = None

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
        if isinstance(module, Annotations):  # c is then of the size of z
            nn.init.normal_(module.labels)
            nn.init.normal_(module.positions)

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
        annotations = self.decoder_condition(condition, len(input_ids))
        labels = None if self.annotations is None else self.annotations(annotations)
        bottleneck: Any = self.encoder
        if bottleneck.pooling is None:
            return bottleneck(self.embed(input_ids, attention_mask, condition), labels)
        states, real = self._states(input_ids, attention_mask, condition)
        return bottleneck(bottleneck.pooling(states, real)[:, 0], labels)

    @torch.no_grad()
    def embed(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "batch size"]:
        """The frozen encoder's pooled states of each text, from what is kept or anew.

        Args:
            condition: may hold the texts as the encoder takes them, which `retokeniser` makes; else they are made here.
        """
        if self._kept is None:
            return self._embed(input_ids, attention_mask, condition)
        found, there = self._kept.find(sequence_keys(input_ids, attention_mask))
        if not bool(there.all()):
            mask = None if attention_mask is None else attention_mask[~there]
            found[~there] = self._embed(input_ids[~there], mask)
        return found

    def keep_embeddings(
        self,
        folder: str | Path,
        sequences: Dataset | None = None,
        **options: Any,
    ) -> None:
        """From here on takes what the encoder says of a text from a folder, if it is there (`data.embeddings`).

        Args:
            sequences: what is missing of these is computed and kept first.
            options: of `Embeddings.complete`: batch_size, on_progress, on_wait.
        """
        assert self.text_encoder is not None
        if self.encoder.pooling is not None:
            raise InputError("pooling by attention trains, so no pooled states can be kept: take another pooling.")
        tokenizers = [tokenizer_fingerprint(one) for one in (self.retokeniser.encoder, self.retokeniser.decoder)]
        what = [self.config.encoder_fingerprint, self.config.frozen_precision, *tokenizers, *self._pooled_how()]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        self._kept = Embeddings(folder, digest, self.text_encoder.config.hidden_size)
        if sequences is not None:
            self._kept.complete(sequences, self.config.pad_token_id or 0, self._embed, self.device, **options)

    def _pooled_how(self) -> tuple[Literal["mean", "first", "last"], bool]:
        how, normalised = self._how
        pooling: Any = self.config.pooling
        return pooling or how, normalised if self.config.normalise is None else self.config.normalise

    def _embed(self, input_ids: Tensor, attention_mask: Tensor | None, condition: Any = None) -> Tensor:
        states, real = self._states(input_ids, attention_mask, condition)
        how, unit = self._pooled_how()
        pooled = pool(states, real, how)
        return nn.functional.normalize(pooled, dim=-1) if unit else pooled

    @torch.no_grad()
    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, condition: Any
    ) -> tuple[Float[Tensor, "batch read size"], Int64[Tensor, "batch read"]]:
        """The frozen encoder's states, and which of them are of text."""
        assert self.text_encoder is not None
        tokens: Any = condition if isinstance(condition, Mapping) and "encoder_input_ids" in condition else None
        tokens = self.retokeniser(input_ids, attention_mask) if tokens is None else tokens
        device = device_of(self.text_encoder)
        read, real = (tokens[f"encoder_{name}"].to(device) for name in ("input_ids", "attention_mask"))
        states = self.text_encoder(input_ids=read, attention_mask=real).last_hidden_state
        return states.float().to(self.device), real.to(self.device)

    @property
    def retokeniser(self) -> Retokeniser:
        """Makes of the decoder's tokens the encoder's."""
        if self._retokenise is None:
            config = self.config
            assert self.text_encoder is not None and config.encoder_name is not None
            tokenizers = load_tokenizer(config.decoder_name), load_tokenizer(config.encoder_name, needs_end=False)
            longest = getattr(self.text_encoder.config, "max_position_embeddings", None)
            self._retokenise = Retokeniser(*tokenizers, longest)
        return self._retokenise

    @property
    def beside_batch(self) -> Retokeniser | None:
        return None if self.text_encoder is None or self._kept is not None else self.retokeniser

    # ---- the condition -------------------------------------------------------------------------------------------

    def decoder_condition(self, condition: Any, rows: int) -> Int64[Tensor, "rows words"] | None:
        """Places of the labels of each text among `annotation_labels`, −1 after its last.

        Raises:
            InputError: labels for a model without annotations, none for one with them, or some that are not these.
        """
        names, longest = self.config.annotation_labels, self.config.max_position_embeddings
        given = condition.get("annotations") if isinstance(condition, Mapping) else condition
        if names is None:
            if given is not None:
                raise InputError("this model was trained without annotations: give no labels as condition.")
            return None
        if given is None:
            raise InputError(
                "this model is conditional, p(x | z, c): give the labels of each text (condition, --labels)."
            )
        if not isinstance(given, Tensor) or given.dim() != 2 or given.dtype != torch.long:
            raise InputError("annotations are places of labels, whole numbers [texts, words]: see data.condition_of.")
        if len(given) not in (1, rows):
            raise InputError(f"the labels of {len(given)} texts do not fit {rows}: give those of each, or of one.")
        if given.shape[1] > longest:
            raise InputError(f"{given.shape[1]} labels exceed the model's context of {longest}: give fewer.")
        if given.device.type == "cpu" and given.numel() and not NO_LABEL <= given.min() <= given.max() < len(names):
            raise InputError(f"annotations must be at least {NO_LABEL} and less than {len(names)}, the known labels.")
        return given.expand(rows, -1)

    def rows_of(self, condition: Any) -> int | None:
        given = condition.get("annotations") if isinstance(condition, Mapping) else condition
        return None if given is None else len(given)

    def cache_shapes(self) -> list[tuple[int, int, int]]:
        return self.injection.shapes

    # ---- z to the decoder ----------------------------------------------------------------------------------------

    def given_latents(
        self, latents: Float[Tensor, "batch size"], position_ids: Tensor, condition: Tensor | None
    ) -> dict[str, Any]:
        self.check_latent_shape(latents)
        if self.annotations is not None:
            latents = torch.cat((latents, self.annotations(condition).to(latents.dtype)), -1)
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
        info = load_fitting(model, weights, model._ours(model.state_dict()))
        return (model.eval(), info) if kwargs.get("output_loading_info") else model.eval()
