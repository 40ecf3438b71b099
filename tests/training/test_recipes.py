"""The recipes that come with the library: each reads, and each trains."""

from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest
from tests.toy import stand_ins

from latentlm.loading import load
from latentlm.training.recipe import load_recipe
from latentlm.training.run import train

REPOSITORY = Path(__file__).parents[2]
PACKAGED = Path(str(files("latentlm.training") / "recipes"))
# those in recipes/sweeps are sweeps: test_sweep.py
RECIPES = sorted([*PACKAGED.glob("*.yaml"), *(REPOSITORY / "recipes").glob("*.yaml")])
# whatever a recipe says, two steps of a tiny one
SMALL = (
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.save_strategy=no",
    "training.report_to=none",
    "training.use_cpu=true",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "model.hidden_size=32",
    "data.vocab_size=300",
    "data.limit=100",
    "evaluation.sequences=2",
    "evaluation.iw_samples=1",
)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(f"number {n} is followed by number {n + 1}" for n in range(100)), encoding="utf-8")
    return path


def test_there_are_recipes():
    assert {"quickstart-ltm", "quickstart-autoregressive"} <= {path.stem for path in PACKAGED.glob("*.yaml")}
    assert {"ltm-stories-190k", "autoregressive-stories-190k"} <= {path.stem for path in RECIPES}


def labelled_file(data, folder):
    """Texts of the stand-ins' words, with labels where a recipe's data has them."""
    labels = "A B" if data.annotations_per == "word" else "A"
    table = [["1", labels, "x", f"w{n % 20 + 3} w{n % 7 + 3}"] for n in range(100)]
    if data.column:
        file, rows = folder / "labelled.tsv", ["\t".join(row) for row in table]
    else:
        file, rows = folder / "labelled.txt", [f"{row[3]}{data.annotations}{labels}" for row in table]
    file.write_text("\n".join(rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_trains_two_steps(path, text_file, tmp_path, monkeypatch):
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    if recipe.data.annotations is not None:
        text_file = labelled_file(recipe.data, tmp_path)
    known = {f.name for f in fields(recipe.family.config_class)}
    overrides = [one for one in SMALL if not one.startswith("model.") or one[6:].partition("=")[0] in known]
    if recipe.encoder.pretraining_steps:
        overrides.append("encoder.pretraining_steps=1")
    data = recipe.data
    if not data.source.startswith("builtin:"):
        overrides.append(f"data.source={text_file}")
    if data.validation is not None and not data.validation.startswith("builtin:"):
        overrides.append(f"data.validation={text_file}")
    _, _, history = train(load_recipe(path, overrides), tmp_path / "run")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert any("eval_elbo_nll_per_token" in entry for entry in history)
    model, tokenizer = load(tmp_path / "run")
    assert len(tokenizer) == model.config.vocab_size <= 300


def pairs():
    by_name = {path.stem: path for path in RECIPES}
    for name, path in by_name.items():
        control = "autoregressive".join(name.rsplit("ltm", 1))
        if "ltm" in name and control in by_name:
            yield pytest.param(path, by_name[control], id=name)


@pytest.mark.parametrize(("path", "control"), pairs())
def test_a_model_and_its_control_share_all_but_the_latents(path, control):
    one, other = load_recipe(path), load_recipe(control)
    assert (one.data, one.training, one.evaluation) == (other.data, other.training, other.evaluation)
    shared = one.model.keys() & other.model.keys()
    memory = {key: other.model[key] for key in other.model.keys() - shared}
    differing = {key for key in shared if one.model[key] != other.model[key]}
    # an encoder's parameters stand in the control's width
    assert differing == ({"hidden_size"} if "encoder_layers" in one.model else set())
    if differing:
        vocabulary = one.data.vocab_size
        counts = [recipe.family(recipe.model_config(vocab_size=vocabulary)).num_parameters() for recipe in (one, other)]
        assert counts[1] == pytest.approx(counts[0], rel=0.002)
    # learned vectors in place of latents are as many and as wide
    if memory:
        assert memory == {
            "memory_per_layer": one.model["latents_per_layer"],
            "memory_size": one.model["latent_size"],
        }
