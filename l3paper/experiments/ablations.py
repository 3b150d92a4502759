"""Ablations and alternatives from the records: gains with their verdicts, as notebook 06 shows them."""

from collections.abc import Mapping
from dataclasses import dataclass

from l3paper.experiments.catalogue import EXPERIMENTS, TEXT
from l3paper.experiments.runs import OPEN, MissingRun
from l3paper.experiments.search import Family, results
from l3paper.experiments.statistics import (
    AGREES,
    UNDECIDED,
    Evidence,
    Gain,
    gain_on_common_seeds,
    verdicts,
)

ALTERNATIVES = {
    "Could you widen the MLPs instead?": ("rivals", "dense, wider"),
    "Could you add blocks instead?": ("rivals", "dense, deeper"),
    "Could you train the plain model for longer?": ("rivals", "dense, longer"),
    "Would a mixture of experts of this size fit your GPUs?": ("rivals", "MoE"),
    "Could you use Engram's hashed n-grams instead?": ("rivals", "Engram"),
    "Would one row per token do?": ("rivals", "per-layer embedding"),
    "Will you train for much longer (against wider MLPs)?": ("long", "dense, wider"),
}
"""What one might do instead of adding L3, as questions: an experiment, and the family in it."""


@dataclass(frozen=True)
class Records:
    """The families of an experiment, and those to compare them with: of `rivals`, if on its text."""

    families: dict[str, Family]
    references: dict[str, Family]

    @property
    def label(self) -> str:
        """The smallest number of seeds, in words."""
        return f"{min(len(family.runs) for family in self.families.values())} seeds"

    def gain(self, of: str, over: str = "dense") -> Gain:
        """The gain of one family over another, each of the experiment or else of the references.

        Raises KeyError for a family that is in neither.
        """
        known = self.references | self.families
        return gain_on_common_seeds(known[of].losses(), known[over].losses())


def recorded(experiment: str) -> Records:
    """The records of an experiment.

    Raises MissingRun, with the command that records the experiment, if a run is missing.
    """
    names = [experiment] + ["rivals"] * (EXPERIMENTS[experiment].text == TEXT)
    families = []
    for name in names:
        try:
            families.append(results(name))
        except MissingRun as error:
            command = f"python -m l3paper.experiments {name} --data {EXPERIMENTS[name].text!r}"
            raise MissingRun(f"{OPEN}: {command}") from error
    return Records(families[0], families[-1])


def alternatives() -> dict[str, Gain | None]:
    """The gain of L3 over each of ALTERNATIVES, None if it is not recorded."""
    gains: dict[str, Gain | None] = {}
    for question, (experiment, rival) in ALTERNATIVES.items():
        try:
            gains[question] = recorded(experiment).gain("L3", rival)
        except MissingRun:
            gains[question] = None
    return gains


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
            said[name] = f"{gain}, not decided; {row.what_would_decide(len(rows))}"
        else:
            said[name] = f"{gain}, {'better' if verdict.word == AGREES else 'worse'}"
    return said


def rows_and_width() -> dict[int, dict[int, Gain]]:
    """Gains over wider MLPs of equal FLOPs, by width and by rows per token, if recorded.

    They are of the L3 models of `rivals`, `many_rows` (which cost up to 1 % more) and `rows_width`.
    """
    wide = EXPERIMENTS["rows_width"].configs("laptop", TEXT)
    sizes = [name.removesuffix(": L3") for name in wide if name.endswith(": L3")]
    compared = [("rows_width", f"{size}: L3", f"{size}: dense, wider") for size in sizes]
    compared += [("rivals", "L3", "dense, wider"), ("many_rows", "LZW", "dense, wider")]
    points: dict[int, dict[int, Gain]] = {}
    for experiment, name, rival in compared:
        try:
            records = recorded(experiment)
        except MissingRun:
            continue
        config = records.families[name].runs[0]["config"]
        rows = config["l3_n_emb"] // config["vocab_size"]
        points.setdefault(config["n_embd"], {})[rows] = records.gain(name, rival)
    return {width: dict(sorted(by_rows.items())) for width, by_rows in sorted(points.items())}
