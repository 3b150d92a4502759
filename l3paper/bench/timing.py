"""Measure time, speed and memory so that the numbers can be compared.

The jobs of one comparison run in one process, warm and in turn, and medians summarise them, so that a
busy moment of the machine affects all of them alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from l3paper.errors import at_least


def interleaved_medians(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of every job: one warm-up each, then `repeats` rounds of all jobs in turn.

    Raises ValueError unless `repeats` is at least 1.
    """
    at_least(1, repeats=repeats)
    seconds = {name: [] for name in jobs}
    for round_ in range(1 + repeats):
        for name, job in jobs.items():
            begin = clock()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(clock() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def product_speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of one large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / interleaved_medians({"product": lambda: a @ b}, repeats=7)["product"]


def copy_speed(device: torch.device, numbers: int = 2**25) -> float:
    """Bytes per second of a large copy, counting bytes read and bytes written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 8 * numbers / interleaved_medians({"copy": lambda: target.copy_(source)}, 7)["copy"]


def memory_size(device: torch.device) -> int:
    """Bytes of memory of the device; 8 GiB if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


@contextmanager
def profiler(**options) -> Iterator[profile]:
    """Run `torch.profiler.profile(**options)`, and discard what is written to stderr meanwhile.

    The profiler's C++ code reports its starts and stops there, past Python's `sys.stderr`.
    """
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with profile(**options) as watch:
            yield watch
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def peak_bytes(job: Callable[[], object], device: torch.device) -> int:
    """The most memory that PyTorch held at once during `job`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        job()
    # The profiler's public tables sum memory by operation; its raw events have the order in time.
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
