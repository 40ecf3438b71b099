"""Models ranked on the same text: bits per byte, beside the best model without latents, which is the line to beat.

    Δ = bits per byte of the model − those of the control        below 0 is better

A latent model's figures are upper bounds on its NLL, the control's is its likelihood itself. So a model that is below
the control by its ELBO is better for certain (of these seeds and this text), one that is below by IW alone is better as
far as K samples show, and of one that is not below nothing is shown: its likelihood may be better than its bounds.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from latentlm.evaluation.comparison import LEAST_SEEDS_OF_A_TEST, Paired, averaged, paired
from latentlm.evaluation.leaderboard_files import TASK, Found, Scored, read_runs

#: figures by which models are ranked and compared
BITS_BY_IW, BITS_BY_ELBO = "iw_bits_per_byte", "elbo_bits_per_byte"


@dataclass(frozen=True)
class Against:
    """A row beside its section's control.

    Args:
        difference: of bits per byte by IW, own − control's: means over all seeds of either.
        perplexity_change: exp(difference in nats per token) − 1, a fraction; None where the control has other tokens.
        beats: "by ELBO" (then by IW, too), "by IW only" or "no"; of an exact model "yes" or "no".
        paired: over the training seeds that both have; None where they have less than two in common.
    """

    difference: float
    perplexity_change: float | None
    beats: str
    paired: Paired | None


@dataclass(frozen=True)
class Row:
    """One model, or several that differ in nothing but the seed.

    Args:
        rank: by bits per byte within the section, from 1; None where that is not finite.
        figures: means over seeds, of `Scored.figures`.
        spread: standard deviation of each over seeds, 0 for one.
        seeds: trained models.
        noises: scorings of the one trained model by different noise, whose mean and deviation the figures are.
        bits_by_seed: bits per byte by IW of each seed of training that is known.
        against: None of the control, and where there is none.
    """

    name: str
    family: str
    exact: bool
    figures: Mapping[str, float]
    spread: Mapping[str, float]
    seeds: int
    noises: int
    bits_by_seed: Mapping[int, float]
    settings: Mapping[str, Any]
    model: str | None
    rank: int | None = None
    is_control: bool = False
    against: Against | None = None

    @property
    def bits(self) -> float:
        return self.figures[BITS_BY_IW]


@dataclass(frozen=True)
class Section:
    """Rows that may be compared: scored on the same text, all by p(x) or all by p(x | c).

    Args:
        data: what was scored, if any of the files names it.
        rows: the control first, if there is one, then by rank.
    """

    data: str | None
    bytes: int
    conditional: bool
    rows: Sequence[Row]

    @property
    def control(self) -> Row | None:
        return self.rows[0] if self.rows[0].is_control else None

    @property
    def title(self) -> str:
        law = "p(x | c), texts given their labels" if self.conditional else "p(x)"
        return f"{self.data or 'held-out text'}, {self.bytes:,} bytes: {law}"

    def remarks(self) -> list[str]:
        """What a reader has to know before comparing the rows."""
        remarks = []
        if self.control is None:
            remarks.append("No exact control was scored on this text: what a model without latents gives is not known.")
        if len({row.figures["tokens"] for row in self.rows}) > 1:
            remarks.append("The rows have different tokens: bits per byte compare them, nats per token do not.")
        if len({row.figures["sequences"] for row in self.rows}) > 1:
            remarks.append("The text is cut into different numbers of sequences: some models see more context.")
        if any(row.family == "GPVAE" and not _pays_for_length(row) for row in self.rows):
            remarks.append(
                "A GPVAE without a model of the length is given that of a text, whose cost is not in its figures."
            )
        seeds = sorted({row.seeds for row in self.rows})
        if seeds[0] < LEAST_SEEDS_OF_A_TEST:
            number = f"{' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}"
            remarks.append(f"Rows stand for {number}: from less than 3 a difference is a lead, no result.")
        return remarks


def _pays_for_length(row: Row) -> bool:
    by_default = "categorical" if row.settings.get("data.unit") == "sentences" else "none"  # as recipes have it
    return row.settings.get("model.length_model", by_default) == "categorical"


@dataclass(frozen=True)
class Leaderboard:
    """All sections, remarks on figures of all of them, and files that stand in none → why."""

    sections: Sequence[Section]
    remarks: Sequence[str] = ()
    unplaced: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a reader has to know beside the sections' own remarks."""
        return [*self.remarks, *(f"Not shown: {source}: {why}." for source, why in self.unplaced.items())]

    def json(self) -> dict[str, Any]:
        """Everything in the tables; what is not finite is null."""
        return {"task": TASK, "sections": [_section_json(one) for one in self.sections], "notes": self.notes()}


def leaderboard(paths: Sequence[str | Path]) -> Leaderboard:
    """The leaderboard of files and folders of evaluations; see `read_runs` for what is read, and what is refused."""
    return ranked(read_runs(paths))


def ranked(found: Found) -> Leaderboard:
    """Scorings in sections, merged over seeds, ranked and compared."""
    texts: dict[tuple[str | None, int, bool], list[Scored]] = {}
    for one in found.scored:
        texts.setdefault(_text(one, found.scored), []).append(one)
    sections = [Section(*text, _ranked(_told_apart(_over_seeds(of_text)))) for text, of_text in texts.items()]
    return Leaderboard(sections, found.remarks, found.unplaced)


def _text(one: Scored, every: Sequence[Scored]) -> tuple[str | None, int, bool]:
    """What was scored. One name of a file may be written in many ways, and as many bytes without a name are the same
    text if only one name has them.
    """
    names = {_short(other.data) for other in every if other.figures["bytes"] == one.figures["bytes"] and other.data}
    data = _short(one.data) if one.data else names.pop() if len(names) == 1 else None
    return data, int(one.figures["bytes"]), one.conditional


def _short(data: str | None) -> str:
    return PurePath(data or "").name if ":" not in (data or "") else data or ""


# ---- seeds -----------------------------------------------------------------------------------------------------------


def _over_seeds(scored: Sequence[Scored]) -> list[Row]:
    groups: list[list[Scored]] = []
    for one in scored:
        for group in groups:
            # of the same seed, a model that was trained otherwise differs in more than the seed
            same = group[0].alike == one.alike and group[0].exact == one.exact
            if same and all(other.seed != one.seed or other.trained == one.trained for other in group):
                if all(other.measured != one.measured for other in group):  # scored again by the same noise
                    group.append(one)
                break
        else:
            groups.append([one])
    return [_row(group) for group in groups]


def _row(group: Sequence[Scored]) -> Row:
    trained: dict[Any, list[Scored]] = {}
    for one in group:
        trained.setdefault(one.trained, []).append(one)
    models = [averaged([one.figures for one in scorings]) for scorings in trained.values()]
    first = group[0]
    if len(models) == 1:
        figures, spread = models[0]
    else:  # the noise of a scoring is no variation of training
        figures, spread = averaged([means for means, _ in models])
    by_seed = {
        scorings[0].seed: means[BITS_BY_IW]
        for scorings, (means, _) in zip(trained.values(), models, strict=True)
        if scorings[0].seed_is_of_training and scorings[0].seed is not None
    }
    return Row(
        name=_common_name([one.name for one in group]),
        family=first.family,
        exact=first.exact,
        figures=figures,
        spread=spread,
        seeds=len(models),
        noises=1 if first.exact or len(models) > 1 else len(group),
        bits_by_seed=by_seed,
        settings=first.settings,
        model=first.model,
    )


def _common_name(names: Sequence[str]) -> str:
    """Of runs/ltm-seed0, runs/ltm-seed1 and so on: ltm."""
    if len(set(names)) == 1:
        return names[0]
    first, last = min(names), max(names)  # what these begin with alike, all do
    alike = next((place for place, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
    return re.sub(r"[\W_]*(seed[\W_]*)?\d*$", "", first[:alike], count=1) or names[0]


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Rows of one name get what they differ in after it."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    told: dict[int, str] = {}
    for name, alike in by_name.items():
        keys = {key for row in alike for key in row.settings} - {"training.seed"}
        differing = sorted(key for key in keys if len({_shown(row.settings.get(key)) for row in alike}) > 1)
        for row in alike if len(alike) > 1 else ():
            said = [f"{k.partition('.')[2] or k}={_shown(row.settings[k])}" for k in differing if k in row.settings]
            more = ", ".join(said) or row.model
            longer = f"{name} ({more})" if more else name
            same = sum(other == longer for other in told.values())
            told[id(row)] = f"{longer} no. {same + 1}" if same else longer
    return [replace(row, name=told.get(id(row), row.name)) for row in rows]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _ranked(rows: Sequence[Row]) -> list[Row]:
    order = sorted(rows, key=lambda row: row.bits if math.isfinite(row.bits) else math.inf)
    order = [replace(row, rank=place if math.isfinite(row.bits) else None) for place, row in enumerate(order, 1)]
    control = next((row for row in order if row.exact and row.rank is not None), None)
    if control is None:
        return order
    others = [replace(row, against=_against(row, control)) for row in order if row is not control]
    return [replace(control, is_control=True), *others]


def _against(row: Row, control: Row) -> Against:
    own, its = row.figures, control.figures
    change = None
    if own["tokens"] == its["tokens"]:
        nats = own["iw_nll_per_token"] - its["iw_nll_per_token"]
        change = math.expm1(nats) if nats < math.log(1e9) else math.inf  # NaN is not below, either
    if row.exact:
        beats = "yes" if row.bits < control.bits else "no"
    elif own[BITS_BY_ELBO] < control.bits:
        beats = "by ELBO"
    else:
        beats = "by IW only" if row.bits < control.bits else "no"
    common = sorted(row.bits_by_seed.keys() & control.bits_by_seed.keys())
    test = None
    if len(common) > 1:
        test = paired([row.bits_by_seed[seed] for seed in common], [control.bits_by_seed[seed] for seed in common])
    return Against(row.bits - control.bits, change, beats, test)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "data": section.data,
        "bytes": section.bytes,
        "conditional": section.conditional,
        "remarks": section.remarks(),
        "rows": [_row_json(row) for row in section.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    against = row.against
    test = against.paired if against else None
    return {
        "rank": row.rank,
        "name": row.name,
        "model": row.model,
        "family": row.family,
        "exact": row.exact,
        "control": row.is_control,
        "seeds": row.seeds,
        "noises": row.noises,
        **_finite(row.figures),
        "spread": _finite(row.spread),
        **(
            {}
            if against is None
            else _finite(
                {
                    "difference_bits_per_byte": against.difference,
                    "perplexity_change": against.perplexity_change,
                    "beats_control": against.beats,
                    "paired_difference_bits_per_byte": test and test.difference,
                    "paired_p": test and test.p,
                    "paired_seeds": test and test.n,
                }
            )
        ),
    }


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(value, float) and not math.isfinite(value) else value for k, value in figures.items()}
