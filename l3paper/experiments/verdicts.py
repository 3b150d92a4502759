"""The claims that the runs being made anew decide, each in its own strength, stated before the runs.

A gain is in nats per token on all held-out text at the end of training, paired by seed. Holm's
procedure corrects the verdicts for the whole table, rows without records included. Two models count as
equal if their losses differ by less than MARGIN of the gain of L3 over the wider dense model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from l3paper.experiments.catalogue import ENGLISH
from l3paper.experiments.runs import RUNS, MissingRun, final_loss
from l3paper.experiments.search import Family, results
from l3paper.experiments.statistics import (
    LEVEL,
    UNDECIDED,
    Evidence,
    Gain,
    gain_on_common_seeds,
    over_seeds,
    share_contrast,
    two_way_interval,
    verdicts,
)

MARGIN = 0.25
NEARLY_ALL = 0.8
"""The share of a gain from which on "nearly all of it" is lost or kept."""

OPEN = "not recorded yet"
SOURCE = "stdlib"


@dataclass(frozen=True)
class Claim:
    """A claim, and the evidence on it that the records give."""

    text: str
    reported: str
    """The paper's own number or words, or "not in the paper"."""
    evidence: Callable[[], Evidence]
    """Raises MissingRun until all runs that it needs are recorded."""
    families: Callable[[], tuple[Family, Family]] | None = None
    """Returns the two families of a plain gain, whose documents can be resampled as well."""


def _family(experiment: str, name: str, data: str) -> Family:
    return results(experiment, data=data, folder=RUNS)[name]


def _losses(family: Family, evaluation: int = -1) -> dict[int, float]:
    """Nats per token by seed."""
    if evaluation == -1:
        return {run["config"]["seed"]: final_loss(run) for run in family.runs}
    return {run["config"]["seed"]: run["evaluations"][evaluation]["loss"] for run in family.runs}


def gain(experiment: str, of: str, over: str, data: str = ENGLISH, evaluation: int = -1) -> Gain:
    """The gain of one family over another of the same experiment."""
    families = results(experiment, data=data, folder=RUNS)
    return gain_on_common_seeds(*(_losses(families[name], evaluation) for name in (of, over)))


def margin() -> float:
    """Nats per token that still count as equal on the English text."""
    return MARGIN * gain("rivals", "L3", "dense, wider").mean


def better(experiment: str, of: str, over: str, data: str = ENGLISH, evaluation: int = -1) -> Evidence:
    """That the first family is better than the second."""
    return Evidence(gain(experiment, of, over, data, evaluation), above=0.0)


def equal(experiment: str, of: str, over: str) -> Evidence:
    """That two families are equal, to within the margin."""
    limit = margin()
    return Evidence(gain(experiment, of, over), above=-limit, below=limit)


def loses_nearly_all() -> Evidence:
    """That with uniform rows less than a fifth of the gain of LZW's over the dense model remains."""
    dense = _losses(_family("rivals", "dense", ENGLISH))
    parts = [
        gain_on_common_seeds(_losses(_family("many_rows", name, ENGLISH)), dense).by_seed
        for name in ("uniform", "LZW")
    ]
    return Evidence(share_contrast(*parts, 1 - NEARLY_ALL), below=0.0)


def middle_over(place: str) -> Evidence:
    """That the mean of the middle places is better than another."""
    families = results("places", data=ENGLISH, folder=RUNS)
    first, second, other = (
        list(_losses(families[name]).values()) for name in ("after 1", "after 2", place)
    )
    return Evidence(over_seeds(np.array(other) - (np.array(first) + second) / 2), above=0.0)


def _plain(text: str, reported: str, *comparison: str) -> Claim:
    """The claim that L3 is better than a rival: (experiment, rival, text)."""
    experiment, rival, data = comparison
    return Claim(
        text,
        reported,
        partial(better, experiment, "L3", rival, data),
        lambda: (_family(experiment, "L3", data), _family(experiment, rival, data)),
    )


DENSE_GAIN = "+0.06 to +0.12 nats, WikiText-2"
OURS = "not in the paper"

RIVALS = {
    "dense, wider": ("a model of wider MLPs, of equal operations", DENSE_GAIN),
    "dense, deeper": ("a model of more blocks, of equal operations", DENSE_GAIN),
    "dense, longer": ("the dense model, trained until it has cost as much", OURS),
    "MLP in place": ("an MLP of equal operations in its place", OURS),
    "MoE": ("an MoE of equal operations and parameters", "better"),
    "Engram": ("an Engram layer of equal operations and parameters", OURS),
    "per-layer embedding": ("one row per token, of equal operations and parameters", OURS),
}
"""What L3 is compared with on English: in words, and what the paper reports."""

CLAIMS = (
    *(
        _plain(f"L3 is better than {words}", reported, "rivals", rival, ENGLISH)
        for rival, (words, reported) in RIVALS.items()
    ),
    *(
        _plain(f"On source code: L3 is better than {rival}", "", "source", rival, SOURCE)
        for rival in ("dense, wider", "dense, longer", "MoE", "Engram")
    ),
    Claim(
        "The lead over dense shows after a tenth of the steps",
        "from the start",
        partial(better, "rivals", "L3", "dense", evaluation=1),
    ),
    Claim("Uniform rows lose nearly all of the gain", "nearly all", loses_nearly_all),
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
)


def table() -> list[tuple[str, ...]]:
    """A head and one row per claim: the gain, its intervals, the verdict, and the seeds it needs."""
    found = [_evidence(claim) for claim in CLAIMS]
    head = "claim", "as reported", "nats, 95 % interval", "over documents, too", "verdict"
    rows = [head]
    for claim, evidence, verdict in zip(CLAIMS, found, verdicts(found), strict=True):
        if evidence is None:
            rows.append((claim.text, claim.reported, "", "", OPEN))
            continue
        words = f"{verdict.word}, p = {verdict.p:.2g}"
        if verdict.word == UNDECIDED:
            needed = evidence.seeds_needed(LEVEL / len(CLAIMS))
            words += f"; {needed or 'more than 1,000'} seeds would decide"
        rows.append((claim.text, claim.reported, str(evidence.gain), documents(claim), words))
    return rows


def _evidence(claim: Claim) -> Evidence | None:
    try:
        return claim.evidence()
    except MissingRun:
        return None


def documents(claim: Claim) -> str:
    """The interval of a plain gain over other seeds and other documents; "" for other claims."""
    if claim.families is None:
        return ""
    of, over = claim.families()
    pairs = [
        [np.array(run["evaluations"][-1]["documents"]["nats"]) for run in pair]
        for pair in zip(of.runs, over.runs, strict=False)
    ]
    tokens = np.array(of.runs[0]["evaluations"][-1]["documents"]["tokens"])
    low, high = two_way_interval(np.array([theirs - ours for ours, theirs in pairs]), tokens)
    return f"{low:+.4f} to {high:+.4f}"
