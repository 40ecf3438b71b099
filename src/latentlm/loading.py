"""Models and their tokenizers, from and to a folder, and the history that a run leaves beside them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latentlm.config import LatentLMConfig
from latentlm.data import load_tokenizer
from latentlm.errors import InputError, one_sentence
from latentlm.families import FAMILIES, HuggingFaceLM, LangVAEConfig
from latentlm.files import CHECKSUMS_FILE, damage, publish_folder, reason_of, saving, sync_folder, write_checksums
from latentlm.latent_lm import WEIGHTS, LatentLM
from latentlm.pretrained import DeviceMap, no_progress_bars

HISTORY_FILE = "history.json"


def load(path: str | Path, *, device_map: DeviceMap | None = None) -> tuple[LatentLM, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and the tokenizer that were saved together in a folder (or under a hub name).

    Args:
        device_map: of a LangVAE's frozen models; see its `from_pretrained`.

    Raises:
        InputError: the folder is missing, is no model of a family of this library, lacks weights, its weights or
            tokenizer are not those that were saved (by its SHA256SUMS, where it has them), weights are not finite, or
            the tokenizer has more tokens than the model's vocabulary.
    """
    folder = Path(path)
    # a hub name is OWNER/NAME; asking the hub for a misspelt folder would take a minute to fail
    parts = folder.parts
    if folder.exists() or len(parts) != 2 or Path(parts[0]).exists() or parts[0] in (".", "..", "~", "/"):
        _check_folder(folder)
    try:
        with no_progress_bars():
            config = AutoConfig.from_pretrained(path)
            if device_map is not None and not isinstance(config, LangVAEConfig):
                raise InputError("only a lang_vae takes a device_map: leave it out.")
            if isinstance(config, LatentLMConfig):
                # weights as torch pickles them are never read
                model, info = AutoModel.from_pretrained(
                    path,
                    output_loading_info=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    **({} if device_map is None else {"device_map": device_map}),
                )
            else:
                model, info = HuggingFaceLM.of(path), {}
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path} cannot be loaded as a model: {error}") from error
    except Exception as error:  # every kind of damage raises its own kind of exception
        reason = one_sentence(error).rstrip(".")
        raise InputError(f"{path} cannot be loaded as a model ({reason}): copy it or save it again.") from error
    wrong = {*info.get("missing_keys", ()), *info.get("unexpected_keys", ())}
    wrong |= {key for key, *_ in info.get("mismatched_keys", ())}
    if wrong:
        raise InputError(
            f"{path}: its weights do not fit its config.json (for one, {min(wrong)}): save the model again."
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):  # meta: offloaded
            raise InputError(f"{path}: its weights {name} are not finite numbers: take an earlier checkpoint.")
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    return model.eval(), tokenizer


def save(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes model and tokenizer to a folder: a new one appears whole, in an old one each file is replaced whole.

    An old folder whose replacement was cut short is known by its SHA256SUMS, and `load` refuses it.

    Args:
        state_dict: the weights, where the model's own are only a process' share.
    """
    folder = Path(path).resolve()
    staging = folder.with_name(f".{folder.name}.saving")
    with saving(path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            with no_progress_bars():
                model.save_pretrained(staging, state_dict=state_dict)
            tokenizer.save_pretrained(staging)
            write_checksums(staging)
            if not folder.exists():
                publish_folder(staging, folder)
                return
            sync_folder(staging)
            for file in sorted(staging.iterdir(), key=lambda file: file.name == CHECKSUMS_FILE):
                os.replace(file, folder / file.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def saved_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log of the run in a folder, a mapping for each logged step. Empty where none can be read."""
    try:
        history = json.loads((Path(folder) / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    whole = isinstance(history, list) and all(isinstance(entry, dict) for entry in history)
    return history if whole else []


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is no folder: give the folder of a saved model.")
    if not (folder / "config.json").exists() and (checkpoints := sorted(folder.glob("checkpoint-*"))):
        raise InputError(
            f"{folder} holds a training that was cut short: go on with it by --resume, or give one of its "
            f"checkpoints, such as {checkpoints[-1]}."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except PermissionError as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {reason_of(error)}.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder} has no readable config.json with a model_type: it is no saved model.") from error
    known = [family.config_class.model_type for family in FAMILIES.values()]
    fault = None
    if (folder / CHECKSUMS_FILE).exists():
        # a tokenizer that was saved by itself, after the model, is not listed
        fault = damage(folder, WEIGHTS) or damage(folder, "tokenizer.json", all_listed=False)
    if fault:
        raise InputError(
            f"{folder} is no whole model ({fault}): train on with --resume, take a checkpoint, "
            f"or delete its {CHECKSUMS_FILE} if you changed it yourself."
        )
    if model_type not in known and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{folder} holds a model of type {model_type!r}; latentlm knows {', '.join(known)} "
            "and the causal language models of transformers."
        )
