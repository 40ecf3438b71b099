"""A picture of how LangVAE's runs converge on held-out text, from the folder of a sweep: mean and range over seeds.

    python studies/lang_vae_convergence.py runs/convergence convergence.png

Needs a sweep with an evaluation every so many steps, as recipes/sweeps/lang-vae-convergence.yaml says. All figures are
of the validation data: −log p(x | z) of z ~ q(z | x), a reconstruction and no likelihood, and KL(q ‖ p).
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from of_sweep import models

PANELS = {
    "eval_reconstruction_nll_per_token": "−log p(x | z), nats per token",
    "eval_kl_per_sequence": "KL(q ‖ p), nats per sequence",
}


def histories(sweep: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Run → the log of each of its seeds."""
    found = defaultdict(list)
    for settings, folder in models(sweep, ["model.annotation_size", "model.lora_rank"]):
        size, rank = settings.values()
        name = ("roles" if size is None else "without roles") + (", frozen" if rank is None else f", LoRA {rank}")
        found[name].append(json.loads((folder / "history.json").read_text(encoding="utf-8")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for index, (run, seeds) in enumerate(histories(given.sweep).items()):
        for panel, (key, label) in zip(panels, PANELS.items(), strict=True):
            steps = [entry["step"] for entry in seeds[0] if key in entry]
            values = np.array([[entry[key] for entry in history if key in entry] for history in seeds])
            panel.plot(steps, values.mean(0), color=f"C{index}", marker=".", linewidth=1.2, label=run)
            panel.fill_between(steps, values.min(0), values.max(0), color=f"C{index}", alpha=0.2, linewidth=0)
            panel.set(xlabel="step", ylabel=label)
            print(f"{run}, {label}: " + ", ".join(f"{value:.3f}" for value in values.mean(0)))
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(given.picture, dpi=110)


if __name__ == "__main__":
    main()
