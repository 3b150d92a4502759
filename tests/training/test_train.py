"""The training loop: steps, schedule, passes, and the record of a run."""

import json
import math
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l3paper import GPT
from l3paper.data.streams import load_corpus
from l3paper.train import learning_rate_factor, train
from l3paper.training.build import build_model, rows_per_token
from l3paper.training.config import TrainConfig

EVERY = pytest.mark.parametrize("kind", ["dense", "l3 tied", "l3 untied"])


def test_passes_add_up_to_the_batch(tiny):
    torch.set_default_dtype(torch.float64)
    try:
        once, twice = (
            train(tiny("l3 tied", accumulate=passes), show_progress=False).record for passes in (1, 2)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for curve in ("train_loss", "evaluations"):
        losses = [[point["loss"] for point in record[curve]] for record in (once, twice)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # Muon rounds to bfloat16


def test_compiled_run_equals_the_run(tiny, run_of, monkeypatch):
    eager = partialmethod(GPT.compile_parts, backend="eager")
    monkeypatch.setattr(GPT, "compile_parts", eager)
    found = train(tiny("l3 tied", compile=True), show_progress=False).record["evaluations"]
    expected = run_of("l3 tied").record["evaluations"]
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-4)


def test_runs_of_one_process_share_the_scan_of_their_text(tiny):
    config = tiny("l3 tied")
    corpora = [load_corpus(config.data, config.vocab_size) for _ in range(2)]
    before = rows_per_token.cache_info()
    first, again = (build_model(config, corpus)[0] for corpus in corpora)
    assert torch.equal(*(next(iter(m.l3_layers.values())).bounds for m in (first, again)))
    rows = config.model_config().l3_n_emb + 1
    build_model(replace(config, l3_n_emb=rows), corpora[0])
    after = rows_per_token.cache_info()
    assert after.hits + after.misses == before.hits + before.misses + 3
    assert after.misses <= before.misses + 2


def test_passes_must_divide_the_batch(refused):
    said = "batch_size is 4; accumulate = 3 passes of 1 processes must divide it evenly"
    code, message = refused("--accumulate=3")
    assert (code, said in message) == (2, True)


def test_learning_rate_rises_stays_and_falls():
    curve = [learning_rate_factor(step, 200) for step in range(200)]
    assert curve[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(curve[4:101]) == {1.0}
    assert curve[150] == 0.5
    assert curve[101:] == sorted(curve[101:], reverse=True)
    assert curve[199] == pytest.approx(0.01)


@given(steps=st.integers(1, 400), share=st.floats(0, 1, exclude_max=True))
def test_learning_rate_is_never_zero_nor_above_its_peak(steps, share):
    assert 0 < learning_rate_factor(int(share * steps), steps) <= 1


def test_every_step_takes_its_factor(tiny):
    rates = []

    def note(run, step):
        rates.append([group["lr"] for group in run.optimizer.param_groups])

    model = train(tiny("l3 tied", lr_scale=2.0), show_progress=False, before_step=note).model
    base = [group["lr"] for group in model.setup_optimizer().param_groups]
    expected = [[2 * learning_rate_factor(step, 8) * lr for lr in base] for step in range(8)]
    assert np.allclose(rates, expected)


@EVERY
def test_record_describes_its_run(run_of, tiny, kind):
    model, corpus, record = run_of(kind).model, run_of(kind).corpus, run_of(kind).record
    config = tiny(kind)
    assert TrainConfig(**record["config"]) == replace(config, data="woods.txt")
    assert record["corpus"] == {
        "name": "woods.txt",
        "sha256": corpus.sha256,
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "unigram_entropy": corpus.unigram_entropy(),
    }
    assert [e["step"] for e in record["evaluations"]] == [0, 3, 6, 8, 8]
    assert [e["tokens"] for e in record["evaluations"]] == [0, 192, 384, 512, 512]
    assert [e["everything"] for e in record["evaluations"]] == [False, False, False, False, True]
    assert [point["step"] for point in record["train_loss"]] == list(range(1, 9))
    assert record["tokens_per_second"] > 0
    assert record["seconds"] > 0
    assert record["sample"].startswith(corpus.tokenizer.decode(corpus.validation[:8].tolist()))
    assert record["environment"]["device"].startswith(f"{model.device.type}: ")
    assert json.loads(json.dumps(record)) == record


@EVERY
def test_losses_are_finite_and_fall(run_of, kind):
    record = run_of(kind).record
    losses = [point["loss"] for point in record["train_loss"] + record["evaluations"]]
    assert all(math.isfinite(loss) for loss in losses)
    first, last = record["evaluations"][0], record["evaluations"][-1]
    assert first["loss"] == pytest.approx(math.log(300), abs=0.1)  # it begins knowing nothing
    assert last["loss"] < first["loss"] - 0.3
    assert last["bits_per_byte"] < first["bits_per_byte"]


@EVERY
def test_recorded_counts_equal_those_of_the_model(run_of, kind):
    model, corpus, costs = run_of(kind).model, run_of(kind).corpus, run_of(kind).record["model"]
    layers = model.l3_layers.values()
    tables = {table for layer in layers for table in layer.tables()}
    total = sum(p.numel() for p in model.parameters())
    active = total - sum(table.numel() for table in tables)
    for layer in layers:
        own_rows = layer.bounds.diff()[corpus.train.astype(np.int64)].double().mean().item()
        active += own_rows * sum(table.shape[1] for table in set(layer.tables()))
    assert len(layers) == {"dense": 0, "l3 tied": 1, "l3 untied": 2}[kind]
    assert costs["total_parameters"] == total
    assert costs["active_parameters"] == pytest.approx(active)
    assert costs["table_bytes"] == sum(table.nbytes for table in tables)


@pytest.mark.parametrize("kind", ["dense", "l3 tied"])
def test_longer_training_learns_far_more_than_frequencies(tiny, kind):
    record = train(tiny(kind, num_iterations=120, batch_size=8, eval_every=50), False).record
    assert record["evaluations"][-1]["loss"] < 0.2 * record["corpus"]["unigram_entropy"]
    curve = record["train_loss"]
    assert len(curve) == 60  # at most a hundred points: here means over two steps each
    assert curve[-1]["step"] == 120
    assert curve[-1]["loss"] < 0.2 * record["corpus"]["unigram_entropy"] < curve[0]["loss"]


def test_seed_decides_all_losses(run_of, tiny):
    def losses(record):
        return record["train_loss"], record["evaluations"]

    again = train(tiny("l3 tied"), show_progress=False).record
    other = train(tiny("l3 tied", seed=1), show_progress=False).record
    assert losses(again) == losses(run_of("l3 tied").record)
    assert losses(again)[0] != losses(other)[0]


@pytest.mark.parametrize("kind", ["l3 tied", "l3 untied"])
def test_l3_model_begins_as_the_dense_model_of_its_seed(run_of, kind):
    dense, l3 = run_of("dense").record, run_of(kind).record
    assert l3["evaluations"][0] == pytest.approx(dense["evaluations"][0])
    assert l3["train_loss"][0]["loss"] == pytest.approx(dense["train_loss"][0]["loss"])


@EVERY
@pytest.mark.parametrize("changes", [{"lr_scale": 0.5}, {"table_lr": 0.2}, {"router_lr": 0.2}], ids=str)
def test_learning_rates_matter_where_they_should(run_of, tiny, kind, changes):
    changed = train(tiny(kind, num_iterations=8, **changes), show_progress=False).record
    same = changed["train_loss"] == run_of(kind).record["train_loss"]
    assert same == ("router_lr" in changes or (kind == "dense" and "table_lr" in changes))


def test_learning_rate_of_the_router_reaches_the_experts(tiny):
    losses = [
        train(tiny("l3 tied", stand_in="moe", **changes), show_progress=False).record["train_loss"]
        for changes in ({}, {"table_lr": 0.2}, {"router_lr": 0.2})
    ]
    assert losses[0] == losses[1] != losses[2]
