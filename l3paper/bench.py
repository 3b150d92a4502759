"""Timings one can trust: `python -m l3paper.bench lookup | allocation | train-step`.

Everything that is compared runs in one process, warm, in turns, and is summed up by medians, so that
a busy moment of the machine hits all sides alike. Absolute times depend on the machine; the ratios in
the last column are what carries over.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from l3paper.allocation import (
    allocate_by_codewords,
    allocation_to_bounds,
    compute_lzw_allocation,
    scan_codewords,
)
from l3paper.config import PRESETS
from l3paper.data import load_corpus, training_batch
from l3paper.files import require_writable
from l3paper.lookup import blocked, grouped, padded
from l3paper.records import environment, write_record
from l3paper.train import build_model, pick_device


@dataclass(frozen=True)
class LookupSetting:
    """One lookup problem: ids from the default corpus, rows by LZW, one tied table."""

    positions: int
    vocab_size: int
    n_emb: int
    k_max: int
    width: int


SETTINGS = {
    "smoke": LookupSetting(256, 4096, 8192, 64, 32),
    "laptop": LookupSetting(2048, 4096, 16384, 64, 128),
    "medium": LookupSetting(2048, 4096, 65536, 512, 256),
    "large": LookupSetting(8192, 16384, 98304, 512, 384),
}


paper_blocked = partial(blocked, block_size=512)


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


def bench_lookup(setting: LookupSetting, repeats: int, device: torch.device) -> list[dict]:
    """Forward and backward of every lookup but the loop, and the sum of two floors.

    Where the gathers of `padded` would not fit into memory, it is left out, with a word on stderr.

    The floors: the products that the equation needs at the speed of one large product, and the bytes
    that must move (touched rows read twice, the table's gradient and the activations written once)
    at the speed of a large copy.
    """
    corpus = load_corpus(vocab_size=setting.vocab_size)
    alloc = compute_lzw_allocation(corpus.documents(), setting.vocab_size, setting.n_emb, setting.k_max)
    bounds = allocation_to_bounds(alloc).to(device)
    token_ids, _ = training_batch(corpus.train, setting.positions // 128, 128, seed=0, step=0)
    ids = token_ids.flatten().to(device)
    torch.manual_seed(0)
    query = torch.randn(len(ids), setting.width, device=device, requires_grad=True)
    table = torch.randn(setting.n_emb, setting.width, device=device, requires_grad=True)
    upstream = torch.randn(len(ids), setting.width, device=device)

    def step(lookup) -> Callable[[], None]:
        def run():
            query.grad = table.grad = None
            lookup(query, ids, bounds, table, table).backward(upstream)

        return run

    lookups = {"padded": padded, "blocked": blocked, "blocked, 512 as in the paper": paper_blocked}
    rows = bounds.diff()
    gathered = 4 * len(ids) * int(rows[ids].max()) * setting.width  # bytes
    if too_large := 5 * gathered > memory_size(device):  # keys, values, and their gradients twice
        del lookups["padded"]
    jobs = {name: step(lookup) for name, lookup in lookups.items()} | {"grouped": step(grouped)}
    medians = interleaved_medians(jobs, repeats)
    products = 6 * 2 * int(rows[ids].sum()) * setting.width  # two forward, four backward
    moved = 2 * int(rows[ids.unique()].sum()) + setting.n_emb + 4 * len(ids)  # rows of the width
    floor = products / product_speed(device) + 4 * moved * setting.width / copy_speed(device)
    results = [
        {"lookup": name, "seconds": medians[name], "peak_bytes": peak_bytes(job, device)}
        for name, job in jobs.items()
    ]
    results.append({"lookup": "sum of the floors", "seconds": floor, "peak_bytes": None})
    if too_large:
        print(
            f"padded is left out: its gathers would need {5 * gathered / 1e9:.0f} GB", file=sys.stderr
        )
    fastest = medians["grouped"]
    return [{**row, "times_grouped": row["seconds"] / fastest} for row in results]


def bench_allocation(repeats: int) -> list[dict]:
    """The LZW scan of the default corpus and the giving out of rows, seconds each.

    What bounds the scan: one dictionary look-up a token, most of them far apart in memory.
    """
    corpus = load_corpus()
    documents = corpus.documents()
    codebook = scan_codewords(documents, corpus.vocab_size)
    medians = interleaved_medians(
        {
            "scan": lambda: scan_codewords(documents, corpus.vocab_size),
            "give out 65,536 rows": lambda: allocate_by_codewords(codebook, 65_536, 512),
        },
        repeats,
    )
    return [
        {"part": part, "seconds": seconds, "tokens_per_second": len(corpus.train) / seconds}
        for part, seconds in medians.items()
    ]


def bench_train_step(preset: str, repeats: int, device: torch.device) -> list[dict]:
    """A training step of a preset's model with and without L3, and the optimizer's share of it."""
    config = PRESETS[preset]
    corpus = load_corpus(vocab_size=config.vocab_size)
    batch = training_batch(corpus.train, config.batch_size, config.sequence_len, seed=0, step=0)
    inputs, targets = (part.to(device) for part in batch)
    jobs = {}
    for name, changes in {"dense": {"l3_after_layers": ""}, "dense + L3": {}}.items():
        model = build_model(replace(config, **changes), corpus)[0].to(device)
        optimizer = model.setup_optimizer()

        def gradients(model=model):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(inputs, targets)
            loss.backward()

        def update(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        jobs |= {f"{name}: gradients": gradients, f"{name}: optimizer": update}
    medians = interleaved_medians(jobs, repeats)
    steps = {
        name: medians[f"{name}: gradients"] + medians[f"{name}: optimizer"]
        for name in ("dense", "dense + L3")
    }
    return [
        {
            "model": name,
            "seconds": seconds,
            "tokens_per_second": inputs.numel() / seconds,
            "optimizer_share": medians[f"{name}: optimizer"] / seconds,
            "speed_of_dense": steps["dense"] / seconds,
        }
        for name, seconds in steps.items()
    ]


def product_speed(device: torch.device, size: int = 1024) -> float:
    """Operations a second of one large matrix product, float32."""
    a, b = torch.randn(2, size, size, device=device)
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


def as_table(results: list[dict]) -> str:
    """Results as aligned columns: times in ms, bytes in MB."""

    def show(name: str, value) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        if name == "seconds":
            return f"{1e3 * value:,.1f} ms"
        if name.endswith("bytes"):
            return f"{value / 1e6:,.1f} MB"
        return f"{value:,.0f}" if value > 100 else f"{value:.2f}"

    head = [name.replace("_", " ") for name in results[0]]
    rows = [head, *([show(name, value) for name, value in row.items()] for row in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m l3paper.bench", description=__doc__)
    parser.add_argument("what", choices=("lookup", "allocation", "train-step"))
    parser.add_argument(
        "--setting", choices=SETTINGS, default="laptop", help="of lookup (default: laptop)"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="laptop", help="of train-step (default: laptop)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    given = parser.parse_args(arguments)
    try:
        if given.repeats < 1:
            raise ValueError(f"repeats is {given.repeats}; it must be at least 1")
        device = pick_device(given.device)
        if given.json:
            require_writable(given.json)
    except ValueError as error:
        parser.error(str(error))
    if given.what == "lookup":
        setting = asdict(SETTINGS[given.setting])
        results = bench_lookup(SETTINGS[given.setting], given.repeats, device)
    elif given.what == "allocation":
        setting, results = {}, bench_allocation(given.repeats)
    else:
        setting, results = (
            {"preset": given.preset},
            bench_train_step(given.preset, given.repeats, device),
        )
    print(as_table(results))
    if given.json:
        record = {"bench": given.what, "setting": setting, "results": results}
        write_record(given.json, record | {"environment": environment(device)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
