"""Gains and verdicts that answer a question, from the records of its experiment."""

import pytest

from l3paper.experiments import ablations
from l3paper.experiments.ablations import ALTERNATIVES, alternatives, recorded, rows_and_width, say
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.runs import MissingRun
from l3paper.experiments.search import Family
from l3paper.experiments.statistics import over_seeds


@pytest.fixture
def made_up(monkeypatch):
    """Records of "rivals", "many_rows" and "rows_width" with losses that tell where they are from."""

    def family(config, number):
        runs = [
            {"config": config | {"seed": seed}, "evaluations": [{"loss": number + seed * number / 100}]}
            for seed in range(3)
        ]
        return Family({}, runs)

    made = {}
    for experiment in ("rivals", "many_rows", "rows_width"):
        configs = EXPERIMENTS[experiment].configs("laptop", "text")
        made[experiment] = {
            name: family(vars(config), len(made) + i / 8)
            for i, (name, config) in enumerate(configs.items())
        }

    def results(experiment):
        if experiment not in made:
            raise MissingRun("a run is missing")
        return made[experiment]

    monkeypatch.setattr(ablations, "results", results)
    return made


def test_a_family_is_compared_with_its_experiment_or_with_the_rivals(made_up):
    records = recorded("many_rows")
    assert records.label == "3 seeds"
    uniform, lzw = (made_up["many_rows"][name].losses() for name in ("uniform", "LZW"))
    assert records.gain("LZW", "uniform").by_seed == tuple(uniform[s] - lzw[s] for s in range(3))
    dense = made_up["rivals"]["dense"].losses()
    assert records.gain("LZW").by_seed == tuple(dense[s] - lzw[s] for s in range(3))
    assert records.gain("LZW", "MoE") != recorded("rivals").gain("L3", "MoE")  # its own MoE


def test_a_family_on_another_text_is_not_compared_with_the_rivals(made_up):
    made_up["long"] = made_up["rivals"] | {"L3": made_up["many_rows"]["LZW"]}
    del made_up["long"]["MoE"]
    records = recorded("long")
    assert records.gain("L3") == recorded("many_rows").gain("LZW")
    with pytest.raises(KeyError, match="MoE"):
        records.gain("L3", "MoE")


def test_what_is_not_recorded_names_its_command(made_up):
    made_up["parts"] = made_up.pop("rivals")
    with pytest.raises(MissingRun, match="experiments rivals --data"):
        recorded("parts")
    with pytest.raises(MissingRun, match=r"not recorded yet: .*experiments long --data 'english, 48"):
        recorded("long")


def test_rows_and_width(made_up):
    points = rows_and_width()
    assert {width: list(by_rows) for width, by_rows in points.items()} == {
        32: [1, 4, 16],
        64: [4, 16],
        96: [1, 4, 16],
    }
    narrow = recorded("rows_width").gain("0.5 x width, 4 rows: L3", "0.5 x width, 4 rows: dense, wider")
    assert points[32][4] == narrow
    assert points[64][16] == recorded("many_rows").gain("LZW", "dense, wider")


def test_alternatives(made_up):
    gains = alternatives()
    assert list(gains) == list(ALTERNATIVES)
    assert [question for question in gains if gains[question] is None] == [
        question for question, (experiment, _) in ALTERNATIVES.items() if experiment == "long"
    ]
    for experiment, rival in ALTERNATIVES.values():
        assert {"L3", rival} <= set(EXPERIMENTS[experiment].configs("laptop", "stdlib"))


def test_verdicts_are_corrected_for_all_lines():
    clear, alone = over_seeds([0.1, 0.101, 0.099]), over_seeds([0.01, 0.02, 0.03])
    said = say({"clear": clear, "small": over_seeds([0.01, -0.01, 0.005]), "open": None})
    assert said["clear"].endswith("better")
    assert said["small"].endswith("seeds would decide")
    assert said["open"] == "not recorded yet"
    assert say({"loss": over_seeds([-0.1, -0.101, -0.099])})["loss"].endswith("worse")
    assert "not decided" in say({"alone": alone} | dict.fromkeys("abcd"))["alone"]
