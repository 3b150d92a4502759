"""Gains, their intervals and verdicts, and the table of the paper's claims."""

from pathlib import Path

import pytest

from l3paper.experiments.claims import CLAIMS, OPEN, Claim, table
from l3paper.experiments.runs import MissingRun
from l3paper.experiments.search import Family
from l3paper.experiments.statistics import (
    AGREES,
    DISAGREES,
    EQUAL,
    UNDECIDED,
    early_gain,
    final_gain,
    paired_gain,
)
from l3paper.records import markdown


@pytest.mark.parametrize(
    ("gaps", "better", "equal"),
    [
        ((0.05, 0.06, 0.07), AGREES, DISAGREES),
        ((-0.05, -0.06, -0.07), DISAGREES, DISAGREES),
        ((0.001, 0.002, 0.003), UNDECIDED, AGREES),
        ((0.009, 0.010, 0.011), AGREES, AGREES),
        ((-0.05, 0.0, 0.06), UNDECIDED, UNDECIDED),
        ((EQUAL + 0.001, EQUAL, EQUAL - 0.001), AGREES, UNDECIDED),
    ],
)
def test_verdicts_are_read_off_the_interval(gaps, better, equal):
    gain = paired_gain([0.0] * 3, gaps)
    assert (gain.when_better(), gain.when_equal()) == (better, equal)


def family(*curves):
    runs = [{"evaluations": [{"loss": x} for x in curve]} for curve in curves]
    return Family({}, [run | {"config": {"seed": seed}} for seed, run in enumerate(runs)])


def test_gains_are_taken_at_the_first_evaluation_and_the_last():
    ours, theirs = family((9, 5, 2), (9, 6, 2)), family((9, 7, 3), (9, 9, 5))
    assert early_gain(ours, theirs).by_seed == (2, 3)
    assert final_gain(ours, theirs).by_seed == (1, 3)
    more = family((9, 7, 3), (9, 9, 5), (9, 1, 1))  # a third seed has no pair
    assert final_gain(ours, more) == final_gain(ours, theirs)


def test_table_has_a_verdict_for_every_claim():
    head, *rows = table()
    assert len(rows) == len(CLAIMS)
    assert all(len(row) == len(head) for row in rows)
    assert {row[-1] for row in rows} <= {AGREES, DISAGREES, UNDECIDED, OPEN}
    assert len({row[0] for row in rows}) == len(rows)


def test_claim_without_records_is_open():
    def measure():
        raise MissingRun("nothing there")

    assert Claim("text", "reported", measure).row() == ("text", "reported", "", OPEN)


def test_readme_shows_the_table_as_the_records_have_it():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert markdown(table()) in readme
