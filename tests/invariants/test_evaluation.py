"""What must not change an evaluation: batches, order, padding, and whether the model was saved in between."""

import json

import pytest
import torch
from tests.training.runs import run, small_recipe, trained, unchecked
from torch.utils.data import Subset
from typer.testing import CliRunner

from latentlm import load
from latentlm.cli import app
from latentlm.data.recipe import evaluation_sequences, load_corpus
from latentlm.evaluation import likelihood
from latentlm.evaluation.likelihood import evaluate, score

FIGURES = (
    "elbo_nll_per_token",
    "iw_nll_per_token",
    "iw_nll_per_sequence",
    "reconstruction_nll_per_token",
    "prior_nll_per_token",
    "kl_per_token",
    "kl_per_sequence",
    "elbo_bits_per_byte",
    "iw_bits_per_byte",
    "mutual_information",
    "mutual_information_per_batch",
    "kl_per_dimension",
    "aggregate_kl",
    "aggregate_mean_rms",
    "aggregate_variance_ratio",
)
COUNTS = ("sequences", "tokens", "bytes", "active_units", "latent_units")
COUNTS += ("mutual_information_sequences", "mutual_information_batch")


def assert_same(one, other):
    for key in FIGURES:
        assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    for key in COUNTS:
        assert one[key] == other[key], key


@pytest.fixture(scope="module", params=["ltm", "gpt_vae", "gp_vae", "autoregressive"])
def model(request):
    return load(trained(request.param))[0]


@pytest.fixture(scope="module")
def sequences():
    """Sentences of many lengths."""
    return load_corpus(small_recipe("ltm", "data.length=48").data).train


@pytest.fixture(scope="module")
def some(sequences):
    return Subset(sequences, range(24))


@pytest.fixture(scope="module")
def figures(model, some):
    return evaluate(model, some, iw_samples=3)


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_the_size_of_batches_changes_no_figure(model, some, figures, batch_size):
    assert_same(evaluate(model, some, iw_samples=3, batch_size=batch_size), figures)


def test_the_order_of_sequences_changes_no_figure(model, some, figures):
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0)).tolist()
    assert_same(evaluate(model, Subset(some, order), iw_samples=3), figures)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_figure(model, some, side):
    input_ids = some[0]["input_ids"][None]
    plain = score(model, input_ids, samples=3)
    padding = torch.full((1, 5), model.config.pad_token_id)
    mask = torch.ones_like(input_ids)
    parts = [(input_ids, mask), (padding, torch.zeros_like(padding))]
    if side == "left":
        parts.reverse()
    ids, mask = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    padded = score(model, ids, mask, samples=3)
    for name, value in plain.items():
        assert float(padded[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


@torch.no_grad()
def test_neighbours_change_no_figure(model, some):
    """A sequence alone, and beside longer ones."""
    item = min((row["input_ids"] for row in some), key=len)
    alone = score(model, item[None], samples=3)
    longer = next(other["input_ids"] for other in some if len(other["input_ids"]) > len(item))
    batch = torch.full((2, len(longer)), model.config.pad_token_id)
    batch[0, : len(item)], batch[1] = item, longer
    mask = torch.ones_like(batch)
    mask[0, len(item) :] = 0
    together = score(model, batch, mask, samples=3)
    for name, value in alone.items():
        assert float(together[name][0]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


@pytest.fixture
def more_sequences_than_information_is_told_of(monkeypatch):
    monkeypatch.setattr(likelihood, "MUTUAL_INFORMATION_SEQUENCES", 16)


def test_mutual_information_of_some_sequences_does_not_depend_on_batches(
    some, more_sequences_than_information_is_told_of
):
    model = load(trained("ltm"))[0]
    one, other = (evaluate(model, some, iw_samples=1, batch_size=size) for size in (7, 24))
    assert one["mutual_information_sequences"] == 16
    assert_same(one, other)


def test_mutual_information_of_some_sequences_does_not_depend_on_their_order(
    some, more_sequences_than_information_is_told_of
):
    model = load(trained("ltm"))[0]
    one, other = (evaluate(model, Subset(some, list(range(24))[::step]), iw_samples=1) for step in (1, -1))
    assert_same(one, other)


def test_the_seed_changes_the_noise_and_nothing_else(model, some, figures):
    other = evaluate(model, some, iw_samples=3, seed=1)
    if model.exact:
        assert_same(other, figures)
    else:
        assert other["elbo_nll_per_token"] != figures["elbo_nll_per_token"]
        assert other["elbo_nll_per_token"] == pytest.approx(figures["elbo_nll_per_token"], rel=0.01)


def test_evaluation_leaves_model_and_random_state_as_they_were(model, some):
    model.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, some, iw_samples=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.eval()


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_evaluate_on_the_command_line_is_evaluate_of_the_model_in_memory(tmp_path, family):
    trained_now = run(tmp_path / "run", family=family)
    in_memory = evaluate(trained_now.model, trained_now.corpus.validation, iw_samples=3)
    command = ["evaluate", str(tmp_path / "run"), "--iw-samples", "3", "--json", str(tmp_path / "figures.json")]
    with unchecked():
        assert CliRunner().invoke(app, command).exit_code == 0
    on_the_command_line = json.loads((tmp_path / "figures.json").read_text())
    assert_same(on_the_command_line, in_memory)
    assert on_the_command_line["parameters"] == in_memory["parameters"]


def test_a_saved_model_is_evaluated_on_its_own_validation_text(tmp_path):
    """Without --data: the split of the recipe, none of which was trained on."""
    corpus = load_corpus(small_recipe("ltm").data)
    folder = trained("ltm")
    tokenizer = load(folder)[1]
    sequences = evaluation_sequences(folder, tokenizer, 48)

    def texts(dataset):
        return [tokenizer.decode(dataset[index]["input_ids"][1:]) for index in range(len(dataset))]

    assert texts(sequences) == texts(corpus.validation)
    assert not set(texts(sequences)) & set(texts(corpus.train))
