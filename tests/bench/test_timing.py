"""Medians of interleaved jobs."""

from l3paper.bench.timing import interleaved_medians


def test_jobs_run_in_turns_and_the_warm_up_does_not_count():
    clock, order = iter(range(1000)), []
    jobs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    assert interleaved_medians(jobs, 2, clock=lambda: next(clock)) == {"a": 1, "b": 1}
    assert order == ["a", "b"] * 3
