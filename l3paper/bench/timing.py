"""Measure time, speed and memory so that the numbers can be compared.

The jobs of one comparison run in one process, warm and in turn, and medians summarise them, so that a
busy moment of the machine affects all of them alike.
"""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved_medians(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of every job: one warm-up each, then `repeats` rounds of all jobs in turn."""
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


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / interleaved_medians({"product": lambda: a @ b}, repeats=7)["product"]


def copy_speed(device: torch.device) -> float:
    """Bytes per second of a large copy, counting bytes read and bytes written."""
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    copied = interleaved_medians({"copy": lambda: target.copy_(source)}, repeats=7)
    return 2 * source.nbytes / copied["copy"]


def peak_bytes(job: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that PyTorch held at once during `job`, beyond what it held before.

    PyTorch keeps this count on CUDA only; elsewhere the result is None.
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before
