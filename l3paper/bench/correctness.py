"""Compare every lookup with the specification, on one device, in every type that it computes in."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l3paper.allocation import allocation_to_bounds
from l3paper.lookup import LOOKUPS, Lookup, loop

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest relative error, in the norm, of output and gradients. bfloat16 rounds inputs, weights and
results to 8 bits, an error of about 0.4 % each; products of float32 are full precision, not TF32."""

ALLOCATIONS = ([1] * 40, [1, 40, 7, 150, 3], [512, 1, 16, 17, 31, 33], [64] * 12)
POSITIONS, WIDTHS = 600, (40, 24)
"""The size of a case: positions, and the widths of keys and values when untied."""


def check_lookups(
    device: torch.device,
    lookups: Mapping[str, Lookup] = LOOKUPS,
    allocations: Sequence[list[int]] = ALLOCATIONS,
) -> list[dict]:
    """Find every lookup's largest relative error over all allocations, by type, tied and untied.

    The specification is the loop, in float64 on the CPU, on the same inputs as rounded to the type.
    """
    worst: dict[tuple[str, str, str, str], float] = {}
    for seed, alloc in enumerate(allocations):
        for tables in ("tied", "untied"):
            for kind in TOLERANCES:
                dtype = getattr(torch, kind)
                inputs = _inputs(alloc, tables == "tied", dtype, seed)
                expected = _results(loop, inputs, torch.float64, torch.device("cpu"))
                for name in lookups.keys() - {"loop"}:
                    computed = _results(lookups[name], inputs, dtype, device)
                    for part, exact in expected.items():
                        error = float((computed[part] - exact).norm() / exact.norm())
                        key = name, kind, tables, part
                        worst[key] = max(worst.get(key, 0.0), error)
    return [
        {
            "lookup": name,
            "type": kind,
            "tables": tables,
            "of": part,
            "relative_error": f"{error:.1e}",
            "allowed": f"{TOLERANCES[kind]:.0e}",
            "verdict": "right" if error <= TOLERANCES[kind] else "WRONG",
        }
        for (name, kind, tables, part), error in sorted(worst.items())
    ]


def _inputs(alloc: list[int], tied: bool, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random tensors of this type on the CPU: a lookup's inputs, and the gradient of its output."""
    random = torch.Generator().manual_seed(seed)
    d_in, d_emb = (WIDTHS[0],) * 2 if tied else WIDTHS

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    inputs = {
        "query": draw(POSITIONS, d_in) / d_in**0.25,
        "ids": torch.randint(len(alloc), (POSITIONS,), generator=random),
        "bounds": allocation_to_bounds(alloc),
        "keys": draw(sum(alloc), d_in) / d_in**0.25,
        "gradient": draw(POSITIONS, d_emb),
    }
    return inputs if tied else inputs | {"values": draw(sum(alloc), d_emb)}


def _results(
    lookup: Lookup, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Output and gradients, computed in `dtype` on `device` and returned in float64 on the CPU."""
    at = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    leaves = {name: at[name].requires_grad_() for name in ("query", "keys", "values") if name in at}
    values = leaves.get("values", leaves["keys"])
    output = lookup(at["query"], at["ids"], at["bounds"], at["keys"], values)
    grads = torch.autograd.grad(output, list(leaves.values()), at["gradient"])
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach().cpu().double() for name, x in {"output": output, **named}.items()}
