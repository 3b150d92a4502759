"""Medians of interleaved jobs, and peak memory."""

import pytest
import torch

from l3paper.bench.timing import interleaved_medians, peak_bytes

CPU = torch.device("cpu")


def test_jobs_run_in_turns_and_the_warm_up_does_not_count():
    clock, order = iter(range(1000)), []
    jobs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    assert interleaved_medians(jobs, 2, clock=lambda: next(clock)) == {"a": 1, "b": 1}
    assert order == ["a", "b"] * 3
    with pytest.raises(ValueError, match="repeats is 0; it must be at least 1"):
        interleaved_medians(jobs, 0)


def test_peak_memory_is_that_of_what_lives_at_once(capfd):
    def one_after_the_other():
        for _ in range(3):
            torch.empty(1_000_000)

    def together():
        return [torch.empty(1_000_000) for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(4_000_000, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(12_000_000, rel=0.01)
    assert capfd.readouterr().err == ""
