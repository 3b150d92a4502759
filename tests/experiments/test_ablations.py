"""The newest records of a question, with a label that says which they are."""

import pytest

from l3paper.experiments import ablations
from l3paper.experiments.ablations import ALTERNATIVES, alternatives, ask, newest, rows_and_width, say
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.runs import FIRST_RUNS, MissingRun
from l3paper.experiments.statistics import over_seeds

SOURCE_PLACES = ((ablations.SOURCE, FIRST_RUNS),)


@pytest.fixture
def earlier_source(monkeypatch):
    """Only the records of source code on the earlier split exist."""
    monkeypatch.setattr(ablations, "PLACES", SOURCE_PLACES)


def test_the_first_place_that_has_all_runs_is_taken(monkeypatch, tmp_path):
    places = (("english.txt", tmp_path), *SOURCE_PLACES)
    monkeypatch.setattr(ablations, "PLACES", places)
    found = newest("tying")
    assert found.place == SOURCE_PLACES[0]
    assert found.label == "earlier split, source code, 3 seeds"
    assert found.gain("dense", "tied").mean == -found.gain("tied").mean  # "dense" is a reference


def test_an_experiment_may_have_had_another_name(earlier_source):
    found = newest("places")
    assert found.experiment == "placement"
    assert "after 3" in found.families


def test_what_is_not_recorded_names_its_command(earlier_source):
    with pytest.raises(MissingRun, match=r"experiments large_vocabulary --data"):
        newest("large_vocabulary")
    with pytest.raises(MissingRun, match="lacks Engram"):
        newest("rivals").gain("L3", "Engram")
    with pytest.raises(MissingRun, match=r"experiments rivals --data"):
        ask(("rivals", "L3", "Engram"))


def test_the_first_way_that_is_recorded_answers(earlier_source):
    missing, there = ("rivals", "L3", "Engram"), ("rivals", "L3", "MoE")
    gain, label = ask(missing, there)
    assert gain == newest("rivals").gain("L3", "MoE")
    assert label.endswith("3 seeds")


def test_rows_and_width(earlier_source):
    points, _ = rows_and_width()
    assert list(points) == [32, 64, 96]
    assert list(points[64]) == [1, 2, 4, 8, 16]
    width = newest("width")
    assert points[32][4] == width.gain("0.5 x width: L3", "0.5 x width: dense, wider")


def test_verdicts_are_corrected_for_all_lines():
    clear, alone = over_seeds([0.1, 0.101, 0.099]), over_seeds([0.01, 0.02, 0.03])
    said = say({"clear": clear, "small": over_seeds([0.01, -0.01, 0.005]), "open": None})
    assert said["clear"].endswith("better")
    assert said["small"].endswith("seeds would decide")
    assert said["open"] == "not recorded yet"
    assert say({"loss": over_seeds([-0.1, -0.101, -0.099])})["loss"].endswith("worse")
    assert "not decided" in say({"alone": alone} | dict.fromkeys("abcd"))["alone"]


def test_alternatives(earlier_source):
    gains, labels = alternatives()
    longer = next(question for question in gains if "longer (" in question)
    assert gains[longer] == newest("long").gain("2 x tokens: L3", "2 x tokens: dense, wider")
    open_ones = [question for question in gains if gains[question] is None]
    assert len(open_ones) == 3
    assert all("python -m" in labels[question] for question in open_ones)
    for ways in ALTERNATIVES.values():
        experiment, *families = ways[-1]
        assert set(families) <= set(EXPERIMENTS[experiment].configs("laptop", "stdlib"))
