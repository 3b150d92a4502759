"""The CUDA kernels, on a GPU where there is one.

Where there is none, Triton's interpreter runs them on the CPU. It has to be chosen before Triton is
first imported, so one test runs this file again in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import lookup_inputs, make_inputs
from l3paper.allocation import allocation_to_bounds
from l3paper.lookup import kernels as module
from l3paper.lookup import operators
from l3paper.lookup.kernels import POSITIONS, ROWS, available, make_tiles
from l3paper.lookup.operators import grouped, tiled
from l3paper.lookup.reference import loop

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def device():
    pytest.importorskip("triton")
    if not available(DEVICE):
        pytest.skip("no GPU: test_in_the_interpreter runs this test")
    return DEVICE


def test_in_the_interpreter():
    pytest.importorskip("triton")
    if available(DEVICE):
        pytest.skip("this process runs the kernels itself")
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def plan(token_ids, bounds):
    return make_tiles(token_ids.to(DEVICE), bounds.to(DEVICE), int(bounds[-1]))


def results(inputs, dtype=torch.float64):
    """Output and gradients, first of the kernels in this type, then of the loop in float64."""
    query, token_ids, bounds, keys, values = inputs
    exact = [query, keys] if keys is values else [query, keys, values]
    leaves = [leaf.detach().to(DEVICE, dtype).requires_grad_() for leaf in exact]
    output = tiled(leaves[0], leaves[1], leaves[-1], plan(token_ids, bounds))
    expected = loop(*inputs)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    found = [output, *torch.autograd.grad(output, leaves, weight.to(output))]
    wanted = [expected, *torch.autograd.grad(expected, exact, weight)]
    return [x.cpu() for x in found], wanted


def assert_equal(inputs):
    found, wanted = results(inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@TIED
@settings(max_examples=8)
@given(data=st.data())
def test_equals_the_loop(device, tied, data):
    inputs = data.draw(lookup_inputs(tied).filter(lambda inputs: len(inputs[0])))
    assert_equal(inputs)


def test_the_grouped_lookup_uses_the_kernels(device, monkeypatch):
    query, token_ids, bounds, keys, values = (
        x.detach().to(device) for x in make_inputs([3, 20], 30, 8, 4, False, seed=2)
    )
    calls = []
    monkeypatch.setattr(operators, "tiled", lambda *given: calls.append(1) or tiled(*given))
    found = grouped(query, token_ids, bounds, keys, values)
    torch.testing.assert_close(found, loop(query, token_ids, bounds, keys, values))
    assert calls


@TIED
def test_groups_of_many_tiles_and_steps(device, tied):
    query, token_ids, bounds, keys, values = make_inputs([3, 150, 33], 120, 9, 9, tied, seed=2)
    token_ids[:100] = 1
    assert_equal((query, token_ids, bounds, keys, values))


@pytest.mark.parametrize(("d_in", "d_emb"), [(260, 260), (300, 130), (17, 257)])
def test_widths_of_many_blocks_and_chunks(device, d_in, d_emb):
    assert_equal(make_inputs([2, 40], 20, d_in, d_emb, d_in == d_emb, seed=3))


# In the small types the error is that of rounding inputs, weights and results, to 11 bits or 8.
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
@TIED
def test_relative_error_in_lower_precision(device, tied, dtype, error):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    inputs = make_inputs([1, 40, 7, 150, 3], 100, 40, 40 if tied else 20, tied, seed=4)
    for ours, theirs in zip(*results(inputs, dtype), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() / theirs.norm() < error


@pytest.mark.parametrize("level", [-2000.0, 2000.0])
def test_scores_beyond_the_range_of_exp(device, level):
    query, token_ids, bounds, keys, values = make_inputs([1, 5, 40], 20, 1, 4, False, seed=5)
    query = torch.ones_like(query).requires_grad_()
    keys = (keys.detach() + level).requires_grad_()
    assert_equal((query, token_ids, bounds, keys, values))


def test_rows_of_absent_tokens_get_exactly_zero_gradient(device):
    query, _, bounds, keys, _ = make_inputs([4, 70, 2, 1], 30, 8, 8, True, seed=1)
    query, keys = query.detach().to(device), keys.detach().to(device).requires_grad_()
    tiled(query, keys, keys, plan(torch.full((30,), 1), bounds)).square().sum().backward()
    touched = keys.grad.any(dim=1)
    assert touched.nonzero().flatten().tolist() == list(range(4, 74))


def test_two_runs_give_the_same_bits(device):
    inputs = make_inputs([3, 100, 33], 60, 8, 8, True, seed=6)
    found, again = (results(inputs, torch.float32)[0] for _ in range(2))
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@TIED
def test_empty_batch(device, tied):
    leaves = [torch.randn(size, 4, device=device, requires_grad=True) for size in (0, 50, 50)]
    query, keys, values = leaves[0], leaves[1], leaves[1 if tied else 2]
    ids = torch.empty(0, dtype=torch.long)
    output = tiled(query, keys, values, plan(ids, allocation_to_bounds([20, 30])))
    assert output.shape == (0, 4)
    output.sum().backward()
    assert query.grad.shape == (0, 4)
    assert not keys.grad.any()
    assert not values.grad.any()


def test_any_strides(device):
    query, token_ids, bounds, keys, values = (
        x.detach().to(device) for x in make_inputs([3, 5], 20, 6, 4, False, seed=7)
    )
    plain, turned = [[query, keys, values], [x.T.contiguous().T for x in (query, keys, values)]]
    gradients = []
    for leaves in (plain, turned):
        leaves = [x.requires_grad_() for x in leaves]
        output = tiled(*leaves, plan(token_ids, bounds))
        # The gradient of a sum is one number, seen from every place.
        gradients.append(torch.autograd.grad(output.sum(), leaves))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@TIED
def test_gradcheck(device, tied):
    query, token_ids, bounds, keys, values = make_inputs([1, 2], 3, 2, 2, tied, seed=8)
    divided = plan(token_ids, bounds)
    leaves = [x.detach().to(device).requires_grad_() for x in (query, keys, values)]
    if tied:
        assert torch.autograd.gradcheck(lambda q, k: tiled(q, k, k, divided), leaves[:2])
    else:
        assert torch.autograd.gradcheck(lambda q, k, v: tiled(q, k, v, divided), leaves)


def test_second_derivative_is_refused(device):
    query, token_ids, bounds, keys, values = make_inputs([3, 2], 5, 4, 4, False, seed=0)
    query, keys, values = (x.detach().to(device).requires_grad_() for x in (query, keys, values))
    output = tiled(query, keys, values, plan(token_ids, bounds)).square().sum()
    (grad,) = torch.autograd.grad(output, query, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@given(st.lists(st.integers(1, 3 * ROWS), min_size=1, max_size=6), st.integers(0, 200), st.data())
def test_every_score_lies_in_one_tile_of_each_list(alloc, n_positions, data):
    vocab = st.integers(0, len(alloc) - 1)
    ids = data.draw(st.lists(vocab, min_size=n_positions, max_size=n_positions))
    bounds = allocation_to_bounds(alloc)
    tiles = plan(torch.tensor(ids, dtype=torch.long), bounds)
    wanted = torch.zeros(len(ids), sum(alloc))
    for place, token in enumerate(sorted(ids)):
        wanted[place, bounds[token] : bounds[token + 1]] = 1
    by_positions, by_rows = torch.zeros_like(wanted), torch.zeros_like(wanted).T
    for scores, some, size in (by_positions, tiles.positions, POSITIONS), (by_rows, tiles.rows, ROWS):
        for start, stop, begin, end in some.tolist():
            assert stop - start <= size
            if start < stop:
                scores[start:stop, begin:end] += 1
    assert torch.equal(by_positions, wanted)
    assert torch.equal(by_rows.T, wanted)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device")
def test_tiles_and_kernels_do_not_wait_for_the_device():
    query, token_ids, bounds, keys, _ = (
        x.detach().to(DEVICE) for x in make_inputs([3, 90, 40], 100, 16, 16, True, seed=9)
    )
    query.requires_grad_()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tiled(query, keys, keys, make_tiles(token_ids, bounds, len(keys))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@TIED
def test_operators_keep_pytorchs_rules(device, tied):
    query, token_ids, bounds, keys, values = (
        x.detach().to(device) for x in make_inputs([3, 40, 1], 30, 6, 6, tied, seed=0)
    )
    given = query, keys, None if tied else values, *plan(token_ids, bounds)
    torch.library.opcheck(operators.TILED, given)
    torch.library.opcheck(operators.TILED_BACKWARD, (query, *given, *operators.TILED(*given)))


def test_without_triton_nothing_is_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert not copy.available(torch.device("cuda"))
    assert not copy.available(torch.device("cpu"))
