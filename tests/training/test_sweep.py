"""Sweeps: what a file says, what is trained for it, and what is not trained again."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp
from tests.toy import stand_ins
from tests.training.runs import RECIPES

from latentlm import InputError
from latentlm.training import run as training_run
from latentlm.training import sweep_run as sweep_module
from latentlm.training.sweep import load_sweep
from latentlm.training.sweep_run import SCORES_FILE, over_seeds, run_sweep

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "recipes" / "sweeps").glob("*.yaml"))
TIMES = {"seconds", "inference_seconds", "tokens_per_second", "training_seconds"}
TIMES |= {"continuation_seconds", "samples_per_second"}

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def folder(tmp_path):
    """A folder with the two small recipes."""
    for family, text in RECIPES.items():
        (tmp_path / f"{family}.yaml").write_text(text.replace("max_steps: 3", "max_steps: 2"), encoding="utf-8")
    return tmp_path


def loaded(folder, text, overrides=()):
    (folder / "sweep.yaml").write_text(text, encoding="utf-8")
    return load_sweep(folder / "sweep.yaml", overrides)


def test_a_run_whose_text_has_changed_is_another_run(folder):
    (folder / "text.txt").write_text("one text")
    sweep = f"""
recipe: ltm.yaml
studies:
  one: {{runs: {{a: {{data.source: {folder / "text.txt"}}}, b: {{data.source: builtin:stories}}}}}}
"""
    before = loaded(folder, sweep).runs
    assert loaded(folder, sweep).runs == before
    (folder / "text.txt").write_text("another text")
    after = loaded(folder, sweep).runs
    assert after[0].folder != before[0].folder and after[1] == before[1]


def keep(folder, figures):
    """Adds to a run's figures, as a job does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SCORES_FILE
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | figures))


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs as threads of this process, which start at once and see what a test has replaced."""
    monkeypatch.setattr(sweep_module, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))


@pytest.fixture
def trained(monkeypatch, in_this_process):
    """Names of the folders that are trained, in order."""
    names, train = [], training_run.train

    def count(recipe, output, **options):
        names.append(output.name)
        return train(recipe, output, **options)

    monkeypatch.setattr(training_run, "train", count)
    return names


@pytest.fixture
def scored(monkeypatch, in_this_process):
    """Jobs that train nothing and have a figure at once: the trials of each, as (evaluation, seed)."""
    asked = []

    def job(run, folder, trials, threads):
        asked.append([(trial.name, trial.evaluation, trial.seed) for trial in trials])
        keep(folder, {trial.key: {"iw_nll_per_token": 1.0 + trial.seed, "exact": False} for trial in trials})

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    return asked


def figures(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# ---- from a file to figures ------------------------------------------------------------------------------------------

WHOLE = """
recipe: ltm.yaml
scoring: {iw_samples: 2, limit: 4}
studies:
  steps:
    runs: {LTM: {}}
    evaluations:
      t=1: {inference_steps: 1}
      t=3: {inference_steps: 3, prompt_tokens: 2}
  against the control:
    runs:
      LTM: {}
      control: {recipe: autoregressive.yaml, model.beta: 1}
    scoring: {reconstructions: 3}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_gives_the_same_figures_whatever_the_number_of_jobs(folder):
    """Two processes, and one thread of this process."""
    sweep = loaded(folder, WHOLE)
    two = run_sweep(sweep, folder / "two", jobs=2, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
        one = run_sweep(sweep, folder / "one", jobs=1, threads=1)
    assert figures(one) == figures(two)
    assert [(row["study"], row["run"], row["evaluation"]) for row in one] == [
        ("steps", "LTM", "t=1"),
        ("steps", "LTM", "t=3"),
        ("against the control", "LTM", ""),
        ("against the control", "control", ""),
    ]
    assert one == json.loads(json.dumps(one))
    for row in one:
        assert row["sequences"] == 4 and math.isfinite(row["iw_nll_per_token"])
        assert row["training_seconds"] > 0 and row["training_tokens"] > 0
    assert [row["exact"] for row in one] == [False] * 3 + [True]
    assert one[1]["settings"].items() >= {"inference_steps": 3, "iw_samples": 2, "limit": 4, "prompt_tokens": 2}.items()
    assert one[3]["settings"].items() >= {"model.beta": 1, "iw_samples": 2, "training.max_steps": 2}.items()
    assert "inference_steps" not in one[3]["settings"]
    # another way to infer is another figure; without a change the weights are inferred by their own steps
    assert len({row["elbo_nll_per_token"] for row in one}) == 4
    assert "continuation_nll_per_token" in one[1] and "continuation_nll_per_token" not in one[0]
    # a control has no z to reconstruct a text from
    assert [row.get("reconstruction_texts") for row in one] == [None, None, 3, None]


@pytest.mark.filterwarnings("ignore")
def test_equal_runs_are_trained_once_and_nothing_twice(folder, trained):
    sweep = loaded(
        folder,
        """
recipe: ltm.yaml
scoring: {iw_samples: 1, limit: 2}
studies:
  one: {runs: {a: {}, b: {model.inference_steps: 1}}}
  other: {runs: {same as a: {}, same as b: {model.inference_steps: 1}}}
""",
    )
    assert len(sweep.runs) == 2 and len(sweep.trials) == 4
    told = []
    rows = run_sweep(sweep, folder / "out", threads=1, on_progress=lambda *step: told.append(step))
    assert len(trained) == len(set(trained)) == 2
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert rows[0]["elbo_nll_per_token"] == rows[2]["elbo_nll_per_token"] != rows[1]["elbo_nll_per_token"]
    files = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    assert run_sweep(sweep, folder / "out", threads=1) == rows
    assert len(trained) == 2
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()} == files


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_trained_is_only_scored_and_one_that_was_interrupted_is_trained(folder, trained):
    sweep = loaded(folder, "recipe: ltm.yaml\nscoring: {iw_samples: 1, limit: 2}\nstudies: {s: {runs: {a: {}}}}")
    rows = run_sweep(sweep, folder / "out", threads=1)
    (folder / "out" / trained[0] / SCORES_FILE).unlink()
    assert figures(run_sweep(sweep, folder / "out", threads=1)) == figures(rows)
    assert len(trained) == 1
    (folder / "out" / trained[0] / SCORES_FILE).unlink()
    (folder / "out" / trained[0] / "history.json").unlink()  # the last that a run writes
    assert figures(run_sweep(sweep, folder / "out", threads=1)) == figures(rows)
    assert len(trained) == 2


def test_a_new_evaluation_is_all_that_is_scored(folder, scored):
    text = "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}, b: {model.beta: 0.5}}, evaluations: {t: {}%s}}}"
    run_sweep(loaded(folder, text % ""), folder / "out")
    assert sorted(scored) == [[("a", "t", 0)], [("b", "t", 0)]]
    scored.clear()
    rows = run_sweep(loaded(folder, text % ", u: {inference_steps: 9}"), folder / "out")
    assert sorted(scored) == [[("a", "u", 0)], [("b", "u", 0)]]
    assert len(rows) == 4


def test_the_cores_are_divided_among_the_jobs_up_to_what_torch_takes(folder, monkeypatch, in_this_process):
    given = []

    def job(run, folder, trials, threads):
        given.append(threads)
        keep(folder, {trial.key: {"iw_nll_per_token": 1.0} for trial in trials})

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    monkeypatch.setattr(sweep_module.os, "cpu_count", lambda: 8)
    sweep = loaded(folder, "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}}}}")
    # jobs, what OMP_NUM_THREADS has made torch take, what is asked for → what a job gets
    for jobs, taken, asked, gets in ((2, 8, None, 4), (2, 1, None, 1), (1, 3, None, 3), (16, 8, None, 1), (2, 1, 5, 5)):
        monkeypatch.setattr(sweep_module.torch, "get_num_threads", lambda taken=taken: taken)
        run_sweep(sweep, folder / f"{jobs}-{taken}-{asked}", jobs=jobs, threads=asked)
        assert given[-1] == gets


def test_a_run_that_fails_leaves_the_others(folder, monkeypatch, in_this_process):
    def job(run, folder, trials, threads):
        if "beta=0.5" in folder.name:
            raise RuntimeError("the disk\n  is full")
        keep(folder, {trial.key: {"iw_nll_per_token": 1.0} for trial in trials})

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    sweep = loaded(folder, "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}, b: {model.beta: 0.5}, c: {model.beta: 2}}}}")
    failures, told = [], []
    rows = run_sweep(sweep, folder / "out", on_failure=failures.append, on_progress=lambda *step: told.append(step))
    assert [row["run"] for row in rows] == ["a", "c"]
    assert len(failures) == 1 and failures[0] == "study 's', run 'b', seed 0: the disk is full"
    assert told[-1] == (3, 3)
    # what did not fail is kept, and what did is tried again
    again = []
    monkeypatch.setattr(sweep_module, "_train_and_score", lambda run, *rest: again.append(run.folder))
    run_sweep(sweep, folder / "out")
    assert len(again) == 1 and "beta=0.5" in again[0]


def test_ctrl_c_starts_no_further_run(folder, monkeypatch):
    begun, pools, ended = [], [], threading.Event()

    def job(run, folder, trials, threads):
        begun.append(folder.name)
        if len(begun) == 1:
            raise KeyboardInterrupt
        ended.wait()  # longer than the sweep, however slow the machine is to tell it

    def pool(jobs, **_):
        pools.append(ThreadPoolExecutor(jobs))
        return pools[0]

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    monkeypatch.setattr(sweep_module, "ProcessPoolExecutor", pool)
    runs = ", ".join(f"{beta}: {{model.beta: {beta}}}" for beta in range(1, 7))
    sweep = loaded(folder, f"recipe: ltm.yaml\nstudies: {{s: {{runs: {{{runs}}}}}}}")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, folder / "out")
    ended.set()
    pools[0].shutdown(wait=True)
    assert len(begun) <= 2


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_scores_are_named(folder, scored, content):
    sweep = loaded(folder, "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}}}}")
    run = folder / "out" / sweep.runs[0].folder
    run.mkdir(parents=True)
    (run / SCORES_FILE).write_text(content)
    with pytest.raises(InputError, match=r"scores\.json is damaged"):
        run_sweep(sweep, folder / "out")


# ---- what a file says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_sweep_that_comes_with_the_library_loads(path, tmp_path, monkeypatch):
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentlm.training.recipe.check_memory", lambda *_: None)  # of each run's model, made twice
    sweep = load_sweep(path)
    assert sweep.studies and len(sweep.runs) > 1
    for trial in sweep.trials:
        assert trial.run.recipe.exists()
    # and its file says how to start it
    assert f"latentlm sweep recipes/sweeps/{path.name}" in path.read_text(encoding="utf-8")


def test_there_are_sweeps():
    assert {"ltm-inference", "ltm-cooperative"} <= {path.stem for path in SHIPPED}


def test_every_run_is_made_with_every_combination_and_seed(folder):
    sweep = loaded(
        folder,
        """
recipe: ltm.yaml
seeds: [0, 3]
studies:
  s:
    runs: {a: {}, control: {recipe: autoregressive.yaml}}
    grid: {training.learning_rate: [1e-3, 2e-3], model.beta: [0.5, 1, 2]}
  own: {runs: {a: {}}, seeds: [7]}
""",
    )
    assert len(sweep.runs) == len(sweep.trials) == 2 * 2 * 3 * 2 + 1
    names = {trial.name for trial in sweep.trials}
    assert "a, learning_rate=0.001, beta=0.5" in names and "control, learning_rate=0.002, beta=2" in names
    assert [trial.seed for trial in sweep.trials if trial.study == "own"] == [7]
    run = sweep.trials[0].run
    assert "training.seed=0" in run.overrides
    assert sweep.trials[0].changes == {"training.learning_rate": 1e-3, "model.beta": 0.5}


def test_changes_and_overrides_reach_the_recipe(folder):
    text = "recipe: ltm.yaml\nstudies: {s: {runs: {a: {model.inference_lr: 1e-8, model.latent_prior: diagonal}}}}"
    run = loaded(folder, text, ["training.max_steps=9", "model.beta=0.25"]).runs[0]
    recipe = sweep_module.load_recipe(run.recipe, run.overrides)
    assert (recipe.model["inference_lr"], recipe.model["latent_prior"], recipe.model["beta"]) == (
        1e-8,
        "diagonal",
        0.25,
    )
    assert (recipe.training["max_steps"], recipe.training["seed"]) == (9, 0)


def test_a_folder_is_one_recipes_whatever_led_to_it(folder):
    def name(changes, overrides=()):
        text = f"recipe: ltm.yaml\nstudies: {{s: {{runs: {{a: {changes}}}}}}}"
        return loaded(folder, text, overrides).runs[0].folder

    assert name("{}") == name("{}")
    assert name("{model.inference_steps: 2}") == name("{}")
    others = [name("{model.inference_steps: 3}"), name("{}", ["training.max_steps=1"]), name("{model.beta: 2}")]
    assert len({name("{}"), *others}) == 4
    # a recipe that has changed since is another
    before = name("{}")
    (folder / "ltm.yaml").write_text((folder / "ltm.yaml").read_text().replace("hidden_size: 16", "hidden_size: 32"))
    assert name("{}") != before


def test_equal_recipes_are_one_run(folder):
    text = "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}, b: {model.inference_steps: 2}}}}"
    assert len(loaded(folder, text).runs) == 1


def test_scoring_of_a_study_and_an_evaluation_add_to_the_sweeps(folder):
    sweep = loaded(
        folder,
        """
recipe: ltm.yaml
scoring: {iw_samples: 16, limit: 5}
studies:
  s: {runs: {a: {}}, scoring: {iw_samples: 4}, evaluations: {t: {limit: 3, inference_steps: 1}, u: null}}
""",
    )
    t, u = sweep.trials
    assert (dict(t.scoring), dict(t.inference)) == ({"iw_samples": 4, "limit": 3}, {"inference_steps": 1})
    assert (dict(u.scoring), dict(u.inference)) == ({"iw_samples": 4, "limit": 5}, {})
    assert t.key != u.key


@pytest.mark.parametrize("name", ["0.5", "1", "true", "no", "2020-01-01", "1e-8"])
def test_a_name_may_look_like_something_else(folder, name):
    sweep = loaded(
        folder, f"recipe: ltm.yaml\nstudies: {{{name}: {{runs: {{{name}: {{}}}}, evaluations: {{{name}: {{}}}}}}}}"
    )
    trial = sweep.trials[0]
    assert all(isinstance(word, str) and word for word in (trial.study, trial.name, trial.evaluation))


# ---- mistakes --------------------------------------------------------------------------------------------------------

ONE = "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}}, %s}}"
MISTAKES = {
    "empty": ("", "a sweep is a mapping"),
    "list": ("[1, 2]", "a sweep is a mapping"),
    "word": ("sweep", "a sweep is a mapping"),
    "not YAML": ("studies: [", "not valid YAML"),
    "no studies": ("recipe: ltm.yaml", "studies"),
    "null studies": ("studies: null", "studies"),
    "empty studies": ("studies: {}", "studies"),
    "list of studies": ("studies: [a]", "studies"),
    "unknown key": ("studies: {s: {runs: {a: {}}}}\nseed: [1]", "unknown key 'seed'"),
    "null study": ("studies: {s: null}", "study 's'"),
    "list as study": ("studies: {s: [a]}", "study 's'"),
    "study without runs": ("recipe: ltm.yaml\nstudies: {s: {}}", "runs"),
    "unknown key of a study": (ONE % "run: {}", "'run'"),
    "list of runs": ("recipe: ltm.yaml\nstudies: {s: {runs: [a]}}", "runs"),
    "null runs": ("recipe: ltm.yaml\nstudies: {s: {runs: null}}", "runs"),
    "null evaluations": (ONE % "evaluations: null", "evaluations"),
    "list of evaluations": (ONE % "evaluations: [a]", "evaluations"),
    "null grid": (ONE % "grid: null", "grid"),
    "list as grid": (ONE % "grid: [a]", "grid"),
    "plot of one word": (ONE % "plot: x", "plot"),
    "seeds of a study": (ONE % "seeds: 3", "seeds"),
    "seeds that are words": (ONE % "seeds: [a]", "seeds"),
    "seeds that are words, of the sweep": ("seeds: [a]\n" + ONE % "plot: null", "seeds"),
    "negative seed": (ONE % "seeds: [-1]", "seeds"),
    "fraction as seed": (ONE % "seeds: [1.5]", "seeds"),
    "boolean seed": (ONE % "seeds: [true]", "seeds"),
    "no recipe": ("studies: {s: {runs: {a: {}}}}", "names a recipe"),
    "recipe that is missing": ("recipe: no.yaml\nstudies: {s: {runs: {a: {}}}}", "no.yaml cannot be read"),
    "recipe that is a folder": ("recipe: .\nstudies: {s: {runs: {a: {}}}}", "cannot be read"),
    "recipe of a study": (ONE % "recipe: 3", "recipe"),
    "sweep as recipe": ("recipe: sweep.yaml\nstudies: {s: {runs: {a: {}}}}", "unknown key 'recipe'"),
    "unknown field": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {model.betta: 1}}}}", "did you mean beta"),
    "wrong value": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {model.beta: -1}}}}", "beta"),
    "field without a section": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {beta: 1}}}}", "section.key=value"),
    "number as field": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {1: 1}}}}", "must be a mapping of keys"),
    "field of the grid": (ONE % "grid: {model.betta: [1, 2]}", "did you mean beta"),
    "unknown scoring": (ONE % "scoring: {iw_sample: 3}", "iw_sample is no option of scoring"),
    "unknown scoring of an evaluation": (ONE % "evaluations: {t: {iw_sample: 3}}", "iw_sample is no option of scoring"),
    "list as scoring of a study": (ONE % "scoring: [a]", "scoring"),
    "number as seeds of the sweep": ("seeds: 3\n" + ONE % "plot: null", "seeds"),
    "zero as seeds of the sweep": ("seeds: 0\n" + ONE % "plot: null", "seeds"),
    "no seeds": (ONE % "seeds: []", "seeds"),
    "a seed twice": (ONE % "seeds: [1, 1]", "seeds"),
    "seed as a change": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {training.seed: 4}}}}", "seed"),
    "list as scoring of the sweep": ("scoring: [1]\n" + ONE % "plot: null", "scoring"),
    "number as recipe of the sweep": ("recipe: 3\nstudies: {s: {runs: {a: {}}}}", "recipe"),
    "number as recipe of a run": ("studies: {s: {runs: {a: {recipe: 3}}}}", "recipe"),
    "number as run": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: 3}}}", "run"),
    "word as run": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: fast}}}", "run"),
    "list as run": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: [fast]}}}", "run"),
    "no run": ("recipe: ltm.yaml\nstudies: {s: {runs: {}}}", "runs"),
    "two runs of one name": ("recipe: ltm.yaml\nstudies: {s: {runs: {1: {}, '1': {model.beta: 2}}}}", "twice"),
    "a run given twice": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {}, a: {model.beta: 2}}}}", "twice"),
    "scalar in the grid": (ONE % "grid: {model.beta: 3}", "grid"),
    "word in the grid": (ONE % "grid: {model.latent_prior: diagonal}", "grid"),
    "no value in the grid": (ONE % "grid: {model.beta: []}", "grid"),
    "number as field of the grid": (ONE % "grid: {1: [2]}", "grid"),
    "number as evaluation": (ONE % "evaluations: {t: 3}", "evaluation"),
    "no evaluation": (ONE % "evaluations: {}", "evaluations"),
    "number as scoring option": (ONE % "scoring: {1: 3}", "scoring"),
    "date as a value": ("recipe: ltm.yaml\nstudies: {s: {runs: {a: {model.beta: 2020-01-01}}}}", "beta"),
    "word for a count": (ONE % "scoring: {iw_samples: many}", "iw_samples"),
    "count of nothing": (ONE % "scoring: {iw_samples: 0}", "iw_samples"),
    "limit of nothing": (ONE % "scoring: {limit: 0}", "limit"),
    "unknown protocol": (ONE % "scoring: {protocol: fancy}", "protocol"),
    "parts without a prompt": (ONE % "scoring: {reinfer_every: 2}", "prompt_tokens"),
    "unknown field of inference": (ONE % "evaluations: {t: {inference_step: 3}}", "inference_step"),
    "wrong value of inference": (ONE % "evaluations: {t: {inference_steps: -3}}", "inference_steps"),
    "plot without x": (ONE % "plot: {y: [elbo_nll_per_token]}", "plot"),
    "plot of an unknown figure": (ONE % "plot: {x: inference_seconds, y: [elbo]}", "plot"),
    "unknown key of a plot": (ONE % "plot: {x: inference_seconds, z: 1}", "plot"),
    "plot of a number": (ONE % "plot: {x: inference_seconds, y: 3}", "plot"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(folder, name):
    text, words = MISTAKES[name]
    with pytest.raises(InputError) as error:
        loaded(folder, text)
    sentence = str(error.value)
    assert words in sentence
    assert str(folder / "sweep.yaml") in sentence
    assert "\n" not in sentence and "Traceback" not in sentence


def test_a_file_that_cannot_be_read_is_named(folder):
    for path in (folder / "nothing.yaml", folder):
        with pytest.raises(InputError, match="cannot be read"):
            load_sweep(path)
    (folder / "sweep.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"sweep\.yaml"):
        load_sweep(folder / "sweep.yaml")


def test_an_override_that_no_recipe_takes(folder):
    with pytest.raises(InputError, match="max_steps"):
        loaded(folder, ONE % "plot: null", ["training.max_step=3"])


# ---- over seeds ------------------------------------------------------------------------------------------------------


def row(run="a", seed=0, evaluation="", line=None, **values):
    return {
        "study": "s",
        "line": line or run,
        "run": run,
        "evaluation": evaluation,
        "seed": seed,
        "settings": {"x": 1},
        **values,
    }


def test_seeds_become_mean_and_standard_deviation():
    values = [1.0, 2.0, 4.0]
    merged = over_seeds(
        [row(seed=seed, nll=value, exact=False, protocol="honest") for seed, value in enumerate(values)]
    )
    assert len(merged) == 1
    (one,) = merged
    assert one["seeds"] == 3
    assert one["nll"] == pytest.approx(7 / 3)
    assert one["spread"]["nll"] == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert one["spread"]["nll"] == pytest.approx(statistics.stdev(values))
    assert (one["exact"], one["protocol"], one["settings"]) == (False, "honest", {"x": 1})
    assert "exact" not in one["spread"]


def test_rows_that_differ_in_more_than_the_seed_stay_apart_and_in_order():
    rows = [
        row(run, seed, evaluation, nll=float(len(run) + seed))
        for run in ("b", "aa") for evaluation in ("u", "t") for seed in (0, 1)
    ]  # fmt: skip
    merged = over_seeds(rows)
    assert [(one["run"], one["evaluation"], one["nll"]) for one in merged] == [
        ("b", "u", 1.5),
        ("b", "t", 1.5),
        ("aa", "u", 2.5),
        ("aa", "t", 2.5),
    ]


def test_one_seed_has_no_spread_and_what_is_unknown_stays_unknown():
    (one,) = over_seeds([row(nll=3, active_units=None)])
    assert (one["seeds"], one["nll"], one["spread"]["nll"]) == (1, 3, 0.0)
    assert one["active_units"] is None and "active_units" not in one["spread"]
    assert over_seeds([]) == []


def test_what_one_seed_does_not_know_none_does():
    """Active units of one seed alone are not the mean of three."""
    for values in ((None, 3), (3, None)):
        (one,) = over_seeds([row(seed=seed, active_units=value) for seed, value in enumerate(values)])
        assert "active_units" not in one["spread"]


def test_rows_are_not_changed():
    rows = [row(seed=seed, nll=float(seed)) for seed in range(2)]
    before = json.dumps(rows)
    over_seeds(rows)
    assert json.dumps(rows) == before


# ---- how a sweep ends ------------------------------------------------------------------------------------------------


def test_a_failure_names_its_study_and_run(folder, monkeypatch, in_this_process):
    def job(run, folder, trials, threads):
        raise RuntimeError("no")

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    failures = []
    sweep = loaded(folder, "recipe: ltm.yaml\nstudies: {s: {runs: {a: {}}, seeds: [3]}}")
    assert run_sweep(sweep, folder / "out", on_failure=failures.append) == []
    assert failures == ["study 's', run 'a', seed 3: no"]


def test_a_seed_is_no_override(folder):
    with pytest.raises(InputError, match="seeds stand under seeds"):
        loaded(folder, ONE % "plot: null", ["training.seed=3"])


@pytest.mark.parametrize("text", ["studies: {a: {runs: {x: {? [1, 2] : 3}}}}", "a: &a [*a]", "[\n" * 5000])
def test_strange_yaml_is_one_sentence(folder, text):
    with pytest.raises(InputError, match=r"sweep\.yaml"):
        loaded(folder, text)


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_too(folder):
    """A real command in a process group of its own, interrupted while its first run trains."""
    (folder / "sweep.yaml").write_text(
        "recipe: ltm.yaml\nseeds: [0, 1, 2, 3]\n"
        "studies: {s: {runs: {a: {training.max_steps: 100000, training.save_strategy: steps, training.save_steps: 5}}}}"
    )
    command = [sys.executable, "-c", "from latentlm.cli import main\nif __name__ == '__main__': main()"]
    with subprocess.Popen(
        [*command, "--threads", "1", "sweep", str(folder / "sweep.yaml"), "--output", str(folder / "out")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            while not any((folder / "out").glob("*/checkpoint-*")):  # it trains
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=120)
        except BaseException:  # the test's timeout, for one: it would train for hours
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130 and "Traceback" not in said
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)
    assert len(list((folder / "out").glob("*/"))) == 1  # and no further run was begun


def test_runs_are_compared_with_the_control_seed_by_seed():
    control = [row("c", seed, iw_nll_per_token=value) for seed, value in enumerate((3.0, 3.2, 3.1))]
    own = [row("a", seed, iw_nll_per_token=value) for seed, value in ((2, 3.0), (0, 2.8), (1, 3.05), (7, 1.0))]
    merged = {one["run"]: one for one in over_seeds([*own, *control], {"s": "c"})}
    assert "against" not in merged["c"]
    found = merged["a"]["against"]
    differences = [-0.2, -0.15, -0.1]
    assert found.n == 3  # the seed that the control lacks is left out
    assert found.difference == pytest.approx(statistics.fmean(differences))
    assert found.standard_deviation == pytest.approx(statistics.stdev(differences))
    assert found.p == pytest.approx(ttest_1samp(differences, 0).pvalue)
    assert all("against" not in one for one in over_seeds([*own, *control]))
    assert all("against" not in one for one in over_seeds([*own, *control], {"other": "c", "s": None}))


def test_of_a_tuned_control_the_best_is_compared_with():
    rows = [row("c, lr=1", 0, line="c", iw_nll_per_token=3.0), row("a", 0, iw_nll_per_token=2.0)]
    rows += [row("c, lr=2", seed, line="c", iw_nll_per_token=3.5 + seed) for seed in (0, 1)]
    merged = {one["run"]: one for one in over_seeds(rows, {"s": "c"})}
    assert merged["a"]["against"].difference == pytest.approx(2.0 - 3.5)
    assert "against" not in merged["c, lr=1"]


def test_of_a_grid_the_control_of_the_same_values_is_compared_with():
    rows = [
        row(f"{line}, lr={rate}", seed, line=line, iw_nll_per_token=nll + rate + seed)
        for line, nll in (("c", 3.0), ("a", 2.5))
        for rate in (1, 2)
        for seed in (0, 1)
    ]
    merged = {one["run"]: one for one in over_seeds(rows, {"s": "c"})}
    assert [merged[f"a, lr={rate}"]["against"].difference for rate in (1, 2)] == pytest.approx([-0.5, -0.5])


# ---- tuning ----------------------------------------------------------------------------------------------------------

TUNED = """
recipe: ltm.yaml
seeds: [5, 6, 7]
studies:
  s:
    runs: {a: {}, b: {model.beta: 0.5}}
    tuning: {training.learning_rate: [1e-3, 2e-3, 4e-3]}
    control: b
"""


@pytest.fixture
def rated(monkeypatch, in_this_process):
    """Jobs that train nothing: a is best at 2e-3, b at 4e-3, by the first seed; by the others at 1e-3."""
    asked = []

    def job(run, folder, trials, threads):
        for trial in trials:
            rate = trial.changes["training.learning_rate"]
            asked.append((trial.line, rate, trial.seed))
            nll = abs(rate - {"a": 2e-3, "b": 4e-3}[trial.line]) if trial.seed == 5 else rate
            keep(folder, {trial.key: {"iw_nll_per_token": nll, "exact": False}})

    monkeypatch.setattr(sweep_module, "_train_and_score", job)
    return asked


def test_a_tuned_run_is_tried_by_the_first_seed_and_its_best_has_the_others(folder, rated):
    sweep, progress = loaded(folder, TUNED), []
    assert sweep.number_of_models == 2 * 3 + 2 * 2
    rows = run_sweep(sweep, folder / "out", on_progress=lambda *done: progress.append(done))
    tried = {(line, rate, 5) for line in "ab" for rate in (1e-3, 2e-3, 4e-3)}
    assert set(rated[:6]) == tried
    assert set(rated[6:]) == {("a", 2e-3, 6), ("a", 2e-3, 7), ("b", 4e-3, 6), ("b", 4e-3, 7)}
    assert progress[-1] == (10, 10)
    merged = {one["run"]: one for one in over_seeds(rows, {"s": "b"})}
    assert {run: one["seeds"] for run, one in merged.items() if one["seeds"] > 1} == {
        "a, learning_rate=0.002": 3,
        "b, learning_rate=0.004": 3,
    }
    assert merged["a, learning_rate=0.002"]["against"].n == 3
    # again: nothing is left to do
    rated.clear()
    assert run_sweep(sweep, folder / "out") == rows
    assert not rated


def test_a_tuned_run_that_failed_at_one_value_goes_on_with_the_best_of_the_others(folder, rated, monkeypatch):
    job, failures = sweep_module._train_and_score, []

    def fails(run, folder, trials, threads):
        if trials[0].changes["training.learning_rate"] == 2e-3:
            raise InputError("diverged.")
        job(run, folder, trials, threads)

    monkeypatch.setattr(sweep_module, "_train_and_score", fails)
    rows = run_sweep(loaded(folder, TUNED), folder / "out", on_failure=failures.append)
    assert len(failures) == 2
    assert {row["run"] for row in rows if row["seed"] == 7} == {"a, learning_rate=0.001", "b, learning_rate=0.004"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("grid: {model.beta: [1]}", "grid and tuning"),
        ("control: c", "control"),
    ],
)
def test_mistakes_of_tuning_and_control_are_named(folder, change, named):
    text = TUNED.replace("    control: b\n", f"    {change}\n")
    with pytest.raises(InputError, match=named):
        loaded(folder, text)


def test_changes_of_the_sweep_and_of_a_study_hold_for_every_run_and_its_own_come_last(folder):
    text = """
recipe: ltm.yaml
changes: {model.beta: 0.5, data.length: 24}
studies:
  s:
    changes: {model.beta: 0.25}
    runs: {a: {}, b: {model.beta: 1.0}}
  t: {runs: {a: {}}}
"""
    found = {(trial.study, trial.name): trial.changes for trial in loaded(folder, text).trials}
    assert found == {
        ("s", "a"): {"model.beta": 0.25, "data.length": 24},
        ("s", "b"): {"model.beta": 1.0, "data.length": 24},
        ("t", "a"): {"model.beta": 0.5, "data.length": 24},
    }


@pytest.mark.parametrize("wrong", ["changes: 3", "changes: [a]", "changes: {3: 4}", "changes: {model.betta: 1}"])
def test_mistakes_of_changes_are_named(folder, wrong):
    with pytest.raises(InputError, match=r"changes|betta"):
        loaded(folder, f"recipe: ltm.yaml\n{wrong}\nstudies: {{s: {{runs: {{a: {{}}}}}}}}\n")
