"""The first run: two models, an honest table, a plot and texts."""

import io
import json

import pytest
from rich.console import Console
from transformers import AutoModel

import latentlm
from latentlm.training import quickstart as module
from latentlm.training.recipe import parse_recipe

FILES = {"ltm", "autoregressive", "figures.json", "samples.txt", "curves.png"}


@pytest.fixture
def short(monkeypatch):
    """The recipes of the quickstart, with a few steps and texts."""
    overrides = [
        "training.max_steps=4",
        "training.eval_steps=2",
        "training.logging_steps=2",
        "training.use_cpu=true",
        "training.report_to=none",
        "data.vocab_size=300",
        "evaluation.sequences=4",
        "evaluation.iw_samples=1",
    ]

    def parse(text, name, given=()):
        own_text = any(override.startswith("data.source=") for override in given)
        return parse_recipe(text, name, [*given, *overrides, *([] if own_text else ["data.limit=300"])])

    monkeypatch.setattr(module, "parse_recipe", parse)


def printed() -> Console:
    return Console(file=io.StringIO(), width=160)


def test_everything_is_left_in_the_folder_and_shown(short, tmp_path):
    console = printed()
    result = module.quickstart(tmp_path / "first", console=console)
    assert {path.name for path in (tmp_path / "first").iterdir()} == FILES
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "first" / "figures.json").read_text())
    assert figures == result.figures
    assert figures["autoregressive"]["exact"] and not figures["ltm"]["exact"]
    assert figures["ltm"]["tokens"] == figures["autoregressive"]["tokens"]
    assert figures["ltm"]["training_tokens"] == figures["autoregressive"]["training_tokens"] > 0
    out = console.file.getvalue()
    assert f"≤ {figures['ltm']['iw_nll_per_token']:.4f}" in out
    assert f"= {figures['autoregressive']['iw_nll_per_token']:.4f}" in out
    assert (tmp_path / "first" / "samples.txt").read_text() == result.samples
    for heading in ("ltm, from the prior", "autoregressive, from the start token", "three texts from one latent (B)"):
        assert heading in result.samples
    for name in ("ltm", "autoregressive"):
        model, tokenizer = latentlm.load(tmp_path / "first" / name)
        assert isinstance(AutoModel.from_pretrained(tmp_path / "first" / name), type(model))
        assert len(tokenizer) == 300
        assert figures[name]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_it_runs_on_own_text(short, tmp_path):
    (tmp_path / "own text.txt").write_text(
        "\n".join(f"{n} comes before {n + 1}, and both after {n - 1}" for n in range(400))
    )
    console = printed()
    module.quickstart(tmp_path / "own", data=str(tmp_path / "own text.txt"), console=console)
    assert {path.name for path in (tmp_path / "own").iterdir()} == FILES
    assert (tmp_path / "own" / "ltm" / "recipe.yaml").read_text().count("own text.txt") == 1


@pytest.mark.slow
def test_it_runs_on_text_of_short_lines(short, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{n}" for n in range(2000)))
    module.quickstart(tmp_path / "list", data=str(tmp_path / "list.txt"), console=printed())


def test_too_little_text_is_named_before_training(short, tmp_path):
    (tmp_path / "tiny.txt").write_text("a b c\nd e f\n")
    with pytest.raises(latentlm.InputError):
        module.quickstart(tmp_path / "run", data=str(tmp_path / "tiny.txt"), console=printed())
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.slow
def test_it_may_be_run_again_in_the_same_folder(short, tmp_path):
    one = module.quickstart(tmp_path, console=printed())
    again = module.quickstart(tmp_path, console=printed(), seed=1)
    assert one.figures["ltm"]["elbo_nll_per_token"] != again.figures["ltm"]["elbo_nll_per_token"]
    assert json.loads((tmp_path / "figures.json").read_text()) == again.figures
