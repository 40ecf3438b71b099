"""Tables of studies hold what rows say, and every kind of plot is a picture."""

import io

import pytest
from rich.console import Console

from latentlm.evaluation.comparison import Paired
from latentlm.evaluation.studies import study_curves, study_markdown, study_plots, study_table

FIGURES = {
    "parameters": 12345,
    "elbo_nll_per_token": 2.34567,
    "iw_nll_per_token": 2.23456,
    "prior_nll_per_token": 3.45678,
    "reconstruction_nll_per_token": 1.11111,
    "kl_per_sequence": 4.5678,
    "active_units": 7,
    "mutual_information": 0.789,
    "inference_seconds": 1.234,
    "training_seconds": 100.0,
}


def row(run="LTM", evaluation="", *, exact=False, seeds=1, spread=None, settings=None, line=None, **figures):
    return {"study": "s", "line": line or run, "run": run, "evaluation": evaluation, "seed": 0, "exact": exact,
            "seeds": seeds, "spread": spread or {}, "settings": settings or {}, **FIGURES, **figures}  # fmt: skip


def printed(rows, name="a study") -> str:
    console = Console(width=250, file=io.StringIO())
    console.print(study_table(name, rows))
    return console.file.getvalue()


def cells(text, run):
    line = next(line for line in text.splitlines() if run in line and "│" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def heads(text):
    line = next(line for line in text.splitlines() if "ELBO" in line)
    return [cell.strip() for cell in line.strip("┃").split("┃")]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_holds_the_figures_of_each_run():
    text = printed([row("T=4"), row("T=16", elbo_nll_per_token=1.5)])
    assert "a study (1 seed)" in text
    assert dict(zip(heads(text), cells(text, "T=4"), strict=True)) == {
        "run": "T=4", "parameters": "12,345", "ELBO": "2.3457", "IW": "2.2346", "prior z": "3.4568",
        "reconstr.": "1.1111", "KL": "4.57", "AU": "7", "MI": "0.79", "train s": "100", "infer s": "1.23",
    }  # fmt: skip
    assert "1.5000" in cells(text, "T=16")


def test_an_exact_row_is_marked_and_has_nothing_of_latents():
    text = printed([row(), row("control", exact=True, iw_nll_per_token=2.0, elbo_nll_per_token=2.0)])
    found = dict(zip(heads(text), cells(text, "control"), strict=True))
    assert found["ELBO"] == found["IW"] == "= 2.0000"
    assert {found[head] for head in ("prior z", "reconstr.", "KL", "AU", "MI", "infer s")} == {"–"}
    assert "=" not in "".join(cells(text, "LTM"))


def test_columns_that_no_row_fills_are_left_out():
    assert heads(printed([row("control", exact=True)])) == ["run", "parameters", "ELBO", "IW", "train s"]
    more = {"published_perplexity": 9.876, "continuation_nll_per_token": 1.0, "distinct_2": 0.5}
    text = printed([row(), row("more", **more, active_units=None)])
    found = dict(zip(heads(text), cells(text, "more"), strict=True))
    assert (found["published PPL"], found["continuation"], found["distinct-2"]) == ("9.88", "1.0000", "0.500")
    assert found["AU"] == "–"
    assert dict(zip(heads(text), cells(text, "LTM"), strict=True))["continuation"] == "–"


def test_seeds_are_mean_and_deviation():
    spread = {"elbo_nll_per_token": 0.01234, "parameters": 0.0}
    text = printed([row(seeds=3, spread=spread), row("control", exact=True, seeds=3, spread=spread)])
    assert "(3 seeds)" in text
    found = dict(zip(heads(text), cells(text, "LTM"), strict=True))
    assert (found["ELBO"], found["IW"], found["parameters"]) == ("2.3457 ± 0.0123", "2.2346", "12,345")
    assert "= 2.3457 ± 0.0123" in cells(text, "control")


def test_a_table_says_when_runs_have_different_numbers_of_seeds():
    assert "(2 or 3 seeds)" in printed([row(seeds=3), row("b", seeds=2)])


def test_evaluations_have_a_column_where_there_are_any():
    text = printed([row("T=4", "t=1"), row("T=4", "t=2")])
    assert heads(text)[:2] == ["run", "scored"]
    assert cells(text, "t=2")[:2] == ["T=4", "t=2"]
    assert "scored" not in heads(printed([row()]))


@pytest.mark.parametrize("name", ["T [fast]", "a [/] b", "[bold]"])
def test_a_name_is_shown_as_it_is(name):
    assert name in printed([row(name)])
    assert name in printed([row()], name)


def test_markdown_has_the_table_s_cells():
    rows = [row("a | b"), row("control", exact=True)]
    lines = study_markdown("a study", rows).splitlines()
    assert lines[0] == "### a study (1 seed)"
    heads_line, rule, first, second = lines[2:6]
    assert [cell.strip() for cell in heads_line.strip("|").split("|")] == heads(printed(rows))
    assert rule.startswith("| --- | ---: |") and first.startswith("| a \\| b | ")
    assert second.count("|") == heads_line.count("|")


# ---- pictures --------------------------------------------------------------------------------------------------------


def steps(*numbers, **options):
    return [
        row("T=4", f"t={steps}", settings={"inference_steps": steps}, elbo_nll_per_token=1 + 1 / (1 + steps), **options)
        for steps in numbers
    ]


PLOTS = {
    "bounds": ([row(), row("b"), row("control", exact=True)], None),
    "bounds of seeds": ([row(seeds=3, spread={"elbo_nll_per_token": 0.1})], None),
    "bounds of exact models alone": ([row("control", exact=True)], None),
    "a setting of the evaluation": (steps(1, 2, 4), {"x": "inference_steps"}),
    "a wide range": (steps(1, 4, 16, 64), {"x": "inference_steps", "y": ["elbo_nll_per_token"]}),
    "a wide range from zero": (steps(0, 4, 16, 64), {"x": "inference_steps"}),
    "with seeds": (steps(1, 2, seeds=2, spread={"elbo_nll_per_token": 0.2}), {"x": "inference_steps"}),
    "a setting of the run, and a control": (
        [row(f"window {w}", settings={"model.sliding_window": w}) for w in (2, 4)]
        + [row(f"control {w}", exact=True, settings={"model.sliding_window": w}) for w in (2, 4)],
        {"x": "model.sliding_window"},
    ),
    "a figure": ([row("a"), row("b", inference_seconds=9.0)], {"x": "inference_seconds", "y": ["iw_nll_per_token"]}),
    "rows without the setting": ([row("control", exact=True), *steps(1, 2)], {"x": "inference_steps"}),
    "words as setting": (
        [row(word, settings={"model.inference": word}) for word in ("gradient", "amortised")], {"x": "model.inference"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_of_plot_is_a_png(tmp_path, kind):
    study_plots({kind: PLOTS[kind]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def panels(monkeypatch):
    """The axes of the figures that are drawn."""
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig

    def keep(self, *args, **options):
        drawn.extend(self.axes)
        return savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_lines_go_through_the_figures_in_order(tmp_path, panels):
    plot = {"x": "inference_steps", "y": ["elbo_nll_per_token"]}
    study_plots({"steps": (steps(16, 1, 4), plot)}, tmp_path / "plot.png")
    (panel,) = panels
    line = panel.get_lines()[0]
    assert list(line.get_xdata()) == [1, 4, 16]
    assert list(line.get_ydata()) == pytest.approx([1.5, 1.2, 1 + 1 / 17])
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == ("steps", "inference steps", "nats per token")
    assert panel.get_xscale() == "log"


def test_an_exact_model_is_one_line_marked_exact_and_others_are_bounds(tmp_path, panels):
    study_plots({"window": PLOTS["a setting of the run, and a control"]}, tmp_path / "plot.png")
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == ["LTM: ELBO", "LTM: IW", "control: exact"]


def test_the_runs_of_a_grid_are_one_line(tmp_path, panels):
    rows = [
        row(
            f"T={steps}, max_steps={most}",
            line=f"T={steps}",
            training_flops=1e9 * most * steps,
            iw_nll_per_token=3 / most,
        )
        for steps in (1, 4)
        for most in (20, 10)
    ]
    study_plots({"s": (rows, {"x": "training_flops", "y": ["iw_nll_per_token"]})}, tmp_path / "plot.png")
    lines = [list(line.get_xdata()) for line in panels[0].get_lines()]
    found = {text.get_text() for text in panels[0].get_legend().get_texts()}
    assert found == {"T=1: IW", "T=4: IW"}
    assert lines == [[1e10, 2e10], [4e10, 8e10]]


def test_values_that_were_chosen_have_ticks_and_measured_ones_have_not(tmp_path, panels):
    rows = [
        row(f"T={steps}", settings={"model.inference_steps": steps}, training_flops=1.3e9 * steps)
        for steps in (1, 4, 64)
    ]
    rows.append(row("control", exact=True, training_flops=1.3e9))  # which has no such setting
    for x in ("model.inference_steps", "training_flops"):
        study_plots({"s": (rows, {"x": x, "y": ["iw_nll_per_token"]})}, tmp_path / "plot.png")
    chosen, measured = panels
    assert list(chosen.get_xticks()) == [1, 4, 64]
    assert not set(measured.get_xticks()) & {1.3e9, 5.2e9, 83.2e9}


def test_each_study_has_a_panel(tmp_path, panels):
    study_plots({f"study {number}": ([row()], None) for number in range(4)}, tmp_path / "plot.png")
    assert [panel.get_title() for panel in panels] == [f"study {number}" for number in range(4)]


def logged(kl):
    return [{"step": step, "elbo_nll_per_token": 3.0 - 0.1 * step, "kl_per_sequence": kl * step} for step in range(4)]


def test_curves_of_many_runs_a_control_and_a_run_without_a_bound(tmp_path):
    runs = {f"run {number}": logged(number + 1.0) for number in range(35)}
    runs |= {"control": logged(0.0), "samples": [{"step": 1, "nll_per_token": 2.0}], "nothing": []}
    study_curves({"one": runs, "other": {"nothing": []}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_rows_compared_with_a_control_say_by_how_much(tmp_path):
    against = Paired(difference=-0.0345, standard_deviation=0.0021, p=0.00123, n=3)
    rows = [
        row("LTM", against=against),
        row("one seed", against=Paired(0.01, None, None, 1)),
        row("control", exact=True),
    ]
    text = study_markdown("s", rows)
    head, _, first, second, control = [line.split(" | ")[-3:] for line in text.splitlines() if line.startswith("|")]
    assert head == ["IW − control's", "perplexity", "p (seeds) |"]
    assert first == ["-0.0345 ± 0.0021", "-3.4%", "0.0012 (3) |"]
    assert second == ["+0.0100", "+1.0%", "– (1) |"]
    assert control == ["–", "–", "– |"]
