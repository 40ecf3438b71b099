"""What became slower: two files of `_suite.py`, ratio by ratio. Ends with status 1 where one fell by more than --by.

    python benchmarks/_compare.py before.json after.json [--by 0.15]

Ratios are compared and not seconds, since both sides of one were measured in one process. Says so where the files are
of different machines or versions.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found["benchmarks"], dict) and isinstance(found["machine"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        sys.exit(f"{path} is no file of benchmarks/_suite.py.")
    return found


def ratios(found: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    return {
        (name, one["what"], one["against"]): one["ratio"]
        for name, report in found["benchmarks"].items()
        for one in report["comparisons"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--by", type=float, default=0.15, help="the fall of a ratio that is a loss, as a fraction")
    given = parser.parse_args()
    before, after = read(given.before), read(given.after)
    if before["machine"] != after["machine"]:
        print("different machines or versions: ratios differ for that alone")
    was, now = ratios(before), ratios(after)
    slower = []
    for key in was.keys() | now.keys():
        if key not in was or key not in now:
            print(f"{': '.join(key)}: only {'after' if key in now else 'before'}")
        elif now[key] < was[key] * (1 - given.by):
            slower.append(key)
    for key in sorted(was.keys() & now.keys()):
        mark = "  SLOWER" if key in slower else ""
        print(f"{': '.join(key)}: {was[key]:.2f} → {now[key]:.2f}{mark}")
    if slower:
        sys.exit(f"{len(slower)} of {len(was.keys() & now.keys())} ratios fell by more than {given.by:.0%}")


if __name__ == "__main__":
    main()
