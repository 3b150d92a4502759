"""The paper's claims, beside what the recorded runs say.

Gains, intervals and verdicts are those of `l3paper.experiments.statistics`. Speeds are single runs of a
benchmark.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from l3paper.experiments.catalogue import ENGLISH
from l3paper.experiments.runs import MissingRun
from l3paper.experiments.search import Family, results
from l3paper.experiments.statistics import (
    AGREES,
    DISAGREES,
    UNDECIDED,
    Gain,
    early_gain,
    final_gain,
    over_seeds,
    paired_gain,
)
from l3paper.insight.record import insights, lens_drops
from l3paper.records import RECORDS, read_record

OPEN = "not recorded yet"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how to measure it on the records."""

    text: str
    reported: str
    """The paper's own number or words."""
    measure: Callable[[], tuple[str, str]]
    """Returns what the records say, and the verdict. Raises MissingRun if there are no records."""

    def row(self) -> tuple[str, str, str, str]:
        """The claim's row in the table of claims."""
        try:
            recorded, verdict = self.measure()
        except MissingRun:
            recorded, verdict = "", OPEN
        return self.text, self.reported, recorded, verdict


def compare(
    experiment: str,
    of: str,
    over: str,
    gain: Callable[[Family, Family], Gain] = final_gain,
    verdict: Callable[[Gain], str] = Gain.when_better,
    data: str = "stdlib",
) -> tuple[str, str]:
    """The gain of one family over another, and the verdict on it."""
    families = results(experiment, data=data)
    measured = gain(families[of], families[over])
    return f"{measured} nats, {of} over {over}", verdict(measured)


def training_speed() -> tuple[str, str]:
    """L3's share of the dense model's speed in training.

    A CPU's number says nothing about the paper's, so it counts only if a GPU's is recorded.
    """
    try:
        record = _gpu_record("throughput")
    except MissingRun:
        record = read_record(RECORDS / "train_step_main.json")
        speed = {row["model"]: row["speed_of_dense"] for row in record["results"]}["L3"]
        return f"{speed:.0%} on a CPU, one run", UNDECIDED
    speed = min(row["speed_of_dense"] for row in record["results"])
    return f"{speed:.0%} on {record['environment']['device']}", AGREES if speed >= 0.87 else DISAGREES


def decoding_speed() -> tuple[str, str]:
    """The speed of decoding with tables in CPU memory, as a share of that with resident tables."""
    record = _gpu_record("decode")
    speed = {
        row["batch"]: row["of_resident"]
        for row in record["results"]
        if row["model"] == "L3 offloaded" and row["batch"] in (1, 300)
    }
    shares = ", ".join(f"{share:.0%} at batch {batch}" for batch, share in speed.items())
    agrees = speed[1] >= 0.89 and speed[300] >= 0.86
    return f"{shares}, on {record['environment']['device']}", AGREES if agrees else DISAGREES


def _gpu_record(part: str) -> dict:
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
    """How much nearer the first L3 layer's softmax is to choosing one row than the second's.

    The unit is a share of the distance from uniform that choosing one row has.
    """
    shares = [
        [choice["share_of_most"] for choice in look["choices"].values()] for look in insights()["l3"]
    ]
    first, second = zip(*shares, strict=True)
    return paired_gain(of=second, over=first)


def look_inside(gain: Callable[[], Gain], unit: str) -> tuple[str, str]:
    """A gain from the recorded looks inside the models, and the verdict on it."""
    measured = gain()
    return f"{measured} {unit}", measured.when_better()


DENSE_GAIN = "+0.06 to +0.12 nats, WikiText-2"

CLAIMS = (
    Claim(
        "L3 is better than a dense model of equal operations (wider)",
        DENSE_GAIN,
        partial(compare, "main", "L3", "dense, wider"),
    ),
    Claim(
        "L3 is better than a dense model of equal operations (deeper)",
        DENSE_GAIN,
        partial(compare, "main", "L3", "dense, deeper"),
    ),
    Claim(
        "L3 is better than an MoE of equal operations and parameters",
        "better",
        partial(compare, "main", "L3", "MoE"),
    ),
    *(
        Claim(
            f"The same on English text: {rival.removeprefix('dense, ')}",
            "",
            partial(compare, "main", "L3", rival, data=ENGLISH),
        )
        for rival in ("dense, wider", "dense, deeper", "MoE")
    ),
    Claim(
        "The lead over dense shows from the start of training",
        "shown",
        partial(compare, "main", "L3", "dense", gain=early_gain),
    ),
    Claim(
        "LZW gives rows out better than uniformly",
        "uniform loses nearly all of the gain",
        partial(compare, "allocation", "LZW", "uniform"),
    ),
    Claim(
        "A cap on the rows of a token costs next to nothing (here 64, of 4,096 rows)",
        "512 almost equal to no cap",
        partial(compare, "k_max", "k = 64", "no cap", verdict=Gain.when_equal),
    ),
    Claim(
        "Keys and values may share a table",
        "about equal",
        partial(compare, "tying", "tied", "untied", verdict=Gain.when_equal),
    ),
    Claim(
        "One table is as good as two of half the rows",
        "about equal",
        partial(compare, "count", "1 x v", "2 x v / 2", verdict=Gain.when_equal),
    ),
    Claim(
        "... as four of a quarter",
        "about equal",
        partial(compare, "count", "1 x v", "4 x v / 4", verdict=Gain.when_equal),
    ),
    Claim(
        "The middle is the best place: better than behind the first block",
        "middle best",
        partial(compare, "placement", "after 1", "after 0"),
    ),
    Claim(
        "... than behind the last",
        "middle best",
        partial(compare, "placement", "after 1", "after 3"),
    ),
    Claim(
        "L3 trains at 87 % of the dense model's tokens/s, or more", "87 %, eight A100", training_speed
    ),
    Claim(
        "Tables in CPU memory hardly slow decoding",
        "89 % at batch 1, 86 % at batch 300, one B200",
        decoding_speed,
    ),
    Claim(
        "L3 layers cache: what a model knows of its answer rises sharply with the first",
        "sharp drops of a tuned lens",
        partial(look_inside, partial(caching_gain, 0), "nats, its drop over the sharpest of a block"),
    ),
    Claim(
        "... and with the second",
        "sharp drops of a tuned lens",
        partial(look_inside, partial(caching_gain, 1), "nats, its drop over the sharpest of a block"),
    ),
    Claim(
        "The first L3 layer is more like a lookup, the second more like an average",
        "shown",
        partial(look_inside, lookup_gain, "of the way to one row, first over second"),
    ),
)
"""In the order of the paper's results and ablations."""


def table() -> list[tuple[str, ...]]:
    """A head and one row per claim: the paper's number, ours with its interval, and the verdict."""
    head = "the paper's claim", "as reported", "recorded here, 95 % interval", "verdict"
    return [head, *(claim.row() for claim in CLAIMS)]
