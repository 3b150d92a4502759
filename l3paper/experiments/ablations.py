"""Ablations from the newest records that answer a question.

Some experiments are recorded on the text that carries the claims, others so far only on an earlier
split of the texts. `newest` takes what there is, and every answer carries a label that says which.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from l3paper.experiments.catalogue import ENGLISH, SOURCE, TEXT
from l3paper.experiments.runs import FIRST_RUNS, OPEN, RUNS, MissingRun
from l3paper.experiments.search import Family, results
from l3paper.experiments.statistics import (
    AGREES,
    LEVEL,
    UNDECIDED,
    Evidence,
    Gain,
    gain_on_common_seeds,
    verdicts,
)

Place = tuple[str, Path]
"""A text and the folder of runs on it."""

PLACES: tuple[Place, ...] = ((TEXT, RUNS), (ENGLISH, FIRST_RUNS), (SOURCE, FIRST_RUNS))
"""Where `newest` looks, in this order."""

EARLIER = {
    "rivals": "main",
    "many_rows": "allocation",
    "places": "placement",
    "rows_width": "rows",
    "long": "tokens",
}
"""The experiments that asked nearly the same question on the earlier split, under another name."""

ALTERNATIVES = {
    "Could you widen the MLPs instead?": [("rivals", "L3", "dense, wider")],
    "Could you add blocks instead?": [("rivals", "L3", "dense, deeper")],
    "Could you train the plain model for longer?": [("rivals", "L3", "dense, longer")],
    "Would a mixture of experts of this size fit your GPUs?": [("rivals", "L3", "MoE")],
    "Could you use Engram's hashed n-grams instead?": [("rivals", "L3", "Engram")],
    "Would one row per token do?": [("rivals", "L3", "per-layer embedding")],
    "Will you train for much longer (against wider MLPs)?": [
        ("long", "2 x tokens: L3", "2 x tokens: dense, wider"),  # as the predecessor calls them
        ("long", "L3", "dense, wider"),
    ],
}
"""What one might do instead of adding L3, as questions, and the comparisons that `ask` takes."""


@dataclass(frozen=True)
class Records:
    """The families of an experiment, and the models that they are compared with."""

    experiment: str
    place: Place
    families: dict[str, Family]
    references: dict[str, Family]
    """The families of the main comparison on the same text: "dense", "dense, wider" and others."""

    @property
    def label(self) -> str:
        """The text, the smallest number of seeds, and whether the split is the earlier one."""
        data, folder = self.place
        text = {ENGLISH: "English", SOURCE: "source code"}.get(data, data)
        seeds = min(len(family.runs) for family in self.families.values())
        return f"{'earlier split, ' * (folder == FIRST_RUNS)}{text}, {seeds} seeds"

    def gain(self, of: str, over: str = "dense") -> Gain:
        """The gain of one family over another, each of the experiment or else of the references.

        Raises MissingRun for a family that is in neither.
        """
        known = self.references | self.families
        if missing := {of, over} - known.keys():
            raise MissingRun(f"{OPEN}: {command(self.experiment)}, which lacks {', '.join(missing)}")
        return gain_on_common_seeds(known[of].losses(), known[over].losses())


def newest(experiment: str) -> Records:
    """The records of an experiment, or of its predecessor, in the first of PLACES that has them all.

    Raises MissingRun, with the command that records the experiment, if none has.
    """
    for place in PLACES:
        try:
            return recorded(experiment, place)
        except MissingRun:
            continue
    raise MissingRun(f"{OPEN}: {command(experiment)}")


def command(experiment: str) -> str:
    """The command that records an experiment on the text that carries the claims."""
    return f"python -m l3paper.experiments {experiment} --data {TEXT!r}"


def recorded(experiment: str, place: Place) -> Records:
    """The records of an experiment in one place; MissingRun if they or the references are not there."""
    name, references = experiment, "rivals"
    if place[1] == FIRST_RUNS:
        name, references = EARLIER.get(experiment, experiment), EARLIER[references]
    return Records(name, place, _families(name, place), _families(references, place))


@lru_cache(maxsize=64)
def _families(experiment: str, place: Place) -> dict[str, Family]:
    data, folder = place
    return results(experiment, data=data, folder=folder)


def ask(*ways: tuple[str, str, str]) -> tuple[Gain, str]:
    """The gain that answers a question, and the label of its records.

    `ways` are (experiment, family, family that it is compared with); the first that is recorded is
    taken. Raises MissingRun, with the command for the first, if none is.
    """
    for experiment, of, over in ways:
        try:
            records = newest(experiment)
            return records.gain(of, over), records.label
        except MissingRun:
            continue
    raise MissingRun(f"{OPEN}: {command(ways[0][0])}")


def alternatives() -> tuple[dict[str, Gain | None], dict[str, str]]:
    """The gain of L3 over each of ALTERNATIVES, None if it is not recorded, and the records' labels."""
    gains: dict[str, Gain | None] = {}
    labels = {}
    for question, ways in ALTERNATIVES.items():
        try:
            gains[question], labels[question] = ask(*ways)
        except MissingRun:
            gains[question], labels[question] = None, f"`{command(ways[0][0])}`"
    return gains, labels


def say(gains: Mapping[str, Gain | None]) -> dict[str, str]:
    """Each gain with "better", "worse" or "not decided", after Holm's correction for all of them.

    None stands for what is not recorded yet; the correction counts it all the same.
    """
    rows = [gain and Evidence(gain, above=0.0) for gain in gains.values()]
    said = {}
    for (name, gain), row, verdict in zip(gains.items(), rows, verdicts(rows), strict=True):
        if row is None:
            said[name] = OPEN
        elif verdict.word == UNDECIDED:
            needed = row.seeds_needed(LEVEL / len(rows)) or "more than 1,000"
            said[name] = f"{gain}, not decided; {needed} seeds would decide"
        else:
            said[name] = f"{gain}, {'better' if verdict.word == AGREES else 'worse'}"
    return said


def rows_and_width() -> tuple[dict[int, dict[int, Gain]], str]:
    """Gains over wider MLPs of equal operations, by width and by rows per token, and their label."""
    first = newest("rows_width")
    others = ("rivals", "many_rows") if first.experiment == "rows_width" else ("width",)
    found = [first]
    for name in others:
        try:
            found.append(recorded(name, first.place))
        except MissingRun:
            continue
    points: dict[int, dict[int, Gain]] = {}
    for records in found:
        for name, family in records.families.items():
            config = family.runs[0]["config"]
            changed = config["stand_in"] or config["l3_allocation"] != "lzw"
            if changed or config["l3_after_layers"] is not None:  # not one LZW layer in the middle
                continue
            rows = config["l3_n_emb"] // config["vocab_size"]
            rival = name.replace(": L3", ": dense, wider") if ": L3" in name else "dense, wider"
            points.setdefault(config["n_embd"], {})[rows] = records.gain(name, rival)
    ordered = {width: dict(sorted(by_rows.items())) for width, by_rows in sorted(points.items())}
    return ordered, first.label
