"""The chunked loss against PyTorch's own, and the memory it saves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from l3paper.parts import loss
from l3paper.parts.loss import linear_cross_entropy, soft_cap


def plain(hidden, weight, targets, cap):
    return F.cross_entropy(soft_cap(hidden @ weight.T, cap), targets, ignore_index=-1)


@given(
    positions=st.integers(1, 20),
    vocab=st.integers(2, 15),
    chunk=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_pytorch(positions, vocab, chunk, seed):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, 4, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 4, generator=random, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, vocab, (positions,), generator=random)
    targets[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_NUMBERS", chunk)
        found = linear_cross_entropy(hidden, weight, targets, cap=3.0)
    expected = plain(hidden, weight, targets, 3.0)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(2 * found, [hidden, weight]),
        torch.autograd.grad(2 * expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_gradient_wanted_none_computed():
    hidden, weight = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True)
    targets = torch.randint(5, (6,))
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, cap=3.0)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(hidden, weight, targets, 3.0).detach())


def test_all_targets_ignored():
    with pytest.raises(ValueError, match="nothing to average"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([-1, -1]), cap=3.0)


def test_second_derivative_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    found = linear_cross_entropy(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]), cap=3.0)
    (grad,) = torch.autograd.grad(found.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bfloat16_is_close_and_sums_in_float32():
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    targets = torch.randint(50, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets, cap=15.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(hidden, weight, targets, 15.0), rtol=0.02, atol=0.02)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


def test_logits_never_exist_as_a_whole():
    positions, vocab, width = 4096, 2048, 8
    hidden, weight = torch.randn(positions, width, requires_grad=True), torch.randn(vocab, width)
    targets = torch.randint(vocab, (positions,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets, cap=15.0).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < positions * vocab * 4 / 4  # bytes: under a quarter of the logits
