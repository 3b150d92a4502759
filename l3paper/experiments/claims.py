"""What the paper claims, beside what the recorded runs say.

A gain is a difference of losses between models trained from the same seed on the same batches. Its
interval is Student's, over the seeds, so that few seeds make it wide; a verdict on it is read off the
interval alone. Speeds are single runs of a benchmark.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from l3paper.experiments.catalogue import ENGLISH
from l3paper.experiments.runs import Family, MissingRun, results
from l3paper.insight.record import insights, lens_drops
from l3paper.records import RECORDS, read_record

EQUAL = 0.02
"""Nats a token that still count as equal: a third of the least gain that the paper reports."""

_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t, two-sided, by the number of seeds (one more than the degrees of freedom)."""

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decidable at this scale"
OPEN = "not recorded yet"


class Gain(NamedTuple):
    """Nats a token by which one model is better than another, and its 95 % interval."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"

    def when_better(self) -> str:
        """The verdict on the claim that there is a gain."""
        return AGREES if self.low > 0 else DISAGREES if self.high < 0 else UNDECIDED

    def when_equal(self) -> str:
        """The verdict on the claim that there is none to speak of, either way."""
        if max(-self.low, self.high) < EQUAL:
            return AGREES
        return DISAGREES if max(self.low, -self.high) > EQUAL else UNDECIDED


def over_seeds(gaps: Sequence[float]) -> Gain:
    """The gain from gaps by seed; ValueError for fewer than two, or more than are tabled."""
    if len(gaps) not in _T_95:
        raise ValueError(f"there are {len(gaps)} seeds; an interval needs {min(_T_95)} to {max(_T_95)}")
    mean = statistics.fmean(gaps)
    half = _T_95[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return Gain(mean, mean - half, mean + half, tuple(gaps))


def paired_gain(of: Sequence[float], over: Sequence[float]) -> Gain:
    """The gain from losses by seed; ValueError as of `over_seeds`."""
    return over_seeds([theirs - ours for ours, theirs in zip(of, over, strict=True)])


def final_gain(of: Family, over: Family) -> Gain:
    """On all held-out text, at the end of training."""
    return _gain(of, over, -1)


def early_gain(of: Family, over: Family) -> Gain:
    """On the sample of the held-out text that the first evaluation after the start takes."""
    return _gain(of, over, 1)


def _gain(of: Family, over: Family, evaluation: int) -> Gain:
    """Over the seeds that both families have."""
    ours, theirs = (
        {run["config"]["seed"]: run["evaluations"][evaluation]["loss"] for run in family.runs}
        for family in (of, over)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return paired_gain([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


@dataclass(frozen=True)
class Claim:
    text: str
    reported: str
    """The paper's own number or words for it."""
    measure: Callable[[], tuple[str, str]]
    """What the records say, and the verdict; MissingRun where there are none."""

    def row(self) -> tuple[str, str, str, str]:
        """Of the table of claims."""
        try:
            found, verdict = self.measure()
        except MissingRun:
            found, verdict = "", OPEN
        return self.text, self.reported, found, verdict


def _compare(
    experiment: str,
    of: str,
    over: str,
    verdict=Gain.when_better,
    gain=final_gain,
    data: str = "stdlib",
) -> Callable[[], tuple[str, str]]:
    def measure() -> tuple[str, str]:
        families = results(experiment, data=data)
        found = gain(families[of], families[over])
        return f"{found} nats, {of} over {over}", verdict(found)

    return measure


def _training_speed() -> tuple[str, str]:
    """On a GPU where that is recorded; a CPU's number says nothing about the paper's."""
    try:
        record = _on_gpu("throughput")
    except MissingRun:
        record = read_record(RECORDS / "train_step_main.json")
        speed = {row["model"]: row["speed_of_dense"] for row in record["results"]}["L3"]
        return f"{speed:.0%} on a CPU, one run", UNDECIDED
    speed = min(row["speed_of_dense"] for row in record["results"])
    return f"{speed:.0%} on {record['environment']['device']}", AGREES if speed >= 0.87 else DISAGREES


def _decoding_speed() -> tuple[str, str]:
    record = _on_gpu("decode")
    speed = {
        row["batch"]: row["of_resident"]
        for row in record["results"]
        if row["model"] == "L3 offloaded" and row["batch"] in (1, 300)
    }
    found = ", ".join(f"{share:.0%} at batch {batch}" for batch, share in speed.items())
    agrees = speed[1] >= 0.89 and speed[300] >= 0.86
    return f"{found}, on {record['environment']['device']}", AGREES if agrees else DISAGREES


def _on_gpu(part: str) -> dict:
    path = RECORDS / "gpu" / f"{part}.json"
    if not path.exists():
        raise MissingRun(f"there is no {path}: run make gpu")
    return read_record(path)


def caching_gain(layer: int) -> Gain:
    """Nats by which the lens falls more with this L3 layer, from 0, than with the sharpest block."""
    gaps = []
    for look in insights()["l3"]:
        drops = lens_drops(look)
        layers = [drop for name, drop in drops.items() if name.startswith("L3")]
        sharpest = max(drop for name, drop in drops.items() if name.startswith("block"))
        gaps.append(layers[layer] - sharpest)
    return over_seeds(gaps)


def lookup_gain() -> Gain:
    """How much nearer the first L3 layer's softmax is to the choice of one row than the second's.

    As a share of the distance from uniform that the choice of one row would have.
    """
    shares = [
        [choice["share_of_most"] for choice in look["choices"].values()] for look in insights()["l3"]
    ]
    first, second = zip(*shares, strict=True)
    return paired_gain(of=second, over=first)


def _insight(gain: Callable[[], Gain], what: str) -> Callable[[], tuple[str, str]]:
    def measure() -> tuple[str, str]:
        found = gain()
        return f"{found} {what}", found.when_better()

    return measure


DENSE_GAIN = "+0.06 to +0.12 nats, WikiText-2"

CLAIMS = (
    Claim(
        "L3 is better than a dense model of equal operations (wider)",
        DENSE_GAIN,
        _compare("main", "L3", "dense, wider"),
    ),
    Claim(
        "L3 is better than a dense model of equal operations (deeper)",
        DENSE_GAIN,
        _compare("main", "L3", "dense, deeper"),
    ),
    Claim(
        "L3 is better than an MoE of equal operations and parameters",
        "better",
        _compare("main", "L3", "MoE"),
    ),
    *(
        Claim(f"The same on English text: {name}", "", _compare("main", "L3", rival, data=ENGLISH))
        for name, rival in {
            "wider": "dense, wider",
            "deeper": "dense, deeper",
            "MoE": "MoE",
        }.items()
    ),
    Claim(
        "The lead over dense shows from the start of training",
        "shown",
        _compare("main", "L3", "dense", gain=early_gain),
    ),
    Claim(
        "LZW gives rows out better than uniformly",
        "uniform loses nearly all of the gain",
        _compare("allocation", "LZW", "uniform"),
    ),
    Claim(
        "A cap on the rows of a token costs next to nothing (here 64, of 4,096 rows)",
        "512 almost equal to no cap",
        _compare("k_max", "k = 64", "no cap", Gain.when_equal),
    ),
    Claim(
        "Keys and values may share a table",
        "about equal",
        _compare("tying", "tied", "untied", Gain.when_equal),
    ),
    Claim(
        "One table is as good as two of half the rows",
        "about equal",
        _compare("count", "1 x v", "2 x v / 2", Gain.when_equal),
    ),
    Claim(
        "... as four of a quarter",
        "about equal",
        _compare("count", "1 x v", "4 x v / 4", Gain.when_equal),
    ),
    Claim(
        "The middle is the best place: better than behind the first block",
        "middle best",
        _compare("placement", "after 1", "after 0"),
    ),
    Claim(
        "... than behind the last",
        "middle best",
        _compare("placement", "after 1", "after 3"),
    ),
    Claim(
        "L3 trains at 87 % of the dense model's tokens/s, or more", "87 %, eight A100", _training_speed
    ),
    Claim(
        "Tables in CPU memory hardly slow decoding",
        "89 % at batch 1, 86 % at batch 300, one B200",
        _decoding_speed,
    ),
    Claim(
        "L3 layers cache: what a model knows of its answer rises sharply with the first",
        "sharp drops of a tuned lens",
        _insight(partial(caching_gain, 0), "nats, its drop over the sharpest of a block"),
    ),
    Claim(
        "... and with the second",
        "sharp drops of a tuned lens",
        _insight(partial(caching_gain, 1), "nats, its drop over the sharpest of a block"),
    ),
    Claim(
        "The first L3 layer is more like a lookup, the second more like an average",
        "shown",
        _insight(lookup_gain, "of the way to one row, first over second"),
    ),
)
"""In the order of the paper's results and ablations."""


def table() -> list[tuple[str, ...]]:
    """A head, and a row for every claim: the paper's number, ours with its interval, the verdict."""
    head = "the paper's claim", "as reported", "recorded here, 95 % interval", "verdict"
    return [head, *(claim.row() for claim in CLAIMS)]
