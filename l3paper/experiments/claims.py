"""The paper's claims and a practitioner's questions, and what the records say of them.

Each claim is tested as strongly as it is stated. The claims about losses were stated before the runs;
those about equal time and about what layers store were added during the runs, and more rows make the
correction stricter. A gain is in nats per token on all held-out text at the end of training (after a
tenth of the steps: on a sample), paired by seed. Holm's procedure corrects the verdicts for the whole
table, rows without records included. Two models count as equal if their losses differ by less than
MARGIN of the measured gain of L3 over the wider dense model, which is taken as exact. Speeds are single
runs of a benchmark, and have no intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from l3paper.experiments.catalogue import TEXT
from l3paper.experiments.runs import OPEN, MissingRun
from l3paper.experiments.search import results
from l3paper.experiments.statistics import (
    AGREES,
    DISAGREES,
    UNDECIDED,
    Evidence,
    Gain,
    Verdict,
    gain_on_common_seeds,
    over_seeds,
    share_contrast,
    two_way_interval,
    verdicts,
)
from l3paper.insight.record import insights, lens_drops
from l3paper.records import RECORDS, read_record

MARGIN = 0.25
NEARLY_ALL = 0.8
"""From this share of a gain on, nearly all of it is lost or kept."""


@dataclass(frozen=True)
class Claim:
    """A claim, and the evidence on it that the records give."""

    text: str
    reported: str
    """The paper's own number or words, or "not in the paper"."""
    evidence: Callable[[], Evidence]
    """Raises MissingRun until all runs that it needs are recorded."""
    families: tuple[str, str, str] | None = None
    """The experiment and the two families of a plain gain, whose documents can be resampled as well."""
    headline: bool = False
    """Whether the short table has it, too."""


def gain(experiment: str, of: str, over: str, evaluation: int = -1) -> Gain:
    """The gain of one family over another of the same experiment."""
    families = results(experiment)
    return gain_on_common_seeds(*(families[name].losses(evaluation) for name in (of, over)))


def margin() -> float:
    """Nats per token that still count as equal on the first text."""
    return MARGIN * gain("rivals", "L3", "dense, wider").mean


def better(experiment: str, of: str, over: str, evaluation: int = -1) -> Evidence:
    """That the first family is better than the second."""
    return Evidence(gain(experiment, of, over, evaluation), above=0.0)


def equal(experiment: str, of: str, over: str) -> Evidence:
    """That two families are equal, to within the margin."""
    limit = margin()
    return Evidence(gain(experiment, of, over), above=-limit, below=limit)


def loses_nearly_all() -> Evidence:
    """That with uniform rows less than a fifth of the gain of LZW's over the dense model remains."""
    dense, families = results("rivals")["dense"].losses(), results("many_rows")
    parts = [
        gain_on_common_seeds(families[name].losses(), dense).by_seed for name in ("uniform", "LZW")
    ]
    return Evidence(share_contrast(*parts, 1 - NEARLY_ALL), below=0.0)


def middle_over(place: str) -> Evidence:
    """That the mean of the middle places is better than another."""
    families = results("places")
    first, second, other = (
        list(families[name].losses().values()) for name in ("after 1", "after 2", place)
    )
    return Evidence(over_seeds(np.array(other) - (np.array(first) + second) / 2), above=0.0)


def equal_time() -> Evidence:
    """That L3 is better than the plain dense model, trained until it has taken as long on a CPU.

    The dense model's loss at that time lies, by seed, on the line through its runs of as many steps and
    those trained to equal FLOPs, against the logarithm of the steps: an extrapolation.
    """
    families = results("rivals")
    dense, longer, ours = (families[name].losses() for name in ("dense", "dense, longer", "L3"))
    steps = [families[name].runs[0]["evaluations"][-1]["step"] for name in ("dense", "dense, longer")]
    speed = training_speeds()
    far = np.log(speed["dense"] / speed["L3"]) / np.log(steps[1] / steps[0])
    then = {seed: dense[seed] + far * (longer[seed] - dense[seed]) for seed in dense}
    return Evidence(gain_on_common_seeds(ours, then), above=0.0)


def training_speeds() -> dict[str, float]:
    """Tokens per second of a training step of each family, measured side by side on a CPU."""
    path = RECORDS / "train_step.json"
    if not path.exists():
        raise MissingRun(f"there is no {path}: python -m l3paper.bench train-step --json")
    return {row["model"]: row["tokens_per_second"] for row in read_record(path)["results"]}


def caching(layer: int) -> Evidence:
    """That the lens falls more with this L3 layer, from 0, than with the sharpest block; in nats."""
    gaps = []
    for look in insights(data=TEXT)["l3"]:
        drops = lens_drops(look)
        layers = [drop for name, drop in drops.items() if name.startswith("L3")]
        sharpest = max(drop for name, drop in drops.items() if name.startswith("block"))
        gaps.append(layers[layer] - sharpest)
    return Evidence(over_seeds(gaps), above=0.0)


def choosing() -> Evidence:
    """That the first L3 layer's choice of rows tells more of the context than the second's, in nats."""
    gaps = []
    for look in insights(data=TEXT)["l3"]:
        first, second = (choice["of_frequent"]["information"] for choice in look["choices"].values())
        gaps.append(first - second)
    return Evidence(over_seeds(gaps), above=0.0)


@dataclass(frozen=True)
class Speed:
    """A claim of the paper's about speed on GPUs."""

    text: str
    reported: str
    part: str
    """The part of `l3paper.gpu` that records it."""
    measure: Callable[[dict], tuple[str, bool]]
    """Returns what its record says, and whether that agrees."""

    def row(self) -> tuple[str, ...]:
        """The claim's row in the table."""
        path = RECORDS / "gpu" / f"{self.part}.json"
        if not path.exists():
            return self.text, self.reported, "", "", OPEN
        record = read_record(path)
        said, agrees = self.measure(record)
        words = AGREES if agrees else DISAGREES
        return self.text, self.reported, f"{said} on {record['environment']['device']}", "", words


def training_share(record: dict) -> tuple[str, bool]:
    """L3's share of the dense model's tokens per second, the smallest of the record."""
    share = min(row["speed_of_dense"] for row in record["results"])
    return f"{share:.0%}", share >= 0.87


def decoding_share(record: dict) -> tuple[str, bool]:
    """The speed of decoding with tables in CPU memory, as a share of that with resident tables."""
    share = {
        row["batch"]: row["of_resident"]
        for row in record["results"]
        if row["model"] == "L3 offloaded" and row["batch"] in (1, 300)
    }
    said = ", ".join(f"{part:.0%} at batch {batch}" for batch, part in share.items())
    return said, share[1] >= 0.89 and share[300] >= 0.86


def _plain(text: str, reported: str, experiment: str, rival: str, headline: bool = True) -> Claim:
    """The claim that L3 is better than a rival, a family of the same experiment."""
    families = experiment, "L3", rival
    return Claim(text, reported, partial(better, *families), families, headline)


DENSE_GAIN = "+0.06 to +0.12 nats, WikiText-2"
OURS = "not in the paper"

RIVALS = {
    "dense, wider": ("a model of wider MLPs, of equal FLOPs", DENSE_GAIN),
    "dense, deeper": ("a model of more blocks, of equal FLOPs", DENSE_GAIN),
    "dense, longer": ("the dense model, trained for as many FLOPs", OURS),
    "MLP in place": ("an MLP of equal FLOPs in its place", OURS),
    "MoE": ("an MoE of equal FLOPs and parameters", "better"),
    "Engram": ("an Engram layer of equal FLOPs and parameters", OURS),
    "per-layer embedding": ("one row per token, of equal FLOPs and parameters", OURS),
}
"""What L3 is compared with on English: in words, and what the paper reports."""

CLAIMS = (
    *(
        _plain(f"L3 is better than {words}", reported, "rivals", rival)
        for rival, (words, reported) in RIVALS.items()
    ),
    *(
        _plain(f"On source code: L3 is better than {rival}", "", "source", rival, headline=False)
        for rival in ("dense, wider", "dense, longer", "MoE", "Engram")
    ),
    Claim(
        "The lead over dense shows after a tenth of the steps",
        "from the start",
        partial(better, "rivals", "L3", "dense", evaluation=1),
    ),
    Claim(
        "L3 is better than the dense model, trained for as much time on a CPU",
        OURS,
        equal_time,
        headline=True,
    ),
    Claim(
        "Uniform rows lose nearly all of the gain: less than a fifth is left",
        "nearly all",
        loses_nearly_all,
        headline=True,
    ),
    Claim("A cap of 64 rows costs nothing", "about equal", partial(equal, "k_max", "k = 64", "no cap")),
    Claim(
        "Keys and values may share a table", "about equal", partial(equal, "tying", "tied", "untied")
    ),
    Claim(
        "Two tables of half the rows in the middle are as good as one",
        "about equal",
        partial(equal, "places", "two of half the rows", "after 2"),
    ),
    Claim("The middle is better than the first place", "middle best", partial(middle_over, "after 0")),
    Claim("The middle is better than the last place", "middle best", partial(middle_over, "after 3")),
    Claim(
        "The first L3 layer brings a model nearer to its answer than any block does",
        "sharp drops of a tuned lens",
        partial(caching, 0),
    ),
    Claim(
        "The second L3 layer brings it nearer than any block does",
        "sharp drops of a tuned lens",
        partial(caching, 1),
    ),
    Claim("The first L3 layer chooses among rows by context more than the second", "shown", choosing),
)

SPEEDS = (
    Speed(
        "L3 trains at 87 % of the dense model's tokens per second, or more",
        "87 %, eight A100",
        "throughput",
        training_share,
    ),
    Speed(
        "Tables in CPU memory hardly slow decoding",
        "89 % at batch 1, 86 % at batch 300, one B200",
        "decode",
        decoding_share,
    ),
)


def table() -> list[tuple[str, ...]]:
    """A head and one row per claim: the gain, its intervals, the verdict, and the seeds it needs."""
    rows = [("claim", "as reported", "nats, 95 % interval", "over documents, too", "verdict")]
    for claim, evidence, verdict in _decided():
        if evidence is None:
            rows.append((claim.text, claim.reported, "", "", OPEN))
            continue
        words = f"{verdict.word}, p = {verdict.p:.2g}"
        if verdict.word == UNDECIDED:
            words += f"; {evidence.what_would_decide(len(CLAIMS))}"
        rows.append((claim.text, claim.reported, str(evidence.gain), documents(claim), words))
    return [*rows, *(speed.row() for speed in SPEEDS)]


def short_table() -> list[tuple[str, ...]]:
    """A head and one row per headline: the claim, its gain, and the verdict of the whole table."""
    return [
        ("claim", "nats per token, 95 % interval", "verdict"),
        *(
            (claim.text, str(evidence.gain) if evidence else "", verdict.word if evidence else OPEN)
            for claim, evidence, verdict in _decided()
            if claim.headline
        ),
    ]


def _decided() -> list[tuple[Claim, Evidence | None, Verdict]]:
    """Every claim with its evidence, None if it is not recorded, and its verdict."""
    found = [_evidence(claim) for claim in CLAIMS]
    return list(zip(CLAIMS, found, verdicts(found), strict=True))


def _evidence(claim: Claim) -> Evidence | None:
    """Raises ValueError, naming the claim, for records that cannot answer: of runs that diverged."""
    try:
        return claim.evidence()
    except MissingRun:
        return None
    except ValueError as error:
        raise ValueError(f"the records on {claim.text!r} cannot be used: {error}") from error


def documents(claim: Claim) -> str:
    """The interval of a plain gain over other seeds and other documents; "" for other claims."""
    if claim.families is None:
        return ""
    experiment, *names = claim.families
    of, over = (results(experiment)[name] for name in names)
    pairs = [
        [np.array(run["evaluations"][-1]["documents"]["nats"]) for run in pair]
        for pair in zip(of.runs, over.runs, strict=False)
    ]
    tokens = np.array(of.runs[0]["evaluations"][-1]["documents"]["tokens"])
    low, high = two_way_interval(np.array([theirs - ours for ours, theirs in pairs]), tokens)
    return f"{low:+.4f} to {high:+.4f}"
