"""The models in a sweep's folder, by the settings that tell them apart."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml


def models(sweep: Path, settings: Sequence[str]) -> Iterator[tuple[dict[str, Any], Path]]:
    """The settings of each model that is trained and scored (as `model.beta`; None where its recipe is silent), and its
    folder; seeds in order.
    """
    found = []
    for file in sweep.glob("*/scores.json"):
        recipe = yaml.safe_load((file.parent / "recipe.yaml").read_text(encoding="utf-8"))
        values = {}
        for name in settings:
            section, key = name.split(".", 1)
            values[name] = recipe.get(section, {}).get(key)
        found.append((values, recipe.get("training", {}).get("seed", 0), file.parent))
    for values, _, folder in sorted(
        found, key=lambda one: (*((v is not None, v or 0) for v in one[0].values()), one[1])
    ):
        yield values, folder
