"""All benchmarks, one after the other, and one table of how many times better ours is than the other way.

    python benchmarks/_suite.py [--device cuda] [--whole] [--output benchmarks/results] [NAME ...]

Each runs in a process of its own, small unless --whole (then with those that compare no speeds, too), and leaves its
figures in one file of the output, named for the device, with machine and versions; `_compare.py` compares two such
files. Ends with status 1 where one failed. Whether a target is met is told and changes no status: it is the machine's
business, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import Comparison, machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
# options that make each one small; together less than five minutes on two cores
SMALL: dict[str, list[str]] = {
    "ltm_training": ["--small", "--repeats", "1"],
    "ltm_generation": ["--small", "--repeats", "1"],
    "projection": ["--small", "--rounds", "2", "--vocabularies", "8192"],
    "step_profile": ["--batch", "1", "--rounds", "1", "--families", "ltm"],
    "memory": ["--small"],
    "gpt_vae": ["--small", "--rounds", "1"],
    "gp_vae": ["--small", "--rounds", "2"],
    "gp_prior": ["--small", "--rounds", "1", "--threads", "2"],
    "lang_vae": ["--rounds", "1"],
    "large_data": ["--megabytes", "1"],
    "scaling": ["--skip-paper"],
}
WHOLE: dict[str, list[str]] = {
    "ltm_training": ["--each"],
    "ltm_generation": ["--compiled"],
    "large_data": ["--megabytes", "3", "30"],
    "gp_prior": ["--threads", "2"],
}
# these compare no speeds: run by name, or with --whole
OF_LIMITS = ("large_data", "scaling")
ON_GPU = ("ltm_training", "ltm_generation", "gpt_vae", "step_profile")


def run(name: str, options: list[str]) -> dict[str, Any]:
    """The report of one benchmark; what it prints is printed. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        begun = time.perf_counter()
        subprocess.run([sys.executable, HERE / f"{name}.py", *options, "--json", file], check=True)
        return json.loads(file.read_text(encoding="utf-8")) | {"seconds": time.perf_counter() - begun}


def table(reports: dict[str, dict[str, Any]]) -> Table:
    rows = Table(title="how many times better ours is", title_justify="left")
    for column in ("benchmark", "what", "ours", "against", "unit", "ratio", "target"):
        rows.add_column(column, justify="right" if column in ("ours", "ratio", "target") else "left")
    for name, report in reports.items():
        for one in (Comparison(**values) for values in report["comparisons"]):
            target = "–" if one.target is None else f"{one.target:g}"
            against = f"{one.against} {one.other:.4g}"
            rows.add_row(name, one.what, f"{one.ours:.4g}", against, one.unit, f"{one.ratio:.2f}", target)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        choices=[*SMALL, []],
        metavar="NAME",
        help="of some; by default all but, in small, large_data and scaling",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--whole", action="store_true", help="at full size")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    names = given.names or [
        name for name in SMALL if (name in ON_GPU if given.device == "cuda" else given.whole or name not in OF_LIMITS)
    ]
    reports, failed = {}, []
    for name in names:
        options = WHOLE.get(name, []) if given.whole else SMALL[name]
        if given.device == "cuda":
            options = [*options, "--device", "cuda"]
        print(f"== {name} {' '.join(options)}", flush=True)
        try:
            reports[name] = run(name, options)
            print(f"{reports[name]['seconds']:.0f} s", flush=True)
        except subprocess.CalledProcessError:
            failed.append(name)
    Console(width=160).print(table(reports))
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"{given.device}{'-whole' if given.whole else ''}.json"
    found = {"machine": machine(), "benchmarks": reports}
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(one['seconds'] for one in reports.values()):.0f} s; figures in {file}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
