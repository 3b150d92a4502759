"""Measuring time, speed and memory so that the numbers can be compared.

What is compared runs in one process, warm, in turns, and is summed up by medians, so that a busy
moment of the machine hits all sides alike.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def interleaved_medians(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of every job: one warm-up each, then `repeats` rounds of all in turn."""
    seconds = {name: [] for name in jobs}
    for round_ in range(1 + repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def product_speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of one large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / interleaved_medians({"product": lambda: a @ b}, repeats=7)["product"]


def copy_speed(device: torch.device, numbers: int = 2**25) -> float:
    """Bytes a second of a large copy, counting bytes read and bytes written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 8 * numbers / interleaved_medians({"copy": lambda: target.copy_(source)}, 7)["copy"]


def memory_size(device: torch.device) -> int:
    """Bytes of memory the device has; where the system does not say, 8 GB are assumed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def peak_bytes(job: Callable[[], object], device: torch.device) -> int:
    """The most memory that PyTorch held at once during `job`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        job()
    # The profiler's public tables sum memory by operation; its raw events have the order in time.
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
