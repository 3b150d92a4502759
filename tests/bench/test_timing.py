"""Medians of interleaved runs and peak memory."""

import pytest
import torch

from l3paper.bench import timing
from l3paper.bench.timing import interleaved_medians, peak_bytes

CPU = torch.device("cpu")


def test_jobs_run_in_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    order = []
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert medians == {"a": 1, "b": 1}


def test_peak_memory_is_that_of_what_lives_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(1_000_000)

    def together():
        return [torch.empty(1_000_000) for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(4_000_000, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(12_000_000, rel=0.01)
