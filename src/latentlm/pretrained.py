"""Frozen models of others: found by name or folder, loaded, and known again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    BatchEncoding,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from latentlm.data.hub import hub_or_cache
from latentlm.errors import InputError, one_sentence

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_CHUNK, _CHUNKS = 65536, 32
#: of a frozen model's weights; "4bit" is bitsandbytes' nf4 (Dettmers et al. 2023, arXiv 2305.14314)
Precision = Literal["float32", "bfloat16", "float16", "4bit"]
DeviceMap = str | Mapping[str, Any]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights, which take no time here and break our own lines."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load_decoder(
    name: str,
    revision: str | None = None,
    precision: Precision | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """A causal language model, frozen and in evaluation mode.

    Args:
        precision: of its weights; None for that in which they were saved.
        device_map: as `from_pretrained` of transformers takes it.

    Raises:
        InputError: nothing of that name, an encoder or an encoder-decoder, or a model that does not load; 4 bits
            without bitsandbytes.
    """
    config = _config(name, revision)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder ({config.model_type}): a decoder is a causal language model.")
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encodes or type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{name} is no causal language model ({config.model_type}): give one as the decoder.")
    return _frozen(AutoModelForCausalLM, name, revision, precision, device_map)


def load_encoder(
    name: str,
    revision: str | None = None,
    precision: Precision | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """A model that turns tokens into states, frozen and in evaluation mode; of an encoder-decoder its encoder.

    Arguments and errors are those of `load_decoder`.
    """
    config = _config(name, revision)
    kind = AutoModelForTextEncoding if getattr(config, "is_encoder_decoder", False) else AutoModel
    return _frozen(kind, name, revision, precision, device_map)


def _config(name: str, revision: str | None) -> Any:
    if not name.strip():
        raise InputError("a pretrained model has no name: give its folder or hub name.")
    try:
        with hub_or_cache(name):
            return AutoConfig.from_pretrained(name, revision=revision)
    except InputError:
        raise
    except Exception as error:  # each kind of damage has a type of its own
        raise InputError(f"{name} cannot be read as a model ({one_sentence(error)}): give another.") from error


def _frozen(
    kind: Any, name: str, revision: str | None, precision: Precision | None, device_map: DeviceMap | None
) -> PreTrainedModel:
    how: dict[str, Any] = _in_four_bits() if precision == "4bit" else {"dtype": precision or "auto"}
    if torch.get_default_device().type == "meta":  # somebody counts what a model would need
        return kind.from_config(_config(name, revision)).eval().requires_grad_(False)
    try:
        with hub_or_cache(name), no_progress_bars():
            model, info = kind.from_pretrained(
                name,
                revision=revision,
                device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
                use_safetensors=True,
                output_loading_info=True,
                **how,
            )
    except InputError:
        raise
    except Exception as error:
        advice = "take another frozen_precision" if precision == "4bit" else "give another"
        raise InputError(f"{name} cannot be loaded ({one_sentence(error)}): {advice}.") from error
    # a head that was never trained, such as BERT's pooler, is not read
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(f"{name} lacks weights of a {type(model).__name__} (for one, {missing[0]}): give another.")
    for module in model.modules():
        # without gradient, bitsandbytes lays weights out anew for such a CPU, and no gradient passes them from then on
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _in_four_bits() -> dict[str, Any]:
    if not is_bitsandbytes_available():
        raise InputError("frozen_precision 4bit needs another package: pip install bitsandbytes.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "dtype": torch.bfloat16}  # of embeddings and norms, which stay whole


def device_maps(device_map: DeviceMap | None, *parts: str) -> list[DeviceMap | None]:
    """What a device map over a model says of each of its parts: "language_model.lm_head" is that one's "lm_head".

    Raises:
        InputError: it names what is in none of them.
    """
    if not isinstance(device_map, Mapping):
        return [device_map] * len(parts)
    of_all = {"": device_map[""]} if "" in device_map else None
    found: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, device in device_map.items():
        part, _, inner = name.partition(".")
        if part in found:
            found[part][inner] = device
        elif name:
            raise InputError(f"device_map names {name}: it is for what is in {' and '.join(parts)}.")
    return [found[part] or of_all for part in parts]


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes: its weights may wait elsewhere, which transformers calls the device meta."""
    if model.device.type != "meta" or not hasattr(model, "hf_device_map"):
        return model.device
    devices = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Puts trainable adapters that change nothing yet into every linear map of a frozen model but its last.

    Raises:
        InputError: some of its weights are offloaded.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("adapters do not go with weights that are offloaded: give another device_map.")
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", fan_in_fan_out=transposed), model
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives them the precision of the weights that they stand beside
            parameter.data = parameter.data.float()


def load_fitting(model: torch.nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Loads of the weights those that are the model's own in name and shape, and says of the others what transformers'
    `output_loading_info` does.
    """
    wrong = [
        (name, value.shape, own[name].shape)
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return {
        "missing_keys": own.keys() - weights.keys(),
        "unexpected_keys": weights.keys() - own.keys(),
        "mismatched_keys": wrong,
    }


def fingerprint(name: str, revision: str | None = None) -> str:
    """By which a model is known again wherever it lies: its weights' files, their sizes, headers and samples of each.

    Not all bytes are read, since a model may have tens of gigabytes: a change of a few numbers by hand stays unseen.
    """
    found = hashlib.sha256()
    with hub_or_cache(name):
        for file in _weight_files(name, revision):
            size = file.stat().st_size
            found.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                for place in range(_CHUNKS):
                    content.seek(place * max(size - _CHUNK, 0) // (_CHUNKS - 1))
                    found.update(content.read(_CHUNK))
    return found.hexdigest()


def _weight_files(name: str, revision: str | None) -> list[Path]:
    for file in _WEIGHTS:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        if not file.endswith(".json"):
            return [Path(path)]
        parts = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(cached_file(name, part, revision=revision)) for part in parts]
    raise InputError(f"{name} has no weights as safetensors: save it with transformers' save_pretrained.")


def pooling_of(
    name: str, revision: str | None, model: PreTrainedModel
) -> tuple[Literal["mean", "first", "last"], bool]:
    """How an encoder's states become one vector, and whether that is normalised, as is said with it or is usual.

    Sentence-transformers say so in `modules.json` and `1_Pooling/config.json`. Of others a causal model has seen all of
    the text at its last token, and of all others the mean is taken.
    """
    said = _json(name, "1_Pooling/config.json", revision)
    modules = _json(name, "modules.json", revision) or []
    normalised = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    if said is not None:
        modes = {
            "pooling_mode_cls_token": "first",
            "pooling_mode_lasttoken": "last",
            "pooling_mode_mean_tokens": "mean",
        }
        for mode, how in modes.items():
            if said.get(mode):
                return how, normalised  # type: ignore[return-value]
    return (
        "last" if type(model.config) in AutoModelForCausalLM._model_mapping and _is_causal(model) else "mean"
    ), False


def _is_causal(model: PreTrainedModel) -> bool:
    # BERT is among the causal models, too, with a config that says whether it is one
    return bool(getattr(model.config, "is_decoder", True)) or not hasattr(model.config, "type_vocab_size")


def _json(name: str, file: str, revision: str | None) -> Any:
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


@dataclass
class Retokeniser:
    """Makes of texts in a decoder's tokens the same texts in an encoder's.

    `longest` is the encoder's context, None for no limit. It holds no model, so that a worker that makes batches can
    have it.
    """

    decoder: PreTrainedTokenizerBase
    encoder: PreTrainedTokenizerBase
    longest: int | None

    def __call__(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> dict[str, Int64[Tensor, "batch read"]]:
        """`encoder_input_ids` and `encoder_attention_mask`, parts of a condition."""
        tokens = encoder_tokens(self.encoder, texts_of(self.decoder, input_ids, attention_mask), self.longest)
        return {f"encoder_{name}": value for name, value in tokens.items()}


def texts_of(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
    """The text of each row's scored tokens, without the ends that a tokenizer adds."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [ids[mask.bool()][1:].tolist() for ids, mask in zip(input_ids.cpu(), real.cpu(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def encoder_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None) -> BatchEncoding:
    """Texts as an encoder takes them: its own special tokens, padded on the right, cut at its context."""
    limits = {"truncation": longest is not None, "max_length": longest, "return_token_type_ids": False}
    rows = tokenizer(list(texts), return_attention_mask=False, **limits)["input_ids"]
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0  # read by nobody, since the mask says so
    # of a tokenizer without special tokens, a text without tokens leaves nothing to pool
    rows = [row or [pad] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return BatchEncoding({"input_ids": input_ids, "attention_mask": mask})
