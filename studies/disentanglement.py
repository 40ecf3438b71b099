"""Disentanglement of every model of a sweep, by one of its settings: mean and standard deviation over training seeds.

    python studies/disentanglement.py runs/beta --by model.beta --data builtin:sentences --limit 5000 --plot FILE.png

    python studies/disentanglement.py runs/beta --by model.beta --data builtin:sentences --limit 5000 --plot beta.png
units are those of the sweep's own evaluation.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
from of_sweep import models

import latentlm
from latentlm.data import Annotated
from latentlm.probing import LatentSpace, probe_named, read_texts

OF_EVALUATION = ("kl_per_sequence", "active_units")
SHOWN = ("z_diff", "mig", "dci_disentanglement", "dci_informativeness", "modularity", "explicitness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--by", nargs="+", required=True, help="settings, the last of which is the picture's x")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--annotations", help="what separates a text from the labels of its words")
    parser.add_argument("--factors", nargs="*")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    annotated = None if given.annotations is None else Annotated(given.annotations)
    texts = read_texts(given.data, limit=given.limit, annotated=annotated)
    rows = []
    for settings, folder in models(given.sweep, given.by):
        model, tokenizer = latentlm.load(folder)
        figures = next(iter(json.loads((folder / "scores.json").read_text(encoding="utf-8")).values()))
        result = probe_named("disentanglement")(LatentSpace(model, tokenizer), texts, factors=given.factors, seeds=1)
        scores = result.table.set_index("metric")
        rows.append(
            {name: "–" if value is None else value for name, value in settings.items()}
            | {name: figures[name] for name in OF_EVALUATION}
            | scores["model"].to_dict()
            | {f"{name}, z sampled": value for name, value in scores["z sampled"].items()}
            | {f"{name}, shuffled": value for name, value in scores["factors shuffled"].items()}
            | {f"{name}, PCA": value for name, value in scores.get("PCA", pd.Series(dtype=float)).items()}
        )
    table = pd.DataFrame(rows)
    groups = table.groupby(given.by)
    means, spreads, counts = groups.mean(), groups.std().fillna(0.0), groups.size()
    metrics = [name for name in scores.index if name in means]
    print(f"| {', '.join(given.by)} | seeds | " + " | ".join((*OF_EVALUATION, *metrics)) + " |")
    print("| --- |" + " ---: |" * (1 + len(OF_EVALUATION) + len(metrics)))
    for key in means.index:
        name = ", ".join(map(str, key)) if isinstance(key, tuple) else key
        for what in ("", ", z sampled"):
            columns = (*OF_EVALUATION, *(f"{metric}{what}" for metric in metrics))
            cells = [f"{means.loc[key, column]:.3f} ± {spreads.loc[key, column]:.3f}" for column in columns]
            print(f"| {name}{what} | {counts[key]} | " + " | ".join(cells) + " |")
    for control in ("shuffled", "PCA"):
        if f"{metrics[0]}, {control}" in table:
            cells = [f"{table[f'{name}, {control}'].mean():.3f}" for name in metrics]
            print(f"| {control} | | | | " + " | ".join(cells) + " |")
    if given.plot is not None:
        figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
        for panel, name in zip(panels.flat, SHOWN, strict=True):
            rest, x = given.by[:-1], given.by[-1]
            for column, line in ((name, "-"), (f"{name}, z sampled", ":")):
                flat, around = means[column].reset_index(), spreads[column].reset_index()
                for place, (key, mean) in enumerate(flat.groupby(rest) if rest else [((), flat)]):
                    label = ", ".join(f"{of} {value}" for of, value in zip(rest, key, strict=True)) or "posterior means"
                    label = label if column == name else f"{label}, z sampled".removeprefix("posterior means, ")
                    values, around_them = mean[column], around.loc[mean.index, column]
                    look = {"linestyle": line, "color": f"C{place}", "marker": "o", "capsize": 3}
                    panel.errorbar(mean[x].astype(str), values, yerr=around_them, label=label, **look)
            panel.axhline(table[f"{name}, shuffled"].mean(), color="grey", linestyle="-.", label="factors shuffled")
            if f"{name}, PCA" in table:
                panel.axhline(table[f"{name}, PCA"].mean(), color="grey", linestyle="--", label="PCA of words")
            panel.set(title=name, xlabel=x.removeprefix("model."))
        panels.flat[0].legend(frameon=False, fontsize=7)
        figure.savefig(given.plot, dpi=110)


if __name__ == "__main__":
    main()
