"""Compare every lookup with the specification, on one device, in every type that it computes in."""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from l3paper.allocation import allocation_to_bounds
from l3paper.lookup import LOOKUPS, Lookup, loop

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest relative error, in the norm, of output and gradients. bfloat16 rounds inputs, weights and
results to 8 bits, an error of about 0.4 % each; products of float32 are full precision, not TF32."""

ALLOCATIONS = ([1] * 40, [1, 40, 7, 150, 3], [512, 1, 16, 17, 31, 33], [64] * 12)
POSITIONS, D_IN, D_EMB = 600, 40, 24


def check_lookups(
    device: torch.device,
    lookups: Mapping[str, Lookup] = LOOKUPS,
    allocations: Sequence[list[int]] = ALLOCATIONS,
) -> list[dict]:
    """Find every lookup's largest relative error over all allocations, by type, tied and untied.

    The specification is the loop, in float64 on the CPU, on the same inputs as rounded to the type.
    """
    worst: dict[tuple[str, str, str], float] = {}
    for alloc, tables, kind in product(allocations, ("tied", "untied"), TOLERANCES):
        inputs = _inputs(alloc, tables == "tied", getattr(torch, kind))
        expected = _results(loop, [x.double() for x in inputs], alloc)
        for name in lookups.keys() - {"loop"}:
            computed = _results(lookups[name], [x.to(device) for x in inputs], alloc)
            pairs = zip(computed, expected, strict=True)
            errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in pairs]
            key = name, kind, tables
            worst[key] = max(worst.get(key, 0.0), *errors)
    return [
        {
            "lookup": name,
            "type": kind,
            "tables": tables,
            "relative_error": f"{error:.1e}",
            "allowed": f"{TOLERANCES[kind]:.0e}",
            "verdict": "right" if error <= TOLERANCES[kind] else "WRONG",
        }
        for (name, kind, tables), error in sorted(worst.items())
    ]


def _inputs(alloc: list[int], tied: bool, dtype: torch.dtype) -> list[Tensor]:
    """A random gradient of the output, query and keys and, when untied, values; on the CPU."""
    random = torch.Generator().manual_seed(0)
    d_emb = D_IN if tied else D_EMB
    shapes = [(POSITIONS, d_emb), (POSITIONS, D_IN), (sum(alloc), D_IN)]
    shapes += [] if tied else [(sum(alloc), d_emb)]
    # Divided so that a score, the product of a query and a key, has unit variance.
    return [(torch.randn(shape, generator=random) / D_IN**0.25).to(dtype) for shape in shapes]


def _results(lookup: Lookup, inputs: list[Tensor], alloc: list[int]) -> list[Tensor]:
    """Output and gradients, computed in the inputs' type where they are; in float64 on the CPU."""
    upstream, *leaves = (x.detach().requires_grad_() for x in inputs)
    ids = (torch.arange(POSITIONS) % len(alloc)).to(upstream.device)
    bounds = allocation_to_bounds(alloc).to(upstream.device)
    output = lookup(leaves[0], ids, bounds, leaves[1], leaves[-1])
    gradients = torch.autograd.grad(output, leaves, upstream)
    return [x.detach().cpu().double() for x in (output, *gradients)]
