"""What every benchmark leaves behind: its comparisons and measurements, on which machine, with which versions."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "gpytorch", "x-transformers")


@dataclass(frozen=True)
class Comparison:
    """Two ways to do one thing.

    Args:
        what: is done, and of which size.
        ours, other: what each way takes or reaches, in `unit`.
        against: the other way: the plain form, or a peer.
        ratio: how many times better ours is; above 1 it is better, whatever the unit.
        target: what the ratio should be at least, if anything was asked.
    """

    what: str
    ours: float
    other: float
    unit: str
    against: str
    ratio: float
    target: float | None = None

    @classmethod
    def of_costs(cls, what: str, ours: float, other: float, unit: str, against: str, target: float | None = None):
        """Of seconds or bytes, of which less is better."""
        return cls(what, ours, other, unit, against, other / ours, target)

    @classmethod
    def of_rates(cls, what: str, ours: float, other: float, unit: str, against: str, target: float | None = None):
        """Of tokens a second, of which more is better."""
        return cls(what, ours, other, unit, against, ours / other, target)

    @property
    def line(self) -> str:
        target = "" if self.target is None else f" (target {self.target:g})"
        sides = f"ours {self.ours:.4g}, {self.against} {self.other:.4g} {self.unit}"
        return f"{self.what}: {sides}, ratio {self.ratio:.2f}{target}"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, to the end of what it leaves to a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, and versions of what computes."""
    found = {name: _version(name) for name in _PACKAGES}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version for name, version in found.items() if version is not None},
    }


def write(
    path: Path | None,
    given: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    measured: Mapping[str, Any] | None = None,
    agreement: Mapping[str, Any] | None = None,
) -> None:
    """The figures of one benchmark as JSON; nothing where no file was asked for.

    Args:
        given: the options it ran with.
        measured: figures that are compared with nothing.
        agreement: how far apart the results of the two ways are.
    """
    if path is None:
        return
    options = {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if key != "json"}
    report = {
        "machine": machine(),
        "options": options,
        "agreement": agreement or {},
        "comparisons": [asdict(one) for one in comparisons],
        "measured": measured or {},
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
