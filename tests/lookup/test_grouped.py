"""What the grouped lookup adds to the tests of every lookup in test_reference.py."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from helpers import lookup_inputs, make_inputs
from l3paper.lookup import grouped as module
from l3paper.lookup.grouped import make_parts
from l3paper.lookup.operators import grouped
from l3paper.lookup.reference import loop

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def gradients(output, inputs, weight):
    query, _, _, keys, values = inputs
    leaves = [query, keys] if keys is values else [query, keys, values]
    return torch.autograd.grad((output * weight).sum(), leaves)


SIZES = [((1,), (2,)), ((1, 2), (2, 4)), ((2, 3), (5,)), ((1, 4, 16, 32), (8, 16, 32, 64))]


@contextmanager
def rounding_up_to(positions, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POSITIONS", positions)
        patch.setattr(module, "ROWS", rows)
        yield


@TIED
@pytest.mark.parametrize("sizes", SIZES)
@given(data=st.data())
def test_how_small_groups_are_rounded_up_changes_nothing(sizes, tied, data):
    inputs = data.draw(lookup_inputs(tied))
    expected = loop(*inputs)
    weight = torch.randn_like(expected)
    with rounding_up_to(*sizes):
        output = grouped(*inputs)
        found = gradients(output, inputs, weight) if len(output) else ()
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    if found:
        torch.testing.assert_close(found, gradients(expected, inputs, weight), rtol=1e-9, atol=1e-11)


@given(lookup_inputs(tied=True), st.sampled_from(SIZES))
def test_plan_serves_every_position_once(inputs, sizes):
    _, token_ids, bounds, keys, _ = inputs
    with rounding_up_to(*sizes):
        parts = make_parts(token_ids, bounds, len(keys))
    served = parts.single_positions.tolist()
    for first, last, _, _ in parts.slices:
        served += range(first, last)
    for bucket in parts.buckets:
        served += [p for p in bucket.positions.flatten().tolist() if p < len(token_ids)]
    assert sorted(served) == list(range(len(token_ids)))
    assert torch.equal(parts.order[parts.inverse], torch.arange(len(token_ids)))


def test_real_sizes_use_slices_and_buckets_and_singles():
    alloc = [1] * 40 + [3] * 40 + [20] * 20 + [100] * 10
    inputs = make_inputs(alloc, 2000, 16, 16, True, seed=0)
    parts = make_parts(*inputs[1:3], len(inputs[3]))
    assert len(parts.slices) >= 10
    assert len(parts.buckets) >= 3
    assert len(parts.single_positions) > 100
    output, expected = grouped(*inputs), loop(*inputs)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    found, wanted = gradients(output, inputs, weight), gradients(expected, inputs, weight)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@TIED
def test_relative_error_in_lower_precision(tied, dtype, error):
    exact = make_inputs([1, 40, 7, 150, 3], 300, 32, 32 if tied else 20, tied, seed=4)
    query, token_ids, bounds, keys, values = exact
    low = [t.detach().to(dtype).requires_grad_() for t in (query, keys, values)]
    inputs = (low[0], token_ids, bounds, low[1], low[1] if tied else low[2])
    output, expected = grouped(*inputs), loop(*exact)
    assert output.dtype == dtype
    weight = torch.randn_like(expected)
    found = [output, *gradients(output, inputs, weight)]
    wanted = [expected, *gradients(expected, exact, weight)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < error


def test_rows_of_absent_tokens_get_exactly_zero_gradient():
    query, _, bounds, keys, _ = make_inputs([4, 70, 2, 1], 30, 8, 8, True, seed=1)
    grouped(query, torch.full((30,), 1), bounds, keys, keys).square().sum().backward()
    touched = keys.grad.any(dim=1)
    assert touched.nonzero().flatten().tolist() == list(range(4, 74))


def test_second_derivative_is_refused():
    query, token_ids, bounds, keys, values = make_inputs([3, 2], 5, 4, 4, False, seed=0)
    output = grouped(query, token_ids, bounds, keys, values).square().sum()
    (grad,) = torch.autograd.grad(output, query, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_under_autocast_the_table_keeps_its_precision():
    query, token_ids, bounds, keys, values = (
        t.detach().float() if t.is_floating_point() else t
        for t in make_inputs([3, 90, 1], 40, 8, 8, False, seed=0)
    )
    expected = grouped(query, token_ids, bounds, keys, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped(query, token_ids, bounds, keys, values), expected)
        low = grouped(query.bfloat16(), token_ids, bounds, keys, values)
    assert low.dtype == torch.bfloat16


def test_under_activation_checkpointing():
    inputs = make_inputs([3, 90, 1, 5], 40, 8, 8, True, seed=0)
    weight = torch.randn(40, 8, dtype=torch.float64)
    plain = gradients(grouped(*inputs), inputs, weight)
    again = gradients(checkpoint(grouped, *inputs, use_reentrant=False), inputs, weight)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
