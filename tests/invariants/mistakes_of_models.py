"""Of models and checkpoints, latents, texts, places to write to."""

from pathlib import Path

import numpy as np
from tests.command import LONG
from tests.invariants.mistakes import (
    DEEP,
    RESUME,
    Row,
    begun,
    config,
    cut,
    gone,
    npz,
    parquet,
    unlisted,
    weights,
    write,
)


def flip(name: str):
    """One bit of the last bytes, which are weights."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)

    return change


CHECKPOINT = "run/checkpoint-1"
DAMAGED = "checkpoint-1.*(damaged|half-written|incomplete|missing|changed).*(delete|resume)"
ADVISED = ".*: (save|copy|train|give|delete|write)"

MODELS_TABLE = [
    # ---- models
    Row("other family: llama", "generate llama", "llama cannot be loaded \\(.*model.safetensors"),
    Row(
        "other family: no latents to encode",
        "encode control --text a --output x.npz",
        "control has no latents, .*: give a model of another family",
    ),
    Row(
        "other family: no latents to decode",
        "generate control --latents z.npz",
        "no latents, .*: give a model of",
        npz(mean=np.zeros((1, 2, 2, 4))),
    ),
    Row(
        "other family: resume",
        RESUME + " model.family=autoregressive",
        "begun with another recipe|is no field of the family",
        begun(),
    ),
    Row(
        "other family: resume, other width",
        RESUME + " model.hidden_size=32",
        "another recipe .*: resume with the one",
        begun(),
    ),
    Row(
        "half-written: no config",
        "generate model",
        "no readable config.json .*: it is no saved model",
        gone("model/config.json"),
    ),
    Row("half-written: config", "evaluate model", "no readable config.json", cut("model/config.json")),
    Row(
        "half-written: config, nested",
        "evaluate model",
        "no readable config.json",
        write("model/config.json", "[" * 100_000),
    ),
    Row(
        "half-written: no weights",
        "generate model",
        "model.safetensors" + ADVISED,
        unlisted(gone("model/model.safetensors")),
    ),
    Row(
        "half-written: weights",
        "evaluate model",
        "cannot be loaded" + ADVISED,
        unlisted(cut("model/model.safetensors")),
    ),
    Row(
        "half-written: empty weights",
        "encode model --text a --output x.npz",
        "cannot be loaded" + ADVISED,
        unlisted(write("model/model.safetensors", "")),
    ),
    Row(
        "half-written: recipe of the model",
        "evaluate model",
        "recipe.yaml is no recipe .*: delete it, or give --data",
        write("model/recipe.yaml", "data: ["),
    ),
    Row(
        "half-written: recipe of the model, nested",
        "evaluate model",
        "recipe.yaml is no recipe .*: delete it, or give",
        write("model/recipe.yaml", "data: " + DEEP),
    ),
    Row("half-written: run already", "train small.yaml --output model", "holds a run already: name another --output"),
    *(
        Row(
            f"half-written: checkpoint without {name}",
            RESUME,
            DAMAGED,
            begun(gone(f"{CHECKPOINT}/{name}")),
        )
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    ),
    *(
        Row(
            f"half-written: checkpoint with half of {name}",
            RESUME,
            DAMAGED,
            begun(cut(f"{CHECKPOINT}/{name}")),
        )
        for name in (
            "model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "config.json",
            "tokenizer.json",
        )
    ),
    Row(
        "half-written: model with checksums",
        "evaluate model",
        "model.safetensors has changed .*: train on with --resume, take a checkpoint",
        cut("model/model.safetensors"),
    ),
    Row(
        "half-written: model without its weights",
        "generate model",
        "model.safetensors is missing.*: train on with --resume, take a checkpoint",
        gone("model/model.safetensors"),
    ),
    Row(
        "tampered: weights",
        "evaluate model",
        "model.safetensors.*(changed|tampered|checksum)",
        flip("model/model.safetensors"),
    ),
    Row(
        "tampered: checkpoint",
        RESUME,
        "model.safetensors.*(changed|tampered|checksum)",
        begun(flip(f"{CHECKPOINT}/model.safetensors")),
    ),
    Row(
        "tampered: shape",
        "generate model",
        "do not fit its config.json .*: save the model again|cannot be loaded .*: copy it",
        unlisted(weights(lambda weight: weight[:3])),
    ),
    Row(
        "tampered: NaN",
        "generate model --max-new-tokens 2",
        "not finite|no longer a finite",
        unlisted(weights(lambda w: w * np.nan)),
    ),
    Row(
        "tampered: NaN, scored",
        "evaluate model --iw-samples 1",
        "not finite|finite number|diverged",
        unlisted(weights(lambda weight: weight * np.nan)),
    ),
    Row(
        "misspelt key: config",
        "generate model",
        r"no field 'latent_sise': did you mean latent_size\?",
        config(latent_sise=4),
    ),
    Row(
        "misspelt key: value of the config",
        "evaluate model",
        "hidden_size must be a whole number, not 'wide'",
        config(hidden_size="wide"),
    ),
    Row(
        "misspelt key: --set",
        "evaluate model --set inference_step=3",
        "inference_step does not say how a LTM infers: its fields for that are",
    ),
    Row("misspelt key: --set of generate", "generate model --set inference_step=3", "its fields for that are"),
    Row("misspelt key: --set of encode", "encode model --text a --output x.npz --set inference_step=3", "its fields"),
    Row("misspelt key: --set of training", "evaluate model --set beta=3", "beta does not say .*: its fields for that"),
    Row("misspelt key: --set of a control", "evaluate control --set inference_steps=3", "it has nothing to set"),
    Row("misspelt key: --set without value", "evaluate model --set inference_steps", "FIELD=VALUE, as in"),
    Row("misspelt key: --set without field", "evaluate model --set =3", "FIELD=VALUE, as in"),
    Row("misspelt key: --set of no YAML", "evaluate model --set inference_steps=[", "not valid YAML"),
    Row("misspelt key: --set of no date", "generate model --set inference_lr=2020-13-45", "not valid YAML"),
    Row(
        "misspelt key: --set needs weights",
        "evaluate model --set inference=amortised",
        "needs weights .* trained without",
    ),
    # ---- lengths
    Row("too long: text", ("encode", "model", "--text", LONG, "--output", "x.npz"), "context is 48: shorten it"),
    Row("too long: prompt", ("generate", "model", "--prompt", LONG), "fills the context of 48: shorten it"),
    Row(
        "too long: prompt, some tokens",
        ("generate", "model", "--prompt", LONG, "--max-new-tokens", "3"),
        "exceed the model's context of 48: shorten the prompt or ask for fewer",
    ),
    Row("too long: new tokens", "generate model --max-new-tokens 100", "context of 48: shorten the prompt or ask"),
    Row("too long: absurd", f"generate model --max-new-tokens {10**30}", "context of 48: shorten the prompt or ask"),
    Row(
        "too long: prompt to score",
        "evaluate model --prompt-tokens 48 --iw-samples 1 --limit 1",
        "longer than the prompt of 48",
    ),
    # ---- latents
    Row(
        "latents: no file",
        "generate model --latents z.npz",
        "z.npz does not exist .*: give a file that latentlm encode",
    ),
    Row("latents: of another kind", "generate model --latents texts.txt", "read from .npz or .parquet: give a file"),
    Row(
        "latents: no npz",
        "generate model --latents z.npz",
        "no latents .*no .npz file.*: write it again by latentlm",
        write("z.npz", "hello"),
    ),
    Row("latents: empty", "generate model --latents z.npz", "no latents .*: write it again", write("z.npz", "")),
    Row(
        "latents: no Parquet",
        "generate model --latents z.parquet",
        "no latents .*: write it again",
        write("z.parquet", "hello"),
    ),
    Row("latents: no mean", "generate model --latents z.npz", "no array 'mean'.*: write it again", npz(x=np.zeros(3))),
    Row(
        "latents: no mean in Parquet",
        "generate model --latents z.parquet",
        "no latents .*mean.*: write it again",
        parquet("z.parquet", id=[1]),
    ),
    Row(
        "latents: pickled",
        "generate model --latents z.npz",
        "holds objects, not numbers.*: write it again",
        npz(mean=np.array([{}], dtype=object)),
    ),
    Row(
        "latents: words",
        "generate model --latents z.npz",
        "'mean' has the type .*: give numbers",
        npz(mean=np.array([["a"]])),
    ),
    Row(
        "latents: no rows",
        "generate model --latents z.npz",
        "holds no latents: encode",
        npz(mean=np.zeros((0, 2, 2, 4))),
    ),
    Row(
        "latents: shape",
        "generate model --latents z.npz",
        r"shape \[3, 5\] do not fit .*: give \[batch, 2, 2, 4\]",
        npz(mean=np.zeros((3, 5))),
    ),
    Row(
        "latents: shapes",
        "generate model --latents z.parquet",
        "rows have different shapes.*: write it again",
        parquet("z.parquet", mean=[[0.0] * 16, [0.0] * 4], shape=[[2, 2, 4], [1, 1, 4]]),
    ),
    Row(
        "latents: shape that does not fit",
        "generate model --latents z.parquet",
        "cannot reshape .*: write it again",
        parquet("z.parquet", mean=[[0.0] * 16], shape=[[2, 2, 5]]),
    ),
    Row(
        "latents: NaN",
        "generate model --latents z.npz",
        "not finite: check how they were made",
        npz(mean=np.full((1, 2, 2, 4), np.nan)),
    ),
    Row(
        "latents: infinite",
        "generate model --latents z.npz",
        "not finite: check how",
        npz(mean=np.full((1, 2, 2, 4), np.inf)),
    ),
    Row(
        "latents: beyond float32",
        "generate model --latents z.npz",
        "not finite: check",
        npz(mean=np.full((1, 2, 2, 4), 1e300)),
    ),
    Row(
        "latents: more than prompts",
        "generate model --latents z.npz --prompt a --prompt b --max-new-tokens 2",
        "3 latents do not fit 2 prompts: give one for each",
        npz(mean=np.zeros((3, 2, 2, 4))),
    ),
    Row(
        "latents: one text is the likeliest",
        "generate model --latents z.npz --greedy -n 2 --max-new-tokens 2",
        "are one text: sample, or ask for one",
        npz(mean=np.zeros((3, 2, 2, 4))),
    ),
]
