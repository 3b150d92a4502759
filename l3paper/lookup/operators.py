"""The lookups as PyTorch operators: one node each for torch.compile, torch.export and autograd.

A lookup reads the ids to decide what to compute, which no compiler can follow. Of an operator it needs
only the shapes of the results, and what to call: one operator forward, one for the gradients.

    operator             computes                              keeps for its gradients
    --------             --------                              -----------------------
    l3paper::grouped     `l3paper.lookup.grouped`              the softmax weights, and how it grouped
    l3paper::tiled       `l3paper.lookup.kernels`, on CUDA     the logsumexp of the scores
    l3paper::reference   `loop`, `padded` or `blocked`         nothing: they are those of grouped

Each of the first two has a second operator for its gradients, called like it with "_backward".
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from l3paper.lookup import grouped as groups
from l3paper.lookup import kernels
from l3paper.lookup.reference import Lookup, Plan, blocked, loop, padded
from l3paper.parts.device import eager, exactly, float32_or_better


def grouped(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One dense attention per distinct token, over a slice of the table; see `l3paper.lookup.grouped`.

    On CUDA with Triton, the kernels of `l3paper.lookup.kernels` do the same for all groups at once.
    Under autocast the lookup keeps the precision of the table. Its gradients cannot be differentiated
    again: a second backward pass raises RuntimeError.
    """
    if kernels.available(token_ids.device):
        return tiled(query, keys, values, kernels.make_tiles(token_ids, bounds, len(keys)))
    return _look_up("grouped", query, token_ids, bounds, keys, values)


def tiled(query: Tensor, keys: Tensor, values: Tensor, tiles: kernels.Tiles) -> Tensor:
    """The lookup of a batch that has been cut into tiles, on a device that is `kernels.available`."""
    with exactly(query.device.type):
        asked = query.to(keys.dtype), keys, None if values is keys else values, *tiles
        output, _ = _Tiled.apply(*asked)
    return output.to(query.dtype)


@dataclass(eq=False)
class TiledPlan(Plan):
    """A plan for CUDA: layers with equal bounds share the tiles."""

    tiles: kernels.Tiles

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return tiled(query, keys, values, self.tiles)


def make_plan(lookup: Lookup, token_ids: Tensor, bounds: Tensor, n_emb: int) -> Plan:
    """How a batch with these ids (N,) is looked up; n_emb is v, the rows of the whole table.

    What is being compiled becomes an operator, and a lookup that has none breaks the graph.
    """
    if lookup is grouped and kernels.available(token_ids.device):
        return TiledPlan(lookup, token_ids, bounds, kernels.make_tiles(token_ids, bounds, n_emb))
    if lookup is not grouped and torch.compiler.is_compiling():
        known = lookup in REFERENCES.values()
        lookup = partial(_look_up, lookup.__name__) if known else eager(lookup)
    return Plan(lookup, token_ids, bounds)


def _look_up(
    name: str, query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The lookup of this name as an operator, whose gradients are those of `grouped`."""
    with exactly(query.device.type):
        asked = query.to(keys.dtype), token_ids, bounds, keys, None if values is keys else values
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            output, *_ = _Lookup.apply(name, *asked)
        elif name == "grouped":
            output, *_ = GROUPED(*asked, False)
        else:
            output = REFERENCE(*asked, name)
    return output.to(query.dtype)


def _operator(name: str, arguments: str, results: str, compute: Callable, shapes: Callable) -> Callable:
    """Define an operator; `shapes` returns empty results. By itself it has no gradients."""

    def refuse(ctx, *grad_outputs):
        raise RuntimeError(f"l3paper::{name} has no gradients by itself, as in an exported program")

    full_name = f"l3paper::{name}"
    torch.library.define(full_name, f"({arguments}) -> {results}")
    torch.library.impl(full_name, "default", compute)
    torch.library.register_fake(full_name, shapes)
    torch.library.register_autograd(full_name, refuse)
    return getattr(torch.ops.l3paper, name).default


def _grouped_shapes(query, token_ids, bounds, keys, values, training):
    positions = weights = packed = 0
    if training:
        positions = query.shape[0] + 1
        # The meta device, and shapes asked for without a compiler, cannot name sizes that ids decide.
        with suppress(DynamicOutputShapeException):
            if query.device.type != "meta":
                context = torch.library.get_ctx()
                weights, packed = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        _output(query, keys, values),
        query.new_empty(positions, query.shape[1]),
        query.new_empty(weights),
        token_ids.new_empty(packed, dtype=torch.long),
    )


def _output(query: Tensor, keys: Tensor, values: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], (keys if values is None else values).shape[1])


def _shapes(query: Tensor, keys: Tensor, values: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for x in (query, keys, values) if x is not None]


_INPUTS = "Tensor query, Tensor token_ids, Tensor bounds, Tensor keys, Tensor? values"
_TILED = "Tensor query, Tensor keys, Tensor? values, Tensor order, Tensor positions, Tensor rows"

GROUPED = _operator(
    "grouped",
    f"{_INPUTS}, bool training",
    "(Tensor, Tensor, Tensor, Tensor)",
    groups.forward,
    _grouped_shapes,
)
GROUPED_BACKWARD = _operator(
    "grouped_backward",
    "Tensor grad_output, Tensor keys, Tensor? values, Tensor q, Tensor weights, Tensor packed",
    "Tensor[]",
    groups.backward,
    lambda grad, keys, values, q, weights, packed: _shapes(q[:-1], keys, values),
)
TILED = _operator(
    "tiled",
    _TILED,
    "(Tensor, Tensor)",
    kernels.forward,
    lambda query, keys, values, *tiles: (
        _output(query, keys, values),
        query.new_empty(query.shape[0], dtype=float32_or_better(query.dtype)),
    ),
)
TILED_BACKWARD = _operator(
    "tiled_backward",
    f"Tensor grad_output, {_TILED}, Tensor output, Tensor logsumexp",
    "Tensor[]",
    kernels.backward,
    lambda grad, query, keys, values, *rest: _shapes(query, keys, values),
)

REFERENCES: dict[str, Lookup] = {"loop": loop, "padded": padded, "blocked": blocked}

REFERENCE = _operator(
    "reference",
    f"{_INPUTS}, str name",
    "Tensor",
    lambda query, token_ids, bounds, keys, values, name: REFERENCES[name](
        query, token_ids, bounds, keys, keys if values is None else values
    ),
    lambda query, token_ids, bounds, keys, values, name: _output(query, keys, values),
)


class _Gradients(torch.autograd.Function):
    """An operator that computes gradients, and refuses to have gradients of its own."""

    @staticmethod
    def forward(operator, *arguments):
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grad_outputs):
        raise RuntimeError("the gradients of an L3 lookup cannot be differentiated again")


def _gradients(operator: Callable, *arguments) -> tuple[Tensor, ...]:
    # What is compiled cannot be differentiated twice anyway.
    compiling = torch.compiler.is_compiling()
    return operator(*arguments) if compiling else _Gradients.apply(operator, *arguments)


def _keep(ctx, *outputs: Tensor) -> None:
    """Mark outputs that only the backward pass uses: they have no gradients, not even zeros."""
    ctx.mark_non_differentiable(*outputs)
    if not torch.compiler.is_compiling():  # the compiler makes no zeros that nobody reads
        ctx.set_materialize_grads(False)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(name, query, token_ids, bounds, keys, values):
        output, *kept = GROUPED(query, token_ids, bounds, keys, values, True)
        if name != "grouped":
            output = REFERENCE(query, token_ids, bounds, keys, values, name)
        return output, *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *output[1:])
        ctx.save_for_backward(*inputs[4:], *output[1:])

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 6
        grad_query, *grad_tables = _gradients(GROUPED_BACKWARD, grad_output, *ctx.saved_tensors)
        return None, grad_query, None, None, *_two(grad_tables)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(query, keys, values, order, positions, rows):
        return TILED(query, keys, values, order, positions, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 6
        grad_query, *grad_tables = _gradients(TILED_BACKWARD, grad_output, *ctx.saved_tensors)
        return grad_query, *_two(grad_tables), None, None, None


def _two(grad_tables: list[Tensor]) -> list[Tensor | None]:
    """The gradients of keys and values, whose tensor is one and the same if there is one gradient."""
    return grad_tables if len(grad_tables) == 2 else [*grad_tables, None]
