"""How fast rows are allocated, looked up and updated, beside the best that the machine could do.

Absolute times depend on the machine; the ratios in the last column carry over.
"""

import sys
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from l3paper.allocation import (
    allocate_by_codewords,
    allocation_to_bounds,
    compute_lzw_allocation,
    scan_codewords,
)
from l3paper.bench.timing import copy_speed, interleaved_medians, peak_bytes, product_speed
from l3paper.data.batches import training_batch
from l3paper.data.streams import load_corpus
from l3paper.lookup import LOOKUPS, blocked


class LookupSetting(NamedTuple):
    """The size of one lookup: ids from the default corpus, rows by LZW, one tied table."""

    positions: int
    vocab_size: int
    n_emb: int
    k_max: int
    width: int


SETTINGS = {
    "smoke": LookupSetting(256, 4096, 8192, 64, 32),
    "laptop": LookupSetting(2048, 4096, 16384, 64, 128),
    "medium": LookupSetting(2048, 4096, 65536, 512, 256),
    "paper": LookupSetting(32768, 32768, 710_000, 512, 1024),
}

MOST_PADDED = 8e9
"""Bytes of memory that the padded lookup may take; it is left out of larger settings."""


def _allocation_and_batch(setting: LookupSetting) -> tuple[list[int], Tensor]:
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
    setting: str, repeats: int, device: torch.device, dtype: str = "float32"
) -> list[dict]:
    """Time forward and backward of every lookup but the loop, beside the sum of two floors.

    On CUDA, FlexAttention is timed as well, and blocks have 512 positions as in the paper. A lookup
    that does not fit is left out, and a line on stderr says so.

    The floors: the products that the equation needs at the speed of one large product, and the bytes
    that must move (touched rows read twice, the table's gradient and the activations written once)
    at the speed of a large copy.
    """
    sizes, dtype = SETTINGS[setting], getattr(torch, dtype)
    alloc, ids = _allocation_and_batch(sizes)
    ids, bounds = ids.to(device), allocation_to_bounds(alloc).to(device)
    rows = bounds.diff()  # (vocab_size,)
    query, upstream = torch.randn(2, len(ids), sizes.width, device=device, dtype=dtype)
    table = torch.randn(sizes.n_emb, sizes.width, device=device, dtype=dtype, requires_grad=True)
    query.requires_grad_()

    def forward_and_backward(lookup) -> None:
        query.grad = table.grad = None
        lookup(query, ids, bounds, table, table).backward(upstream)

    lookups = {name: lookup for name, lookup in LOOKUPS.items() if name != "loop"}
    # It gathers keys and values, and makes their gradients twice.
    padded_bytes = 5 * dtype.itemsize * len(ids) * int(rows[ids].max()) * sizes.width
    if padded_bytes > MOST_PADDED:
        del lookups["padded"]
        print(f"padded is left out: it would gather {padded_bytes / 1e9:.1f} GB", file=sys.stderr)
    if device.type == "cuda":
        lookups["blocked"] = partial(blocked, block_size=512)
        compiled = torch.compile(flex)
        try:
            forward_and_backward(compiled)
            lookups["FlexAttention"] = compiled
        except RuntimeError as error:  # the mask or the kernel is too large for this GPU
            print(f"FlexAttention is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    jobs = {name: partial(forward_and_backward, lookup) for name, lookup in lookups.items()}
    medians = interleaved_medians(jobs, repeats)
    products = 6 * 2 * int(rows[ids].sum()) * sizes.width  # two forward, four backward
    moved = 2 * int(rows[ids.unique()].sum()) + sizes.n_emb + 4 * len(ids)  # rows of the width
    seconds_moving = dtype.itemsize * moved * sizes.width / copy_speed(device)
    floor = products / product_speed(device, dtype) + seconds_moving
    results = [
        {"lookup": name, "seconds": medians[name], "peak_bytes": peak_bytes(job, device)}
        for name, job in jobs.items()
    ]
    results.append({"lookup": "sum of the floors", "seconds": floor, "peak_bytes": None})
    return [{**row, "times_grouped": row["seconds"] / medians["grouped"]} for row in results]


def bench_optimizer(setting: str, repeats: int, device: torch.device) -> list[dict]:
    """Time one update of a table by AdamW, by fused AdamW, and by SparseAdam.

    The gradient is nonzero in the rows that a batch of the default corpus touches. SparseAdam is
    another algorithm: it leaves rows without a gradient alone, although their momentum would still
    move them.
    """
    sizes = SETTINGS[setting]
    alloc, ids = _allocation_and_batch(sizes)
    owner = torch.arange(sizes.vocab_size).repeat_interleave(torch.tensor(alloc))
    touched = torch.isin(owner, ids).nonzero().flatten().to(device)
    gradient = torch.zeros(sizes.n_emb, sizes.width, device=device)
    gradient[touched] = torch.randn(len(touched), sizes.width, device=device)
    sparse = gradient.to_sparse(1)  # keeps the rows that are not all zero
    adamw = partial(torch.optim.AdamW, weight_decay=0.0)
    ways = {
        "AdamW": (adamw, gradient),
        "AdamW, fused": (partial(adamw, fused=True), gradient),
        "SparseAdam, touched rows only": (torch.optim.SparseAdam, sparse),
    }
    jobs = {}
    for name, (make_optimizer, grad) in ways.items():
        table = torch.nn.Parameter(torch.randn_like(gradient))
        table.grad = grad
        jobs[name] = make_optimizer([table]).step
    medians = interleaved_medians(jobs, repeats)
    return [
        {
            "update": name,
            "rows": len(touched) if "Sparse" in name else sizes.n_emb,
            "seconds": seconds,
            "times_fused": seconds / medians["AdamW, fused"],
        }
        for name, seconds in medians.items()
    ]


def bench_allocation(repeats: int, device: torch.device) -> list[dict]:
    """Time the LZW scan of the default corpus, and the allocation of rows after it.

    The scan runs on the CPU, whatever the device. Its speed is bound by one dictionary look-up per
    token, most of them far apart in memory.
    """
    corpus = load_corpus()
    documents = corpus.documents()
    codebook = scan_codewords(documents, corpus.vocab_size)
    jobs = {
        "scan": lambda: scan_codewords(documents, corpus.vocab_size),
        "give out 65,536 rows": lambda: allocate_by_codewords(codebook, 65_536, 512),
    }
    return [
        {"part": part, "seconds": seconds, "tokens_per_second": len(corpus.train) / seconds}
        for part, seconds in interleaved_medians(jobs, repeats).items()
    ]
