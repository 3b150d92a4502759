"""The benchmarks: what they time, the floors, and the command line."""

import json
from dataclasses import replace

import pytest
import torch

from helpers import make_inputs
from l3paper.bench.__main__ import main
from l3paper.bench.correctness import check_lookups
from l3paper.bench.lookup import SETTINGS, bench_allocation, bench_lookup, bench_optimizer, flex
from l3paper.bench.report import tables
from l3paper.bench.training import SIZES
from l3paper.costs.accounting import account
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.lookup import LOOKUPS, loop

CPU = torch.device("cpu")
ONCE = ["--repeats", "1"]


def recorded(path, *flags):
    """The record of a benchmark on the CPU."""
    assert main([*flags, "--device", "cpu", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_lookup_table_and_record(corpus, tmp_path, capfd):
    record = recorded(tmp_path / "lookup.json", "lookup", "--setting", "smoke", *ONCE)
    said = capfd.readouterr()
    assert said.err == ""
    printed = said.out.splitlines()
    by_name = {row["lookup"]: row for row in record["results"]}
    assert list(by_name)[-2:] == ["grouped", "sum of the floors"]
    assert len(printed) == 1 + len(by_name)
    assert printed[0].endswith("times grouped")
    assert record["setting"] == {"setting": "smoke", "repeats": 1, "dtype": "float32"}
    assert record["corpus"] == {"name": "stdlib", "sha256": corpus.sha256}
    assert by_name["grouped"]["times_grouped"] == 1
    assert all(row["seconds"] > 0 for row in by_name.values())


def test_padded_is_left_out_if_it_does_not_fit(corpus, capsys, monkeypatch):
    monkeypatch.setattr("l3paper.bench.lookup.MOST_PADDED", 1_000_000)
    results = bench_lookup("smoke", 1, CPU, "bfloat16")
    assert "padded is left out: it would gather" in capsys.readouterr().err
    assert "padded" not in {row["lookup"] for row in results}
    assert all(row["seconds"] > 0 for row in results)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("tied", [True, False])
def test_flex_attention_computes_the_same_lookup(tied):
    inputs = [
        t.detach().float() if t.is_floating_point() else t
        for t in make_inputs([1, 40, 7, 150, 3], 200, 16, 16, tied, seed=4)
    ]
    torch.testing.assert_close(flex(*inputs), loop(*inputs))


def test_optimizer_compares_the_ways_to_update(corpus):
    by_name = {row["update"]: row for row in bench_optimizer("smoke", 1, CPU)}
    assert by_name["AdamW, fused"]["times_fused"] == 1
    touched = by_name["SparseAdam, touched rows only"]["rows"]
    assert 0 < touched < by_name["AdamW"]["rows"] == SETTINGS["smoke"].n_emb


def test_train_step_compares_with_dense(corpus, tmp_path, capsys):
    results = recorded(tmp_path / "step.json", "train-step", "--preset", "smoke", *ONCE)["results"]
    assert "optimizer share" in capsys.readouterr().out
    assert [row["model"] for row in results] == ["dense", "L3"]
    assert results[0]["speed_of_dense"] == 1
    assert all(row["optimizer_share"] > 0 for row in results)


def test_train_step_times_every_rival_beside_the_dense_model(tmp_path):
    record = recorded(
        tmp_path / "steps.json", "train-step", "--experiment", "rivals", "--preset", "smoke", *ONCE
    )
    configs = EXPERIMENTS["rivals"].configs("smoke", "stdlib")
    assert [row["model"] for row in record["results"]] == list(configs)
    assert {row["model"]: row["speed_of_dense"] for row in record["results"]}["dense"] == 1
    assert record["setting"] == {"preset": "smoke", "experiment": "rivals", "repeats": 1}


def test_throughput_accounts_for_a_step(tmp_path, capsys):
    rows = recorded(tmp_path / "throughput.json", "throughput", *ONCE)["results"]
    assert "optimizer share" in capsys.readouterr().out
    config = SIZES["smoke"]
    assert [row["model"] for row in rows] == ["dense", "L3", "L3, two layers"]
    assert rows[0]["speed_of_dense"] == 1
    assert rows[0]["lookup_share"] == rows[0]["projections_share"] == 0
    assert all(row["lookup_share"] > 0 != row["projections_share"] for row in rows[1:])
    table = config.l3_n_emb * config.n_embd
    totals = [row["total_parameters"] for row in rows]
    assert totals[2] - totals[1] == totals[1] - totals[0] > table
    for row in rows:
        tokens = row["seconds"] * row["tokens_per_second"]
        assert tokens == pytest.approx(config.batch_size * config.sequence_len)
        assert row["utilisation"] > 0
        assert any("mm" in one["operation"] for one in row["profile"])
        assert 0 < sum(one["share"] for one in row["profile"]) <= 1.001
    speeds, *profiles = tables(tmp_path).values()
    assert [row[0] for row in speeds] == ["model", *(row["model"] for row in rows)]
    assert "profile" not in speeds[0]
    assert len(profiles) == len(rows)


@pytest.mark.parametrize(("size", "least", "most"), [("100M", 95e6, 125e6), ("400M", 380e6, 440e6)])
def test_sizes_are_what_they_are_called(size, least, most):
    config = replace(SIZES[size], l3_after_layers="1")
    assert least < account(config.model_config(), mean_rows=30).active_parameters < most


def test_correctness_finds_a_wrong_lookup():
    lookups = LOOKUPS | {"wrong": lambda *inputs: 1.1 * loop(*inputs)}
    results = check_lookups(CPU, lookups, [[1, 40, 7]])
    assert {row["lookup"] for row in results} == lookups.keys() - {"loop"}
    assert {row["type"] for row in results} == {"float64", "float32", "bfloat16"}
    assert {row["lookup"] for row in results if row["verdict"] != "right"} == {"wrong"}
    assert all(row["verdict"] == "WRONG" for row in results if row["lookup"] == "wrong")


def test_correctness_reads_no_text(tmp_path):
    record = recorded(tmp_path / "correctness.json", "correctness")
    assert "corpus" not in record
    assert {row["verdict"] for row in record["results"]} == {"right"}


def test_allocation_counts_tokens(corpus):
    scan, give = bench_allocation(1, CPU)
    assert scan["tokens_per_second"] == pytest.approx(len(corpus.train) / scan["seconds"])
    assert give["seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lookup", "--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["lookup", "--device", "abacus"], "device is 'abacus'"),
        (["lookup", "--json", "."], "'.' cannot be written"),
    ],
)
def test_bad_values(flags, message, capsys):
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m l3paper.bench: error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["nothing"], ["lookup", "--setting", "huge"], ["optimizer", "--sweep"]]
)
def test_unknown_flags(flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    assert flags[-1] in capsys.readouterr().err
