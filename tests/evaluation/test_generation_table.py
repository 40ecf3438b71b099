"""The table of generation: what it marks, and what it leaves out."""

import io

import pytest
from rich.console import Console

from latentlm.evaluation.generation_table import generation_table, notes

ROW = {
    "texts": 1000, "tokens": 50000, "token_entropy_nats": 3.2109, "repetition": 0.01, "bleu": 2.5, "self_bleu": None,
    "distinct_1": 0.5, "distinct_2": None, "distinct_3": None, "seconds": 1.0, "tokens_per_second": 50000.0,
}  # fmt: skip
SCORED = {
    "generative_exact": True, "generative_unit": "token", "generative_perplexity": 12.345,
    "generative_bits_per_byte": 1.5, "generative_tokens": 51000, "generative_empty": 3, "generative_samples": 1,
}  # fmt: skip
MAUVE = {"mauve": 0.81234, "mauve_clusters": 20, "mauve_people_texts": 200, "mauve_written_texts": 1000}


def figures(exact=False, fixed_length=False, human=True, **more):
    people = {**ROW, **{key: more[key] for key in more if "generative" in key}, "bleu": None, "seconds": None}
    rows = {"greedy": {**ROW, **more}, **({"human": people} if human else {})}
    return {"exact": exact, "fixed_length": fixed_length, "rows": rows}


def lines(found) -> dict[str, list[str]]:
    console = Console(file=io.StringIO(), width=200)
    console.print(generation_table(found))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    return {name: rest for name, *rest in filter(None, cells)}


def test_bounds_are_marked_and_what_is_missing_is_a_dash():
    found = lines(figures(**SCORED, **MAUVE))
    assert found["generative perplexity per token"] == ["= 12.35", "= 12.35"]
    assert found["texts without a token, left out"] == ["3", "3"]
    assert found["MAUVE"] == ["0.8123", "–"]
    assert found["texts of people, of the model, clusters"] == ["200, 1,000, 20", "–"]
    assert found["distinct-1, -2, -3"] == ["0.500, –, –"] * 2
    assert "self-BLEU of a prompt's texts" not in found  # of nobody
    bound = {**SCORED, "generative_exact": False, "generative_samples": 16}
    assert lines(figures(**bound))["generative perplexity per token"] == ["≤ 12.35", "≤ 12.35"]
    assert any("16 samples" in note for note in notes(figures(**bound)))


@pytest.mark.parametrize(
    "given, says",
    [
        ({}, ["Generative perplexity is left out", "MAUVE is left out"]),
        ({"human": False}, ["Generative perplexity is left out"]),
        ({"exact": True, **SCORED, **MAUVE}, ["one greedy text"]),
        ({"fixed_length": True, **SCORED, **MAUVE}, ["EOS is a token between documents"]),
        ({**SCORED, "generative_unit": "byte", "generative_perplexity": None, **MAUVE}, ["another vocabulary"]),
        ({**SCORED, **MAUVE}, []),
    ],
)
def test_notes_say_what_the_table_does_not(given, says):
    found = notes(figures(**given))
    assert len(found) == len(says)
    for note, part in zip(found, says, strict=True):
        assert part in note
