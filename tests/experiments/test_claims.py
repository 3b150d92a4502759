"""The claims in their own strength, on made-up records, and the table that the README shows."""

from pathlib import Path

import numpy as np
import pytest

from l3paper.experiments import claims
from l3paper.experiments.catalogue import EXPERIMENTS, SMALL
from l3paper.experiments.runs import MissingRun
from l3paper.experiments.search import Family
from l3paper.experiments.statistics import AGREES, DISAGREES, UNDECIDED
from l3paper.records import markdown, write_record

TOKENS = [100, 300, 50, 250]


def family(name, mean, seeds, noise=0.002):
    """Runs whose losses are around `mean`."""
    runs = []
    for seed in range(seeds):
        draws = np.random.default_rng([seed, *name.encode()]).standard_normal(4)
        losses = mean + noise * draws
        nats = (losses * TOKENS).tolist()
        last = {"loss": sum(nats) / sum(TOKENS), "documents": {"tokens": TOKENS, "nats": nats}}
        last["step"] = 1100 if name == "dense, longer" else 1000
        early = {"loss": mean + noise * draws[0]}
        runs.append({"config": {"seed": seed}, "evaluations": [{}, early, last]})
    return Family({}, runs)


MEANS = {
    "rivals": {
        "L3": 3.50, "dense": 3.56, "dense, longer": 3.52, "dense, wider": 3.54, "dense, deeper": 3.54,
        "MLP in place": 3.55, "MoE": 3.50, "Engram": 3.44, "per-layer embedding": 3.53,
        "L3, two layers": 3.48,
    },
    "many_rows": {"LZW": 3.45, "uniform": 3.46, "frequency": 3.46, "MoE": 3.5},
    "tying": {"tied": 3.50, "untied": 3.501},
    "places": {
        "after 0": 3.52, "after 1": 3.5, "after 2": 3.51, "after 3": 3.49, "two of half the rows": 3.511
    },
}  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    """Records of four experiments on English; the others are missing."""

    def results(experiment):
        if experiment not in MEANS:
            raise MissingRun("not yet")
        plan = EXPERIMENTS[experiment].plan("laptop", "text")
        return {name: family(name, mean, plan[name].seeds) for name, mean in MEANS[experiment].items()}

    monkeypatch.setattr(claims, "results", results)


def test_every_claim_gets_the_verdict_of_its_records(made_up):
    head, *rows = claims.table()
    assert len(rows) == len(claims.CLAIMS) + len(claims.SPEEDS)
    assert all(len(row) == len(head) for row in rows)
    said = {row[0]: row[-1].partition(",")[0] for row in rows}
    assert said["L3 is better than a model of wider MLPs, of equal FLOPs"] == AGREES
    assert said["L3 is better than an Engram layer of equal FLOPs and parameters"] == DISAGREES
    assert said["L3 is better than an MoE of equal FLOPs and parameters"] == UNDECIDED
    # They keep 0.10 of 0.11.
    assert said["Uniform rows lose nearly all of the gain: less than a fifth is left"] == DISAGREES
    assert said["Keys and values may share a table"] == AGREES
    assert said["The middle is better than the first place"] == AGREES
    assert said["The middle is better than the last place"] == DISAGREES
    assert said["A cap of 64 rows costs nothing"] == claims.OPEN
    assert said["On source code: L3 is better than MoE"] == claims.OPEN


def test_undecided_rows_say_how_many_seeds_would_decide(made_up):
    (row,) = [row for row in claims.table() if "MoE of equal" in row[0]]
    assert "seeds would decide" in row[-1]


def test_plain_gains_have_an_interval_over_documents_too(made_up):
    for claim, row in zip(claims.CLAIMS, claims.table()[1:], strict=False):
        assert bool(row[3]) == (claim.families is not None and row[-1] != claims.OPEN)


def test_verdicts_stay_when_other_records_come_in(made_up, monkeypatch):
    before = {row[0]: row for row in claims.table()}
    monkeypatch.setitem(MEANS, "k_max", {"k = 64": 3.5, "no cap": 3.5005})
    after = {row[0]: row for row in claims.table()}
    decided = [text for text in before if before[text][-1].startswith(("agrees", "disagrees"))]
    assert len(decided) > 5
    for text in decided:
        assert after[text][-1].partition(",")[0] == before[text][-1].partition(",")[0]
    assert after["A cap of 64 rows costs nothing"][2]


def test_the_short_table_has_the_verdicts_of_the_whole_one(made_up):
    whole = {row[0]: row for row in claims.table()}
    short = claims.short_table()[1:]
    assert 8 <= len(short) <= 10
    for text, gain, verdict in short:
        assert (gain, verdict) == (whole[text][2], whole[text][4].partition(",")[0])


def test_equal_time_extrapolates_the_dense_model(made_up, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "RECORDS", tmp_path)
    with pytest.raises(MissingRun, match="bench train-step"):
        claims.equal_time()
    speeds = {"dense": 1.1**2, "L3": 1.0}  # so it has the time for 1.1**2 times the steps
    rows = [{"model": name, "tokens_per_second": speed} for name, speed in speeds.items()]
    write_record(tmp_path / "train_step.json", {"results": rows})
    means = MEANS["rivals"]
    then = means["dense"] + 2 * (means["dense, longer"] - means["dense"])
    assert claims.equal_time().gain.mean == pytest.approx(then - means["L3"], abs=0.005)


def test_claims_about_layers_read_looks_at_models_of_the_same_text(monkeypatch):
    def insights(data):
        assert data == claims.TEXT
        looks = []
        for seed in range(3):
            nats = [5.0, 4.0, 2.0 + 0.01 * seed, 1.5, 1.25]
            names = ["embedding", "block 0", "L3 after 0", "block 1", "L3 after 1"]
            parts = [{"of_frequent": {"information": nats + 0.01 * seed}} for nats in (0.3, 0.5)]
            choices = dict(zip("01", parts, strict=True))
            looks.append({"lens": dict(zip(names, nats, strict=True)), "choices": choices})
        return {"l3": looks}

    monkeypatch.setattr(claims, "insights", insights)
    assert claims.caching(0).gain.mean == pytest.approx(1 - 0.01)
    assert claims.caching(1).gain.mean == pytest.approx(-0.75)
    assert claims.choosing().gain.mean == pytest.approx(-0.2)


def test_speeds_are_read_from_the_records_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "RECORDS", tmp_path)
    training, decoding = claims.SPEEDS
    assert training.row()[-1] == decoding.row()[-1] == claims.OPEN
    environment = {"device": "a GPU"}
    steps = [{"speed_of_dense": share} for share in (1.0, 0.9, 0.85)]
    write_record(tmp_path / "gpu/throughput.json", {"environment": environment, "results": steps})
    assert training.row()[2:] == ("85% on a GPU", "", DISAGREES)
    shares = [
        {"model": "L3 offloaded", "batch": batch, "of_resident": share}
        for batch, share in ((1, 0.95), (8, 0.1), (300, 0.9))
    ]
    write_record(tmp_path / "gpu/decode.json", {"environment": environment, "results": shares})
    assert decoding.row()[2:] == ("95% at batch 1, 90% at batch 300 on a GPU", "", AGREES)


def test_readme_shows_the_short_table_as_the_records_have_it():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert markdown(claims.short_table()) in readme


def test_families_that_claims_name_are_in_the_catalogue():
    named = {
        "rivals": set(MEANS["rivals"]),
        "many_rows": set(MEANS["many_rows"]),
        "tying": {"tied", "untied"},
        "places": set(MEANS["places"]),
        "k_max": {"k = 64", "no cap"},
        "source": {"L3", "dense, wider", "dense, longer", "MoE", "Engram"},
    }
    base = SMALL["laptop"]
    for experiment, families in named.items():
        assert families <= EXPERIMENTS[experiment].families(base).keys()
