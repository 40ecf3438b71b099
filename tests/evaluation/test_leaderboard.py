"""The leaderboard against hand-made figures: what is read, merged, ranked, compared, and how names are shown."""

import io
import json
import math
import statistics

import pytest
from rich.console import Console
from scipy.stats import ttest_rel
from tests.command import assert_one_sentence, run
from tests.training.runs import unchecked

from latentlm.errors import InputError
from latentlm.evaluation.leaderboard import leaderboard
from latentlm.evaluation.leaderboard_page import LEGEND, grid, markdown, page, plot, save, tables

BYTES, TOKENS = 4000, 1000


def scored(nll=2.0, *, elbo=None, exact=False, tokens=TOKENS, num_bytes=BYTES, **others):
    """Figures as of `evaluate`, of a model with these nats per token."""
    elbo = nll if elbo is None else elbo
    per_byte = tokens / num_bytes / math.log(2)
    return {
        "sequences": 20,
        "tokens": tokens,
        "bytes": num_bytes,
        "parameters": 5000,
        "trained_parameters": 5000,
        "exact": exact,
        "conditional": False,
        "elbo_nll_per_token": elbo,
        "iw_nll_per_token": nll,
        "iw_samples": 1 if exact else 16,
        "kl_per_sequence": 0.0 if exact else 3.0,
        "elbo_bits_per_byte": elbo * per_byte,
        "iw_bits_per_byte": nll * per_byte,
        "active_units": 0 if exact else 12,
        "latent_units": 0 if exact else 16,
        "protocol": "honest",
        "kl_per_dimension": [0.5, 0.25],
    } | others


def of_sweep(run, seed, nll, study="s", evaluation="", settings=None, **others):
    row = {"study": study, "run": run, "evaluation": evaluation, "seed": seed}
    return row | {"settings": {"training.seed": seed, "model.x": run, **(settings or {})}} | scored(nll, **others)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def board(write):
    """Of files that hold these contents, one each."""
    return lambda *contents: leaderboard([write(f"{place}.json", one) for place, one in enumerate(contents)])


def rows(board):
    [section] = board.sections
    return section.rows


def cells(board, head):
    [section] = board.sections
    heads, lines, _ = grid(section)
    return [line[heads.index(head)] for line in lines]


# ---- seeds -----------------------------------------------------------------------------------------------------------

OWN, CONTROL = {0: 1.90, 1: 1.95, 2: 1.97}, {0: 2.00, 1: 2.02, 2: 2.10}


def sweep_of_three():
    own = [of_sweep("ltm", seed, nll, elbo=nll + 0.01) for seed, nll in OWN.items()]
    return own + [of_sweep("ctl", seed, nll, exact=True) for seed, nll in CONTROL.items()]


def test_rows_that_differ_in_the_seed_alone_are_mean_and_deviation(board):
    control, ltm = rows(board(sweep_of_three()))
    assert (control.name, control.seeds, ltm.name, ltm.seeds) == ("ctl", 3, "ltm", 3)
    assert ltm.figures["iw_nll_per_token"] == pytest.approx(statistics.fmean(OWN.values()), abs=1e-12)
    assert ltm.spread["iw_nll_per_token"] == pytest.approx(statistics.stdev(OWN.values()), abs=1e-12)
    assert ltm.spread["tokens"] == 0


def test_seeds_in_common_are_tested_in_pairs(board):
    against = rows(board(sweep_of_three()))[1].against
    scale = TOKENS / BYTES / math.log(2)
    expected = ttest_rel(list(OWN.values()), list(CONTROL.values()))
    assert against.paired.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert against.paired.n == 3
    assert against.difference == pytest.approx(scale * (sum(OWN.values()) - sum(CONTROL.values())) / 3, abs=1e-12)
    assert against.paired.difference == pytest.approx(against.difference, abs=1e-12)
    assert cells(board(sweep_of_three()), "p (seeds)")[1] == f"{expected.pvalue:.2g} (3)"


def test_the_order_of_seeds_in_the_file_is_nothing(board):
    mixed = sweep_of_three()
    mixed = mixed[4:] + mixed[:4][::-1]
    assert rows(board(mixed))[1].against == rows(board(sweep_of_three()))[1].against


@pytest.mark.parametrize(("common", "expected"), [(0, None), (1, None), (2, 2), (3, 3)])
def test_as_many_pairs_as_both_have(board, common, expected):
    own = [of_sweep("ltm", seed, 1.9 + seed / 100) for seed in range(3)]
    control = [of_sweep("ctl", seed + 3 - common, 2.0 + seed / 50, exact=True) for seed in range(3)]
    made = board(own + control)
    test = rows(made)[1].against.paired
    assert (None if test is None else test.n) == expected
    if expected == 2:
        assert test.p is None and cells(made, "p (seeds)")[1] == "– (2)"


def test_other_settings_are_another_row(board):
    changed = [of_sweep("ltm", seed, 1.5, settings={"model.x": "ltm", "model.y": 3}) for seed in (3, 4)]
    found = rows(board(sweep_of_three() + changed))
    assert sorted((row.name, row.seeds) for row in found) == [("ctl", 3), ("ltm", 3), ("ltm (y=3)", 2)]


def test_other_samples_of_the_bound_are_another_row(board):
    found = rows(board(scored(1.9, model="runs/a"), scored(1.8, model="runs/a", iw_samples=64)))
    assert [row.name for row in found] == ["a (iw_samples=64)", "a (iw_samples=16)"]


def test_the_noise_of_scoring_is_no_seed_of_training(board):
    noisy = [scored(nll, model="runs/ltm", seed=seed) for seed, nll in enumerate((1.9, 1.91, 1.92))]
    control = [scored(2.0, model="runs/ctl", exact=True, seed=seed) for seed in range(3)]
    made = board(*noisy, *control)
    ltm = rows(made)[1]
    assert (ltm.seeds, ltm.noises, ltm.against.paired) == (1, 3, None)
    assert ltm.spread["iw_nll_per_token"] == pytest.approx(statistics.stdev((1.9, 1.91, 1.92)), abs=1e-12)
    assert cells(made, "seeds") == ["1", "1, of 3 noises"]
    assert any("1 seed:" in remark for remark in made.sections[0].remarks())


def test_seeds_of_noise_do_not_pair(board):
    """Without a recipe it is not known which training of the one goes with which of the other."""

    def three(nll, **others):
        return [scored(nll + s / 10, seed=s, training_seconds=5.0 + s, **others) for s in range(3)]

    made = board(*three(1.9, model="a"), *three(2.0, model="c", exact=True))
    assert [(row.seeds, row.noises) for row in rows(made)] == [(3, 1), (3, 1)]
    assert rows(made)[1].against.paired is None


def test_a_bound_is_never_averaged_with_a_likelihood(board):
    two = [scored(2.0, model="a", exact=True, seed=0), scored(1.9, model="a", iw_samples=1, seed=1)]
    assert [row.exact for row in rows(board(*two))] == [True, False]


def test_models_trained_by_one_recipe_are_seeds_of_one_row(write, tmp_path):
    """evaluate --json of runs/ltm-seed0 and so on, whose recipes lie beside the models."""
    for seed, nll in OWN.items():
        write(f"runs/ltm-seed{seed}/recipe.yaml", f"model: {{family: ltm}}\ntraining:\n  seed: {seed}\n")
        write(f"runs/f{seed}.json", scored(nll, model=str(tmp_path / f"runs/ltm-seed{seed}"), seed=7))
    [row] = rows(leaderboard([tmp_path]))
    assert (row.name, row.family, row.seeds, row.noises) == ("ltm", "LTM", 3, 1)
    assert set(row.bits_by_seed) == {0, 1, 2}


def test_a_name_trained_anew_is_not_a_seed_of_the_old_one(board):
    found = rows(board(*(scored(n, model="runs/a", seed=0, training_seconds=s) for n, s in ((2.0, 5.0), (1.9, 6.0)))))
    assert [row.seeds for row in found] == [1, 1] and len({row.name for row in found}) == 2


# ---- once ------------------------------------------------------------------------------------------------------------


def test_the_same_figures_count_once(write, tmp_path):
    file = write("a.json", sweep_of_three())
    assert [row.seeds for row in rows(leaderboard([file, tmp_path, file, tmp_path / "." / "a.json"]))] == [3, 3]


def test_a_sweep_s_json_beside_its_folder_counts_once_under_its_names(write, tmp_path):
    of_sweep_file = [{**row, "seconds": 1.5 + place} for place, row in enumerate(sweep_of_three())]
    write("sweep.json", of_sweep_file)
    for place, row in enumerate(of_sweep_file):
        figures = {key: row[key] for key in (*scored(), "seconds")} | {"training_flops": 1e9}
        write(f"run{place}/recipe.yaml", f"model:\n  family: ltm\ntraining:\n  seed: {row['seed']}\n")
        write(f"run{place}/scores.json", {'[{}, {"iw_samples": 16}]': figures})
    control, ltm = rows(leaderboard([tmp_path / f"run{place}" for place in range(6)] + [tmp_path / "sweep.json"]))
    assert (control.name, control.seeds, ltm.name, ltm.seeds) == ("ctl", 3, "ltm", 3)
    assert ltm.model is not None and ltm.figures["training_flops"] == 1e9  # of the folder


def test_scored_again_by_the_same_noise_counts_once(board):
    again = [scored(1.9, model="a", seed=0, seconds=seconds) for seconds in (1.0, 2.0)]
    [row] = rows(board(*again))
    assert (row.seeds, row.noises) == (1, 1)


def test_a_recipe_trained_twice_by_one_seed_is_no_second_seed(write, tmp_path):
    for place in (0, 1):
        write(f"m{place}/recipe.yaml", "training: {seed: 3}")
        write(f"f{place}.json", scored(1.9 + place, model=str(tmp_path / f"m{place}"), training_seconds=5.0 + place))
    assert [(row.seeds, row.noises) for row in rows(leaderboard([tmp_path]))] == [(1, 1), (1, 1)]


def test_other_models_of_the_same_figures_are_other_rows(board):
    """Such as two that ignore their latents, or figures that were rounded by hand."""
    assert len(rows(board(scored(1.9, model="a"), scored(1.9, model="b")))) == 2
    two = [scored(1.9, model=model, seconds=seconds) for model, seconds in (("a", 1.0), ("b", 2.0))]
    assert len(rows(board(*two))) == 2


def test_a_control_of_two_studies_is_one_row(board):
    again = [{**row, "study": "other"} for row in sweep_of_three()]
    assert [row.seeds for row in rows(board(sweep_of_three() + again))] == [3, 3]


def test_a_folder_of_runs(write, tmp_path):
    """What a sweep leaves, with what is to be passed over; seeds come from the recipes, names from the folders."""
    for seed, nll in OWN.items():
        folder = f"out/ltm_beta=2_seed={seed}_0123456789"
        write(f"{folder}/recipe.yaml", f"model:\n  family: ltm\n  beta: 2\ntraining:\n  seed: {seed}\n")
        write(f"{folder}/scores.json", {'[{"inference_steps": 4}, {"iw_samples": 16}]': scored(nll)})
        write(f"{folder}/config.json", "half of {")
        write(f"{folder}/history.json", [{"step": 1}])
        write(f"{folder}/tokenizer_config.json", {})
        write(f"{folder}/checkpoint-5/any.json", "{")
    write("out/probe.json", {"probe": "clusters"})
    (tmp_path / "out" / "loop").symlink_to(tmp_path / "out")
    [row] = rows(leaderboard([tmp_path / "out"]))
    assert (row.name, row.seeds, row.family) == ("ltm_beta=2, inference_steps=4", 3, "LTM")


def test_figures_of_the_quickstart(write):
    file = write("figures.json", {"ltm": scored(2.1), "autoregressive": scored(2.0, exact=True)})
    assert [row.name for row in rows(leaderboard([file]))] == ["autoregressive", "ltm"]


# ---- families --------------------------------------------------------------------------------------------------------


def test_where_a_family_is_known_from(write, tmp_path):
    write("m/config.json", {"model_type": "latentlm_ltm"})
    write("told.json", scored(1.0, family="Mine", model=str(tmp_path / "m")))
    write("beside.json", scored(1.1, model=str(tmp_path / "m"), iw_samples=8))
    write("latents.json", scored(1.2))
    write("exact.json", scored(1.3, exact=True))
    found = {row.figures["iw_nll_per_token"]: row.family for row in rows(leaderboard([tmp_path]))}
    assert found == {1.0: "Mine", 1.1: "LTM", 1.2: "with latents", 1.3: "without latents"}


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_the_best_exact_model_is_the_control_and_stands_first(board):
    made = board(
        scored(2.2, exact=True, model="worse"),
        scored(1.8, model="best"),
        scored(2.0, exact=True, model="control"),
        scored(2.1, model="behind"),
    )
    assert [(row.name, row.rank) for row in rows(made)] == [("control", 2), ("best", 1), ("behind", 3), ("worse", 4)]
    assert [row.is_control for row in rows(made)] == [True, False, False, False]
    assert cells(made, "beats the control") == ["is the control", "by ELBO", "no", "no"]


@pytest.mark.parametrize(
    ("elbo", "nll", "beats"),
    [
        (1.99, 1.98, "by ELBO"),
        (2.01, 1.99, "by IW only"),
        (2.00, 1.99, "by IW only"),
        (2.00, 2.00, "no"),
        (2.02, 2.01, "no"),
        (math.nan, 1.99, "by IW only"),
        (math.nan, math.nan, "no"),
    ],
)
def test_what_beats_the_control(board, elbo, nll, beats):
    made = board(scored(2.0, exact=True, model="control"), scored(nll, elbo=elbo, model="a"))
    assert rows(made)[1].against.beats == beats


def test_differences_are_own_less_the_control_s(board):
    made = board(scored(2.0, exact=True, model="control"), scored(1.9, model="a"), scored(2.1, model="b"))
    _, better, worse = rows(made)
    assert better.against.difference == pytest.approx(-0.1 * TOKENS / BYTES / math.log(2))
    assert better.against.perplexity_change == pytest.approx(math.exp(1.9) / math.exp(2.0) - 1)
    assert worse.against.difference > 0 and worse.against.perplexity_change > 0
    assert cells(made, "Δ perplexity")[1:] == ["-9.52%", "+10.52%"]


def test_other_tokens_compare_by_bytes_alone(board):
    """A model of half the tokens has more nats a token, and fewer bits a byte."""
    made = board(scored(2.0, exact=True, model="control"), scored(3.8, tokens=TOKENS // 2, model="a"))
    _, row = rows(made)
    assert row.rank == 1 and row.against.beats == "by ELBO" and row.against.perplexity_change is None
    assert any("different tokens" in remark for remark in made.sections[0].remarks())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_first(board, wrong):
    made = board(
        scored(wrong, exact=True, model="broken"), scored(2.0, model="a"), scored(2.1, exact=True, model="control")
    )
    assert [(row.name, row.rank) for row in rows(made)] == [("control", 2), ("a", 1), ("broken", None)]
    assert cells(made, "bits/byte by IW")[2] == "–" and cells(made, "rank")[2] == "–"
    assert cells(made, "Δ bits/byte")[2] == cells(made, "Δ perplexity")[2] == "–"
    assert "NaN" not in json.dumps(made.json()) and "Infinity" not in json.dumps(made.json())
    assert plot(made).axes


def test_nothing_but_what_is_not_finite(board):
    made = board(scored(math.nan, exact=True, model="a"), scored(math.nan, model="b"))
    assert made.sections[0].control is None and plot(made).axes


# ---- sections --------------------------------------------------------------------------------------------------------


def test_only_the_same_text_compares(board):
    made = board(
        scored(2.0, exact=True, model="c"),
        scored(1.0, model="other text", num_bytes=BYTES + 1),
        scored(1.1, model="given labels", conditional=True),
    )
    assert len(made.sections) == 3
    for section in made.sections[1:]:
        assert section.control is None and section.rows[0].against is None
        assert any("No exact control" in remark for remark in section.remarks())
        assert "beats the control" not in grid(section)[0]
    assert "p(x | c)" in made.sections[2].title


def test_the_name_of_the_text(board):
    """One file is called in several ways; without a name, as many bytes are the one text that has them."""
    one = board(scored(2.0, model="a", data="x/valid.txt"), scored(1.9, model="b", data="valid.txt"), scored(1.8))
    assert [section.data for section in one.sections] == ["valid.txt"]
    two = board(scored(2.0, model="a", data="a.txt"), scored(1.9, model="b", data="b.txt"), scored(1.8))
    assert [section.data for section in two.sections] == ["a.txt", "b.txt", None]


def test_each_set_of_zero_shot_is_a_section(board):
    def zero(model, **sets):
        return {"task": "zero-shot", "model": model, "family": "LTM", "sets": sets, "seed": 0}

    made = board(
        zero("a", ptb=scored(2.0, num_bytes=50), lambada=scored(1.9, num_bytes=60)),
        zero("b", ptb=scored(2.1, num_bytes=50, exact=True)),
    )
    assert [(one.data, [row.name for row in one.rows]) for one in made.sections] == [
        ("ptb", ["b", "a"]),
        ("lambada", ["a"]),
    ]


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, True),
        ({"data.unit": "blocks"}, True),
        ({"data.unit": "sentences"}, False),
        ({"data.unit": "sentences", "model.length_model": "none"}, True),
        ({"model.length_model": "categorical"}, False),
    ],
)
def test_who_is_given_the_length_is_told(board, settings, told):
    [section] = board([of_sweep("gp", 0, 2.0, settings=settings, family="GPVAE")]).sections
    assert any("given that of a text" in remark for remark in section.remarks()) == told


def test_columns_say_what_a_figure_is(board):
    made = board(
        scored(2.0, exact=True, model="c", training_flops=1.2e15),
        scored(1.9, elbo=1.95, model="a", trained_parameters=40, training_tokens=12345, training_flops=None),
    )
    assert cells(made, "NLL by IW, nats/token") == ["= 2.0000", "≤ 1.9000"]
    assert cells(made, "NLL by ELBO, nats/token") == ["= 2.0000", "≤ 1.9500"]
    assert cells(made, "active units") == ["–", "12 of 16"]
    assert cells(made, "KL, nats/seq.") == ["–", "3.00"]
    assert cells(made, "of which train") == ["–", "40"]
    assert cells(made, "training FLOPs") == ["1.20e+15", "–"]
    assert cells(made, "training tokens") == ["–", "12,345"]


def test_columns_in_which_nothing_stands_are_left_out(board):
    heads = grid(board(scored(2.0, exact=True, model="c")).sections[0])[0]
    for head in (
        "K",
        "training FLOPs",
        "KL, nats/seq.",
        "p (seeds)",
        "MAUVE, completions",
        "distinct-2 of prior samples",
    ):
        assert head not in heads


def completions(model, mauve=0.5, **others):
    sampled, greedy = {"mauve": mauve, "distinct_2": 0.7}, {"mauve": 0.9, "distinct_2": 0.1}
    return {"task": "completions", "model": model, "rows": {"greedy": greedy, "sampled": sampled}, **others}


def test_figures_of_texts_stand_in_the_row_of_their_model(board):
    made = board(scored(2.0, model="runs/a"), scored(1.9, model="runs/b"), completions("runs/./a/", each=5))
    assert cells(made, "MAUVE, completions") == ["–", "0.500"]
    assert cells(made, "distinct-2, completions") == ["–", "0.700"]
    assert made.notes() == []


@pytest.mark.parametrize(("exact", "sign"), [(True, "="), (False, "≤")])
def test_a_generative_figure_says_whether_it_is_a_bound(board, exact, sign):
    told = completions("runs/a")
    told["rows"]["sampled"] |= {"generative_bits_per_byte": 1.5, "generative_exact": exact}
    made = board(scored(2.0, model="runs/a"), told)
    assert cells(made, "generative bits/byte, completions") == [f"{sign} 1.500"]


def test_figures_that_are_in_no_row_are_told(board):
    calibration = {"task": "calibration", "model": "runs/a", "ece": 0.1}
    made = board(scored(2.0, model="runs/a"), completions("runs/b"), calibration)
    assert [note.startswith("Not shown: ") for note in made.notes()] == [True, True]
    assert "runs/b" in made.notes()[0] and "calibration" in made.notes()[1]
    assert all(note in page(made, b"") for note in made.notes())


def test_texts_that_were_measured_otherwise_are_told(board):
    two = [scored(2.0, model="a"), scored(1.9, model="b")]
    alike = board(*two, completions("a", scorer="g", seed=0), completions("b", scorer="g", seed=1))
    assert alike.notes() == []
    [note] = board(*two, completions("a", scorer="g"), completions("b", scorer="h")).notes()
    assert "scorer" in note and "do not compare" in note


# ---- what cannot be used ---------------------------------------------------------------------------------------------

DAMAGED = [
    ("half.json", json.dumps(scored(2.0))[:90], "half.json is damaged"),
    ("empty.json", "", "empty.json is damaged"),
    ("deep.json", "[" * 100_000, "deep.json is damaged"),
    ("other.json", {"a": 1}, "other.json is no evaluation"),
    ("list.json", [1, 2], "list.json is no evaluation"),
    ("nothing.json", [], "nothing.json is no evaluation"),
    ("number.json", "3", "number.json is no evaluation"),
    ("own.json", {"task": "leaderboard", "sections": []}, "own.json is no evaluation"),
    ("word.json", scored(2.0, iw_bits_per_byte="low"), "iw_bits_per_byte must be a number, not 'low'"),
    ("truth.json", scored(2.0, tokens=True), "tokens must be a number, not True"),
    ("null.json", scored(2.0) | {"elbo_bits_per_byte": None}, "elbo_bits_per_byte must be a number, not None"),
    ("lacks.json", {k: v for k, v in scored().items() if k != "bytes"}, "lacks.json lacks bytes"),
    ("zero.json", scored(2.0) | {"bytes": 0}, "bytes must be a whole number above 0, not 0"),
    ("infinite.json", scored(2.0) | {"bytes": math.inf}, "bytes must be a whole number above 0, not inf"),
    ("half.json", scored(2.0) | {"bytes": 4000.5}, "bytes must be a whole number above 0, not 4000.5"),
    ("below.json", scored(-2.0), "elbo_bits_per_byte is -"),
    ("apart.json", scored(2.0, iw_bits_per_byte=0.1), "iw_bits_per_byte is 0.1, and its nats per token make "),
    ("exact.json", scored(2.0) | {"exact": 1}, "exact must be true or false, not 1"),
    ("flops.json", scored(2.0, training_flops="1e15"), "training_flops must be a number"),
    ("model.json", scored(2.0, model=3), "model must be a name, not 3"),
    ("data.json", scored(2.0, data=["a"]), "data must be a name"),
    ("settings.json", scored(2.0, settings="T=1"), "settings must be a list"),
    ("seed.json", scored(2.0, seed="1"), "seed must be a whole number"),
    ("mauve.json", completions("a", mauve="high"), "there is no likelihood among these figures"),
]


@pytest.mark.parametrize(("name", "content", "says"), DAMAGED, ids=[name for name, *_ in DAMAGED])
def test_a_file_that_cannot_be_used_is_named(write, name, content, says):
    with pytest.raises(InputError, match=says):
        leaderboard([write(name, content)])


def test_a_figure_of_texts_that_is_no_number(board):
    with pytest.raises(InputError, match="mauve must be a number, not 'high'"):
        board(scored(2.0, model="a"), completions("a", mauve="high"))


def test_a_damaged_file_in_a_folder_is_named(write, tmp_path):
    write("good.json", scored(2.0))
    write("below/scores.json", '{"[{}, {}]": {"exact"')
    with pytest.raises(InputError, match=r"scores\.json is damaged"):
        leaderboard([tmp_path])


def test_a_folder_without_figures_and_a_file_that_is_missing(write, tmp_path):
    write("other.json", {"a": 1})
    write("scores.json", {})
    with pytest.raises(InputError, match="holds no figures"):
        leaderboard([tmp_path])
    with pytest.raises(InputError, match=r"missing\.json cannot be read"):
        leaderboard([tmp_path / "missing.json"])


def test_a_file_that_is_no_evaluation_is_told_by_its_name_even_where_its_folder_is_read(write, tmp_path):
    write("good.json", scored(2.0))
    other = write("other.json", {"a": 1})
    assert leaderboard([tmp_path]).sections
    for paths in ([tmp_path, other], [other, tmp_path]):
        with pytest.raises(InputError, match=r"other\.json is no evaluation"):
            leaderboard(paths)


def test_scores_of_a_run_that_are_none(write, tmp_path):
    write("run/scores.json", {"[{}, {}]": {"exact": True}})
    with pytest.raises(InputError, match=r"scores\.json is no scores"):
        leaderboard([tmp_path])


def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(InputError, match=r"loop\.json cannot be read"):
        leaderboard([tmp_path / "loop.json"])


def test_a_number_that_no_float_holds(board):
    made = board(scored(2.0, model="a", parameters=10**400), scored(1.9, model="b"))
    assert cells(made, "parameters") == ["5,000", "–"]


# ---- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "a | b",
    "<script>alert(1)</script>",
    "[bold]x[/] [/]",
    "[a](http://x)",
    "*a* _b_ `c` $d$ \\",
    "é 語 \U0001f600",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(board, name):
    made = board([of_sweep(name, 0, 2.0), of_sweep("ctl", 0, 2.1, exact=True)])
    console = Console(width=300, file=io.StringIO())
    for table in tables(made):
        console.print(table)
    assert name in console.file.getvalue()
    written = markdown(made)
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<script>" not in written and "[a](" not in written
    html = page(made, b"")
    assert "<script" not in html and html.count("<tr") == 3 and html.count("<tr class=") == 1
    assert plot(made).axes


@pytest.mark.parametrize(("width", "most", "kept"), [(250, 18, 17), (120, 10, 6), (60, 5, 4)])
def test_a_narrow_terminal_has_fewer_columns_and_whole_figures(board, width, most, kept):
    made = board([{**row, "training_seconds": 5.0, "training_tokens": 900} for row in sweep_of_three()])
    [table] = tables(made, width)
    heads = [str(column.header) for column in table.columns]
    assert kept <= len(heads) <= most
    assert {"rank", "model", "bits/byte by IW", "beats the control"} <= set(heads)
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text and cells(made, "bits/byte by IW")[1] in text and "by ELBO" in text


def test_markdown_is_read_as_the_name(board):
    """What CommonMark makes of the escapes, by hand."""
    made = board([of_sweep("a_b _c_ <d> [e] *f* | g", 0, 2.0)])
    assert r"| 1 | a_b \_c\_ &lt;d&gt; \[e\] \*f\* \| g |" in markdown(made)


def test_what_would_move_a_cursor_is_left_out(board):
    made = board([of_sweep("a\x1b[31m\r\nb\ud800", 0, 2.0)])
    [row] = rows(made)
    assert row.name == "a [31m  b"
    page(made, b"").encode()


def test_runs_whose_names_are_alike_are_told_apart(board):
    made = board([of_sweep("x", 0, 2.0, settings={"model.x": "x", "model.y": y}) for y in (1, 2, None)])
    assert {row.name for row in rows(made)} == {"x (y=1)", "x (y=2)", "x (y=null)"}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_files(board, tmp_path):
    made = board(sweep_of_three())
    written = save(made, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["leaderboard.md", "leaderboard.html", "leaderboard.png"]
    text, html, picture = (path.read_bytes() for path in written)
    assert picture.startswith(b"\x89PNG")
    for line in LEGEND:
        assert line in text.decode()
    html = html.decode()
    assert "http" not in html and "<script" not in html and "data:image/png;base64," in html
    assert html.index('<tr class="marked">') < html.index("ctl") < html.index(">ltm<")


def test_the_picture_has_every_bound_and_the_control_s_line(board):
    made = board([of_sweep("ltm", s, 1.9 + s / 10, elbo=2.0 + s / 10, training_tokens=10) for s in (0, 1)]
                 + [of_sweep("ctl", 0, 2.05, exact=True, training_tokens=1000)])  # fmt: skip
    [panel] = plot(made).axes
    places = {
        (round(float(x), 6), round(float(y), 6)) for line in panel.lines for x, y in zip(*line.get_data(), strict=True)
    }
    scale = TOKENS / BYTES / math.log(2)
    for x, nll in ((10, 1.95), (10, 2.05), (1000, 2.05)):
        assert (x, round(nll * scale, 6)) in places
    level = [line for line in panel.lines if line.get_label() == "control, the line to beat"]
    assert len(level) == 1 and list(level[0].get_ydata()) == pytest.approx([2.05 * scale] * 2)
    assert panel.get_xlabel() == "training tokens" and panel.get_xscale() == "log"
    low, high = panel.get_ylim()
    deviation = statistics.stdev((2.0, 2.1))
    assert low < (1.95 - deviation) * scale and (2.05 + deviation) * scale < high
    left, right = panel.get_xlim()
    assert left < 10 and right > 1000


@pytest.mark.parametrize(
    ("costs", "label"),
    [
        (({"training_flops": 1e9}, {"training_flops": 2e9}), "training FLOPs"),
        (({"training_flops": 1e9, "training_tokens": 5}, {"training_tokens": 9}), "training tokens"),
        (({"training_tokens": 5}, {"training_tokens": 0}), "rank"),
        (({"training_tokens": 500}, {"training_tokens": 500}), "rank (each row: 500 training tokens)"),
        (({}, {}), "rank"),
    ],
)
def test_the_cost_that_all_rows_know(board, costs, label):
    made = board(scored(2.0, exact=True, model="c", **costs[0]), scored(1.9, model="a", **costs[1]))
    assert plot(made).axes[0].get_xlabel() == label


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchecked():
        yield run


def test_the_command(command, write, tmp_path):
    write("sweep.json", sweep_of_three())
    write("other.json", scored(1.5, model="runs/[a]", num_bytes=77))
    status, out, err = command("leaderboard", "sweep.json", "other.json", "--json", "board.json")
    assert (status, err) == (0, "")
    assert (
        "ltm" in out
        and "[a]" in out
        and "by ELBO" in out
        and "all columns are in runs/leaderboard: leaderboard.md" in out
    )
    assert {path.name for path in (tmp_path / "runs/leaderboard").iterdir()} == {
        f"leaderboard.{kind}" for kind in ("md", "html", "png")
    }
    content = json.loads((tmp_path / "board.json").read_text())
    assert content["task"] == "leaderboard"
    control, ltm = content["sections"][0]["rows"]
    assert control["control"] and control["rank"] == 2 and "beats_control" not in control
    assert ltm["beats_control"] == "by ELBO" and ltm["paired_seeds"] == 3 and ltm["seeds"] == 3
    assert ltm["iw_nll_per_token"] == pytest.approx(statistics.fmean(OWN.values()))
    # a second time, with its own output among the runs
    assert command("leaderboard", ".", "--json", "board.json")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "RUNS"),
        ("missing.json", "missing.json cannot be read"),
        ("half.json", "half.json is damaged"),
        ("empty", "empty holds no figures"),
        ("good.json --json missing/x.json", "the folder missing does not exist"),
        ("good.json --output half.json", "half.json cannot be made a folder"),
    ],
)
def test_mistakes(command, write, tmp_path, arguments, says):
    write("good.json", scored(2.0, model="a"))
    write("half.json", '{"exact": tr')
    (tmp_path / "empty").mkdir()
    status, _, err = command("leaderboard", *arguments.split())
    assert_one_sentence(status, err)
    assert status == 2 and says in err
    assert not (tmp_path / "runs").exists()


def test_help_has_an_example(command):
    status, out, _ = command("leaderboard", "--help")
    assert status == 0 and "Example: latentlm leaderboard " in " ".join(out.split()) and "--json" in out
