"""The probes that there are, found by their files, and all of them at once."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentlm.errors import InputError
from latentlm.files import make_folder, write_whole
from latentlm.probing import probes
from latentlm.probing.page import page
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

Probe = Callable[..., ProbeResult]


def probe_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(probes.__path__) if not module.name.startswith("_"))


def probe_named(name: str) -> Probe:
    """The function of a probe, `name(space, texts, *, …)`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in probe_names():
        raise InputError(f"there is no probe {name!r}: give one of {', '.join(probe_names())}, or all.")
    return getattr(importlib.import_module(f"{probes.__name__}.{name}"), name)


def probe_all(
    space: LatentSpace,
    texts: Texts,
    *,
    output: str | Path | None = None,
    title: str = "",
    on_probe: Callable[[str], None] = lambda name: None,
) -> tuple[list[ProbeResult], dict[str, str]]:
    """Every probe with its defaults; those that cannot be asked of this model or these texts are skipped.

    Args:
        output: a folder, made if it is missing, for the files of each probe as soon as it has run, and at the end for
            `report.html`, one page of everything.
        on_probe: told the name of each probe before it runs.

    Returns:
        The results, and of each skipped probe the reason.

    Raises:
        InputError: all were skipped.
    """
    results: list[ProbeResult] = []
    skipped: dict[str, str] = {}
    if output is not None:
        make_folder(output)
    space.infer(texts)
    for name in probe_names():
        on_probe(name)
        probe = probe_named(name)
        seed = {"seed": space.seed} if "seed" in inspect.signature(probe).parameters else {}
        try:
            result = probe(space, texts, **seed)
        except InputError as error:
            skipped[name] = str(error)
            continue
        results.append(result)
        if output is not None:
            result.save(output)
    if not results:
        raise InputError(f"no probe can be asked of these texts; {next(iter(skipped))}: {next(iter(skipped.values()))}")
    if output is not None:
        write_whole(Path(output) / "report.html", page(title or "Probes", results, _about(space, texts), skipped))
    return results, skipped


def _about(space: LatentSpace, texts: Texts) -> str:
    model: Any = space.model
    event = " × ".join(map(str, space.event))
    inference = getattr(model.config, "inference", "its own")
    each = " for each token" if model.latent_per_token else ""
    return (
        f"{type(model).__name__} with a latent of {event}{each}; {len(texts):,} texts; codes are {space.view}, in "
        f"prior standard deviations; inference: {inference}; seed {space.seed}."
    )
