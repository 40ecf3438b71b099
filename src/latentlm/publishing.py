"""A saved model on the Hugging Face hub: its files, without the places they came from, and its model card."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from latentlm.data.hub import is_reachable
from latentlm.data.recipe import RECIPE_FILE, DataRecipe, saved_data_recipe
from latentlm.errors import InputError, one_sentence, shown
from latentlm.families import LangVAE
from latentlm.files import CHECKSUMS_FILE, reason_of, sha256_of
from latentlm.latent_lm import WEIGHTS, LatentLM
from latentlm.loading import HISTORY_FILE, load, saved_history
from latentlm.model_card import check_figures, model_card

CARD_FILE = "README.md"
# what a model is made of; what is beside it in its folder (checkpoints, optimiser, pictures) stays at home
_BELONGS = (
    "config.json", "generation_config.json", WEIGHTS, "model.safetensors.index.json", RECIPE_FILE, HISTORY_FILE,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "chat_template.jinja",
)  # fmt: skip
# fields of a recipe that are a place on this machine unless they say otherwise
_SOURCES = (("data", "source"), ("data", "validation"))
_FOLDERS = (("data", "cache"), ("encoder", "initial"), ("encoder", "embeddings"))


def push_to_hub(
    folder: str | Path,
    name: str,
    figures: Mapping[str, Any] | str | Path | None = None,
    *,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Puts a saved model on the hub with a model card, in one commit, and returns its address.

    What goes there is the model, its tokenizer, recipe and history, and nothing else of the folder. Where a file of it
    names a place on this machine, its last part alone is uploaded: of `/home/me/texts.txt` in the recipe `texts.txt`,
    and of a LangVAE's frozen part in a local folder that folder's name. Files of an older model under the name go.

    Args:
        folder: of a saved model, such as a run's.
        name: OWNER/NAME on the hub; made if it is not there.
        figures: of `latentlm evaluate MODEL --json FILE`: the mapping or the file. They stand in the card with what
            each is; without them it says that nothing was measured.
        private: only its owner sees it. A name that is public already is then refused.
        token: of the hub; by default HF_TOKEN, or the one of `hf auth login`.

    Raises:
        InputError: no model in the folder, a name that is not OWNER/NAME, figures that are not those of `evaluate` or
            are another model's, no network, or a hub that refuses the token.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _check_name(name)
    files = published_files(folder, name, figures)
    if not is_reachable():
        raise InputError(f"{name} is not uploaded, since the Hugging Face hub cannot be reached: check the network.")
    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        there = api.model_info(name)
        if private and not there.private:
            raise InputError(f"{name} is public: ask for that (private=False, --public), or take another name.")
        # a shard that an older and larger model left would be loaded with this one
        old = {file.rfilename for file in there.siblings or ()} - files.keys()
        api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in sorted(old) if _belongs(path)),
            ],
            commit_message="Upload with latentlm",
        )
    except InputError:
        raise
    except Exception as error:  # of the hub, of its transport, of the network: each has a type of its own
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise InputError(
                f"the hub does not let you write to {name}: give a token that may (HF_TOKEN, or hf auth login)."
            ) from error
        raise InputError(f"{name} cannot be uploaded ({one_sentence(error).rstrip('.')}): try again.") from error
    return str(address)


def published_files(
    folder: str | Path, name: str, figures: Mapping[str, Any] | str | Path | None = None
) -> dict[str, Path | bytes]:
    """What `push_to_hub` uploads: each file's name, and the file itself or, where it differs, its content.

    Raises:
        InputError: as there.
    """
    from latentlm.training.recipe import TRAINING_DEFAULTS  # the Trainer is heavy to import

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is no folder: give the folder of a saved model.")
    model, _ = load(folder)
    history = saved_history(folder)
    measured = None if figures is None else check_figures(_read(figures), model, history)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir()) if _belongs(path.name)}

    files |= _configs_without_places(folder)
    if isinstance(model, LangVAE):
        _check_parts(model)
    data = training = None
    if saved_data_recipe(folder) is not None:  # which says what is wrong with one that cannot be read
        recipe = _recipe_without_places(folder, model)
        files[RECIPE_FILE] = yaml.safe_dump(recipe, sort_keys=False).encode()
        known = {field.name for field in dataclasses.fields(DataRecipe)}
        data = DataRecipe(**{key: value for key, value in recipe["data"].items() if key in known})
        training = {**TRAINING_DEFAULTS, **(recipe.get("training") or {})}
    if measured is not None and isinstance(measured.get("data"), str):
        measured["data"] = _name_of_source(measured["data"])
    # an owner adds to the card: it is none of the files whose change would be damage
    sums = "".join(f"{_digest(content)}  {path}\n" for path, content in sorted(files.items()))
    card = model_card(model, name, data=data, training=training, history=history, figures=measured)
    return {**files, CHECKSUMS_FILE: sums.encode(), CARD_FILE: card.encode()}


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        whole = name.count("/") == 1 and name.isascii()
    except HFValidationError:
        whole = False
    if not whole:
        raise InputError(
            f"{shown(name)} is no name on the hub: write OWNER/NAME, of letters, digits, '-', '_' and '.'."
        )


def _belongs(path: str) -> bool:
    return "/" not in path and any(PurePosixPath(path).match(pattern) for pattern in _BELONGS)


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


def _read(figures: Mapping[str, Any] | str | Path) -> Any:
    if isinstance(figures, Mapping):
        return figures
    try:
        return json.loads(Path(figures).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{figures} cannot be read: {reason_of(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{figures} is no JSON: give what latentlm evaluate MODEL --json FILE wrote.") from error


# ---- places on this machine ------------------------------------------------------------------------------------------


def _is_place(text: str) -> bool:
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return (absolute or text.startswith(("~", ".."))) and bool(_last_part(text))


def _last_part(text: str) -> str:
    return PureWindowsPath(text).name  # which knows both kinds of slashes


def _without_places(value: Any) -> Any:
    """A document in which of each path that begins at a root, a home or above the last part alone is left."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_places(inner) for inner in value]
    return _last_part(value) if isinstance(value, str) and _is_place(value) else value


def _name_of_source(source: str) -> str:
    return source if source.startswith(("hub:", "builtin:")) else _last_part(source) or source


def _configs_without_places(folder: Path) -> dict[str, bytes]:
    """The configs of model and tokenizer, those that name a place."""
    found = {}
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        # a token may look like a path
        fields = {key for key in content if name == "config.json" or key.endswith(("_file", "_path", "_dir"))}
        public = {key: _without_places(value) if key in fields else value for key, value in content.items()}
        if public != content:
            found[name] = json.dumps(public, indent=2).encode()
    return found


def _recipe_without_places(folder: Path, model: LatentLM) -> dict[str, Any]:
    """The recipe, in which no folder of data is named even where it is relative, nor one of a frozen part."""
    recipe = _without_places(yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")))
    for fields, named in ((_SOURCES, _name_of_source), (_FOLDERS, _last_part)):
        for section, key in fields:
            if isinstance(value := (recipe.get(section) or {}).get(key), str):
                recipe[section][key] = named(value)
    tokenizer = recipe["data"].get("tokenizer")
    if isinstance(tokenizer, str) and Path(tokenizer).is_dir():
        recipe["data"]["tokenizer"] = _last_part(tokenizer)
    if isinstance(model, LangVAE) and isinstance(recipe.get("model"), dict):
        parts = {field: _without_places(getattr(model.config, field)) for field in ("decoder_name", "encoder_name")}
        recipe["model"] |= {field: name for field, name in parts.items() if field in recipe["model"]}
        if tokenizer is not None:
            recipe["data"]["tokenizer"] = parts["decoder_name"]
    return recipe


def _check_parts(model: LangVAE) -> None:
    names = {name for name in (model.config.decoder_name, model.config.encoder_name) if name}
    if len(names) > len({_last_part(name) if Path(name).is_dir() else name for name in names}):
        raise InputError(f"{' and '.join(sorted(names))} would have one name on the hub: rename one of the folders.")
