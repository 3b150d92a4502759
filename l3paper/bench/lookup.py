"""Timings one can trust: `python -m l3paper.bench --help`.

Absolute times depend on the machine; the ratios in the last column are what carries over.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from l3paper.allocation import (
    allocate_by_codewords,
    allocation_to_bounds,
    compute_lzw_allocation,
    scan_codewords,
)
from l3paper.bench.correctness import check_lookups
from l3paper.bench.decoding import bench_decode
from l3paper.bench.timing import copy_speed, interleaved_medians, memory_size, peak_bytes, product_speed
from l3paper.bench.training import SIZES, bench_throughput, bench_train_step
from l3paper.data.corpus import fingerprint, read_documents
from l3paper.data.streams import load_corpus, training_batch
from l3paper.experiments.catalogue import EXPERIMENTS, without_and_with
from l3paper.files import require_writable
from l3paper.lookup import blocked, padded
from l3paper.lookup.grouped import grouped
from l3paper.parts.device import pick_device
from l3paper.records import environment, write_record
from l3paper.training.config import PRESETS


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
    "paper": LookupSetting(32768, 32768, 710_000, 512, 1024),
}


def allocation_and_batch(setting: LookupSetting) -> tuple[list[int], Tensor]:
    """Rows per token by LZW, and the ids (positions,) of a training batch of the default corpus."""
    corpus = load_corpus(vocab_size=setting.vocab_size)
    alloc = compute_lzw_allocation(corpus.documents(), setting.vocab_size, setting.n_emb, setting.k_max)
    ids, _ = training_batch(corpus.train, setting.positions // 128, 128, seed=0, step=0)
    return alloc, ids.flatten()


def flex(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The lookup by PyTorch's FlexAttention with a block mask, the paper's second way to train."""
    order = token_ids.argsort(stable=True)
    ids = token_ids[order]
    first, last = bounds[ids], bounds[ids + 1]

    def own(batch, head, position, row):
        return (first[position] <= row) & (row < last[position])

    mask = create_block_mask(own, None, None, len(ids), len(keys), device=query.device)
    q, k, v = (x[None, None] for x in (query[order], keys, values))
    return flex_attention(q, k, v, block_mask=mask, scale=1.0)[0, 0][order.argsort()]


def bench_lookup(
    setting: LookupSetting, repeats: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """Forward and backward of every lookup but the loop, and the sum of two floors.

    What does not fit into memory is left out, with a word on stderr. On CUDA, FlexAttention joins in.

    The floors: the products that the equation needs at the speed of one large product, and the bytes
    that must move (touched rows read twice, the table's gradient and the activations written once)
    at the speed of a large copy.
    """
    alloc, ids = allocation_and_batch(setting)
    bounds = allocation_to_bounds(alloc).to(device)
    ids = ids.to(device)
    torch.manual_seed(0)
    like = dict(device=device, dtype=dtype)
    query = torch.randn(len(ids), setting.width, **like, requires_grad=True)
    table = torch.randn(setting.n_emb, setting.width, **like, requires_grad=True)
    upstream = torch.randn(len(ids), setting.width, **like)

    def step(lookup) -> Callable[[], None]:
        def run():
            query.grad = table.grad = None
            lookup(query, ids, bounds, table, table).backward(upstream)

        return run

    lookups = {
        "padded": padded,
        "blocked": blocked,
        "blocked, 512 as in the paper": partial(blocked, block_size=512),
    }
    if device.type == "cuda":
        lookups["FlexAttention"] = torch.compile(flex)
    rows = bounds.diff()
    gathered = table.element_size() * len(ids) * int(rows[ids].max()) * setting.width  # bytes
    if 5 * gathered > memory_size(device):  # keys, values, and their gradients twice
        del lookups["padded"]
        gigabytes = 5 * gathered / 1e9
        print(f"padded is left out: its gathers would need {gigabytes:.0f} GB", file=sys.stderr)
    jobs = {}
    for name, lookup in (lookups | {"grouped": grouped}).items():
        jobs[name] = step(lookup)
        try:
            jobs[name]()
        except RuntimeError as error:  # out of memory
            if device.type == "cpu" or name == "grouped":
                raise
            del jobs[name]
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    medians = interleaved_medians(jobs, repeats)
    products = 6 * 2 * int(rows[ids].sum()) * setting.width  # two forward, four backward
    moved = 2 * int(rows[ids.unique()].sum()) + setting.n_emb + 4 * len(ids)  # rows of the width
    seconds_moving = table.element_size() * moved * setting.width / copy_speed(device)
    floor = products / product_speed(device, dtype) + seconds_moving
    results = [
        {"lookup": name, "seconds": medians[name], "peak_bytes": peak_bytes(job, device)}
        for name, job in jobs.items()
    ]
    results.append({"lookup": "sum of the floors", "seconds": floor, "peak_bytes": None})
    fastest = medians["grouped"]
    return [{**row, "times_grouped": row["seconds"] / fastest} for row in results]


def bench_optimizer(setting: LookupSetting, repeats: int, device: torch.device) -> list[dict]:
    """One update of a setting's table, three ways: AdamW operation by operation, fused, sparse.

    The gradient has rows where a batch of the default corpus touches the table. Sparse is another
    algorithm: rows without gradient rest, although their momentum would still move them.
    """
    alloc, ids = allocation_and_batch(setting)
    owner = torch.arange(setting.vocab_size).repeat_interleave(torch.tensor(alloc))
    touched = torch.isin(owner, ids).nonzero().flatten().to(device)
    gradient = torch.zeros(setting.n_emb, setting.width, device=device)
    gradient[touched] = torch.randn(len(touched), setting.width, device=device)
    rows = torch.sparse_coo_tensor(
        touched[None], gradient[touched], gradient.shape, is_coalesced=True, check_invariants=True
    )

    def job(make, grad) -> Callable[[], None]:
        table = torch.nn.Parameter(torch.randn_like(gradient))
        table.grad = grad
        return make([table]).step

    jobs = {
        "AdamW": job(partial(torch.optim.AdamW, weight_decay=0.0), gradient),
        "AdamW, fused": job(partial(torch.optim.AdamW, weight_decay=0.0, fused=True), gradient),
        "SparseAdam, touched rows only": job(torch.optim.SparseAdam, rows),
    }
    medians = interleaved_medians(jobs, repeats)
    return [
        {
            "update": name,
            "rows": len(touched) if "Sparse" in name else setting.n_emb,
            "seconds": seconds,
            "times_fused": seconds / medians["AdamW, fused"],
        }
        for name, seconds in medians.items()
    ]


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


def as_table(results: list[dict]) -> str:
    """Results as aligned columns: times in ms, bytes in kB or MB."""

    def show(name: str, value) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        if name == "seconds":
            return f"{1e3 * value:,.1f} ms"
        if name.endswith("bytes"):
            return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.2f} kB"
        return f"{value:,.0f}" if value > 100 else f"{value:.2f}"

    head = [name.replace("_", " ") for name in results[0]]
    rows = [head, *([show(name, value) for name, value in row.items()] for row in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


SEED = 0
"""Of weights and batches."""

WHAT = ("correctness", "lookup", "optimizer", "train-step", "throughput", "allocation", "decode")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m l3paper.bench", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument(
        "--setting", choices=SETTINGS, default="laptop", help="of lookup, optimizer (default: laptop)"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="laptop", help="of train-step, decode (default: laptop)"
    )
    parser.add_argument(
        "--experiment",
        choices=EXPERIMENTS,
        help="whose models train-step times (default: the preset's own, without L3 and with it)",
    )
    parser.add_argument("--size", choices=SIZES, default="smoke", help="of throughput (default: smoke)")
    parser.add_argument(
        "--sweep", action="store_true", help="of decode: the L3 layer behind every block in turn"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of lookup (default: float32)",
    )
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
    torch.manual_seed(SEED)
    setting, more, wrong = asdict(SETTINGS[given.setting]), {}, False
    data_bytes = None
    if given.what == "lookup":
        setting["dtype"] = given.dtype
        dtype = getattr(torch, given.dtype)
        results = bench_lookup(SETTINGS[given.setting], given.repeats, device, dtype)
    elif given.what == "optimizer":
        results = bench_optimizer(SETTINGS[given.setting], given.repeats, device)
    elif given.what == "train-step":
        setting = {"experiment": given.experiment, "preset": given.preset}
        if given.experiment:
            configs = EXPERIMENTS[given.experiment].configs(given.preset, "stdlib")
        else:
            configs = without_and_with(PRESETS[given.preset])
        data_bytes = next(iter(configs.values())).data_bytes
        results = bench_train_step(configs, given.repeats, device)
    elif given.what == "throughput":
        setting = {"size": given.size} | asdict(SIZES[given.size])
        results, more["profile"] = bench_throughput(given.size, given.repeats, device)
    elif given.what == "correctness":
        setting, results = {}, check_lookups(device)
        wrong = any(row["verdict"] != "right" for row in results)
    elif given.what == "decode":
        setting = {"preset": given.preset, "sweep": given.sweep} | asdict(PRESETS[given.preset])
        results = bench_decode(given.preset, given.repeats, device, given.sweep)
    else:
        setting, results = {}, bench_allocation(given.repeats)
    print(as_table(results))
    if given.json:
        record = {"bench": given.what, "setting": setting, "seed": SEED, "results": results, **more}
        if given.what != "correctness":
            record["corpus"] = {
                "name": "stdlib",
                "sha256": fingerprint(read_documents(max_bytes=data_bytes)),
            }
        write_record(given.json, record | {"environment": environment(device)})
    return int(wrong)
