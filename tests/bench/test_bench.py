"""The benchmarks: what they time, the floors, and the command line."""

import json
from dataclasses import replace

import pytest
import torch

from helpers import make_inputs
from l3paper.bench import correctness
from l3paper.bench import lookup as bench
from l3paper.bench.lookup import SETTINGS, flex, main
from l3paper.bench.training import SIZES
from l3paper.costs.accounting import account
from l3paper.experiments.catalogue import EXPERIMENTS, without_and_with
from l3paper.lookup import LOOKUPS, loop
from l3paper.training.config import PRESETS

CPU = torch.device("cpu")


def test_lookup_table_and_record(corpus, tmp_path, capsys):
    path = tmp_path / "lookup.json"
    flags = ["lookup", "--setting", "smoke", "--repeats", "1", "--device", "cpu"]
    assert main([*flags, "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(path.read_text())
    names = [row["lookup"] for row in record["results"]]
    assert names[-2:] == ["grouped", "sum of the floors"]
    assert len(printed) == 1 + len(names)
    assert printed[0].endswith("times grouped")
    assert record["setting"]["positions"] == SETTINGS["smoke"].positions
    by_name = {row["lookup"]: row for row in record["results"]}
    assert by_name["grouped"]["times_grouped"] == 1
    assert by_name["grouped"]["peak_bytes"] < by_name["padded"]["peak_bytes"]
    assert 0 < by_name["sum of the floors"]["seconds"] < by_name["padded"]["seconds"]


def test_padded_is_left_out_where_it_does_not_fit(corpus, monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory_size", lambda device: 1_000_000)
    names = [row["lookup"] for row in bench.bench_lookup(SETTINGS["smoke"], 1, CPU)]
    assert "padded" not in names
    assert "grouped" in names
    assert "padded is left out: its gathers would need" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("tied", [True, False])
def test_flex_attention_computes_the_same_lookup(tied):
    inputs = [
        t.detach().float() if t.is_floating_point() else t
        for t in make_inputs([1, 40, 7, 150, 3], 200, 16, 16, tied, seed=4)
    ]
    torch.testing.assert_close(flex(*inputs), loop(*inputs))


def test_optimizer_compares_the_ways_to_update(corpus, capsys):
    results = bench.bench_optimizer(SETTINGS["smoke"], 1, CPU)
    by_name = {row["update"]: row for row in results}
    assert by_name["AdamW, fused"]["times_fused"] == 1
    touched = by_name["SparseAdam, touched rows only"]["rows"]
    assert 0 < touched < by_name["AdamW"]["rows"] == SETTINGS["smoke"].n_emb
    assert main(["optimizer", "--setting", "smoke", "--repeats", "1", "--device", "cpu"]) == 0
    assert "times fused" in capsys.readouterr().out


def test_lookup_in_bfloat16(corpus):
    results = bench.bench_lookup(SETTINGS["smoke"], 1, CPU, torch.bfloat16)
    assert all(row["seconds"] > 0 for row in results)


def test_train_step_compares_with_dense(corpus, capsys):
    results = bench.bench_train_step(without_and_with(PRESETS["smoke"]), 1, CPU)
    assert [row["model"] for row in results] == ["dense", "L3"]
    assert results[0]["speed_of_dense"] == 1
    assert all(0 < row["optimizer_share"] < 1 for row in results)
    assert main(["train-step", "--preset", "smoke", "--repeats", "1", "--device", "cpu"]) == 0
    assert "optimizer share" in capsys.readouterr().out


def test_train_step_times_every_model_of_the_main_comparison(tmp_path):
    record = tmp_path / "steps.json"
    flags = ["--experiment", "main", "--preset", "smoke", "--repeats", "1", "--device", "cpu"]
    assert main(["train-step", *flags, "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    assert [row["model"] for row in written["results"]] == list(
        EXPERIMENTS["main"].configs("smoke", "stdlib")
    )
    assert written["setting"] == {"experiment": "main", "preset": "smoke"}


def test_throughput_accounts_for_a_step(tmp_path, capsys):
    record = tmp_path / "throughput.json"
    flags = ["throughput", "--repeats", "1", "--device", "cpu", "--json", str(record)]
    assert main(flags) == 0
    written = json.loads(record.read_text())
    rows, config = written["results"], SIZES["smoke"]
    assert [row["model"] for row in rows] == ["dense", "L3", "L3, two layers"]
    assert rows[0]["speed_of_dense"] == 1
    assert rows[0]["lookup_share"] == rows[0]["projections_share"] == 0
    assert all(row["lookup_share"] > 0 < row["projections_share"] for row in rows[1:])
    table = config.l3_n_emb * config.n_embd
    totals = [row["total_parameters"] for row in rows]
    assert totals[2] - totals[1] == totals[1] - totals[0] > table
    for row in rows:
        tokens = row["seconds"] * row["tokens_per_second"]
        assert tokens == pytest.approx(config.batch_size * config.sequence_len)
        assert row["utilisation"] > 0
    for operations in written["profile"].values():
        assert any("mm" in row["operation"] for row in operations)
        assert 0 < sum(row["share"] for row in operations) <= 1.001
    assert "optimizer share" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "least", "most"), [("100M", 95e6, 125e6), ("400M", 380e6, 440e6)])
def test_sizes_are_what_they_are_called(size, least, most):
    config = replace(SIZES[size], l3_after_layers="1")
    assert least < account(config.model_config(), mean_rows=30).active_parameters < most


def test_correctness_finds_a_wrong_lookup(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(correctness, "ALLOCATIONS", ([1, 40, 7],))
    flags = ["correctness", "--device", "cpu", "--json", str(tmp_path / "c.json")]
    assert main(flags) == 0
    right = capsys.readouterr().out
    assert "WRONG" not in right
    assert all(
        name in right for name in ("grouped", "padded", "blocked", "bfloat16", "gradient of keys")
    )
    monkeypatch.setitem(LOOKUPS, "padded", lambda *inputs: 1.1 * loop(*inputs))
    assert main(flags) == 1
    wrong = [
        row
        for row in json.loads((tmp_path / "c.json").read_text())["results"]
        if row["verdict"] != "right"
    ]
    assert {row["lookup"] for row in wrong} == {"padded"}


def test_allocation_counts_tokens(corpus):
    scan, give = bench.bench_allocation(repeats=1)
    assert scan["tokens_per_second"] == pytest.approx(len(corpus.train) / scan["seconds"])
    assert give["seconds"] < scan["seconds"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lookup", "--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["lookup", "--device", "abacus"], "device is 'abacus'"),
        (["lookup", "--setting", "huge"], "invalid choice: 'huge'"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["lookup", "--json", "."], "'.' cannot be written"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
