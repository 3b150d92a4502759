"""Every lookup equals the loop: values and gradients, tied and untied, on ragged allocations."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import lookup_inputs, make_inputs
from l3paper.lookup import LOOKUPS, blocked, loop

FAST = {
    **{name: lookup for name, lookup in LOOKUPS.items() if name != "loop"},
    "blocked by 3": partial(blocked, block_size=3),
    "blocked by 1": partial(blocked, block_size=1),
}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def leaves(inputs):
    query, _, _, keys, values = inputs
    return [query, keys] if keys is values else [query, keys, values]


def test_loop_is_the_equation():
    query, token_ids, bounds, keys, values = make_inputs([3, 1, 2], 9, 4, 5, False, seed=1)
    for x, token, found in zip(
        query, token_ids, loop(query, token_ids, bounds, keys, values), strict=True
    ):
        own = range(bounds[token], bounds[token + 1])
        weights = [torch.exp(keys[row] @ x) for row in own]
        expected = sum(w * values[row] for w, row in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(found, expected)


@TIED
@pytest.mark.parametrize("name", FAST)
@given(data=st.data())
def test_equals_loop(name, tied, data):
    inputs = data.draw(lookup_inputs(tied))
    output, expected = FAST[name](*inputs), loop(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    if not len(output):
        return
    weight = torch.randn_like(expected)
    gradients, wanted = (
        torch.autograd.grad((o * weight).sum(), leaves(inputs)) for o in (output, expected)
    )
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)


@TIED
@pytest.mark.parametrize("lookup", [loop, *FAST.values()], ids=["loop", *FAST])
def test_gradcheck(lookup, tied):
    query, token_ids, bounds, keys, values = make_inputs([3, 1, 2], 5, 3, 3, tied, seed=0)
    tables = [keys] if tied else [keys, values]
    assert torch.autograd.gradcheck(
        lambda q, *tables: lookup(q, token_ids, bounds, tables[0], tables[-1]), (query, *tables)
    )


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_one_row_leaves_nothing_to_the_context(lookup):
    query, token_ids, bounds, keys, values = make_inputs([1, 1, 1], 7, 4, 4, False, seed=2)
    torch.testing.assert_close(lookup(query, token_ids, bounds, keys, values), values[token_ids])


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_large_scores_stay_finite(lookup):
    query, token_ids, bounds, keys, values = make_inputs([4, 6], 6, 4, 4, False, seed=3)
    output = lookup(1e3 * query, token_ids, bounds, keys, values)
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), [query, keys, values]))
