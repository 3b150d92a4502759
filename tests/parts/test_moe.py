"""The mixture of experts against one position at a time, its auxiliary loss against its formula."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from l3paper.parts.moe import MoE
from l3paper.parts.optimizer import MuonAdamW


def make(n_experts, k, n_embd=6, width=5, seed=0, dtype=torch.float64):
    """A layer whose router has opinions and whose experts do something."""
    torch.manual_seed(seed)
    layer = MoE(n_embd, n_experts, k, width).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def one_at_a_time(layer, x):
    """What the layer computes, without sorting: every position calls its own experts."""
    rows = []
    for position in x.flatten(0, -2):
        p = (layer.router.weight @ position).softmax(dim=0)
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: layer.experts_per_token]
        rows.append(
            sum(p[e] * (layer.c_proj[e] @ (layer.c_fc[e] @ position).relu() ** 2) for e in chosen)
        )
    return torch.stack(rows).view_as(x)


def formula(layer, x):
    """(0.01 * load balancing loss, 0.001 * z loss), expert by expert."""
    logits = x.flatten(0, -2) @ layer.router.weight.T
    p = logits.softmax(dim=-1)
    n, e = p.shape
    chosen = p.topk(layer.experts_per_token).indices
    share = [(chosen == i).sum().item() / (n * layer.experts_per_token) for i in range(e)]
    balance = e * sum(share[i] * p[:, i].sum() / n for i in range(e))
    return 0.01 * balance, 0.001 * (logits.exp().sum(dim=-1).log() ** 2).sum() / n


def gradients(loss, layer, x):
    """Of x and every parameter; zeros where there is none."""
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        torch.zeros_like(p) if grad is None else grad for p, grad in zip(inputs, found, strict=True)
    ]


@settings(max_examples=60)
@given(st.data())
def test_equals_one_position_at_a_time(data):
    # Up to twelve experts for at least one position: often some get none.
    n_experts = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, min(3, n_experts)))
    shape = data.draw(st.sampled_from([(1,), (9,), (2, 5), (2, 1, 4)]))
    n_embd, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    layer = make(n_experts, k, n_embd, width, seed=data.draw(st.integers(0, 2**31)))
    x = torch.randn(*shape, n_embd, dtype=torch.float64, requires_grad=True)
    goal = torch.randn_like(x)
    result, expected = layer(x), one_at_a_time(layer, x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(layer.auxiliary, sum(formula(layer, x)))
    ours = gradients((result * goal).sum() + layer.auxiliary, layer, x)
    theirs = gradients((expected * goal).sum() + sum(formula(layer, x)), layer, x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck(k):
    layer = make(4, k, n_embd=3, width=2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        return layer(x), layer.auxiliary

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_starts_as_a_no_op_with_an_even_router():
    torch.manual_seed(0)
    layer = MoE(64, 8, 2, 32)
    x = F.rms_norm(torch.randn(500, 64), (64,))
    assert torch.equal(layer(x), torch.zeros_like(x))
    assert layer.load.max() < 0.2
    torch.testing.assert_close(layer.c_fc[3].std().item(), 1 / 8, rtol=0.1, atol=0)


def test_auxiliary_loss_of_a_balanced_router():
    # Position i chooses expert i alone, by a wide margin: shares and mean probabilities are 1 / 4.
    layer = make(4, 1, n_embd=4)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 50)
    layer(torch.eye(4, dtype=torch.float64))
    assert torch.equal(layer.load, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(layer.auxiliary.item(), 0.01 * 1.0 + 0.001 * 50.0**2)


def test_auxiliary_loss_of_a_collapsed_router():
    layer = make(4, 1, n_embd=4)
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 50.0
    layer(torch.ones(3, 4, dtype=torch.float64))
    assert layer.load.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(layer.auxiliary.item(), 0.01 * 4 + 0.001 * 200.0**2)


def test_an_expert_without_positions_stays_where_it_is():
    layer = make(5, 1, n_embd=4, dtype=torch.float32)
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.0
    experts = [*layer.c_fc, *layer.c_proj]
    optimizer = MuonAdamW({"params": experts}, [{"params": [layer.router.weight]}])
    before = deepcopy(layer.state_dict())
    for _ in range(2):
        (layer(torch.ones(3, 4)).sum() + layer.auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in layer.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"router.weight", "c_fc.2", "c_proj.2"}


@pytest.mark.parametrize("k", [1, 2])
def test_auxiliary_loss_evens_out_a_skewed_load(k):
    def largest_load(with_auxiliary):
        """The largest share of the choices at the first step, and its mean over the last twenty."""
        torch.manual_seed(0)
        layer = MoE(16, 8, k, 16)
        with torch.no_grad():
            layer.router.weight.normal_(std=0.1)
            layer.router.weight[0] = 0.5  # inputs have mean 1/2: nearly all of them prefer expert 0
        optimizer = MuonAdamW(
            {"params": [*layer.c_fc, *layer.c_proj], "lr": 0.02, "weight_decay": 0.0},
            [{"params": [layer.router.weight], "lr": 0.01}],
        )
        target = torch.randn(16, 16) / 4
        largest = []
        for _ in range(200):
            x = torch.randn(256, 16) + 0.5
            loss = F.mse_loss(layer(x), (x @ target).relu())
            largest.append(layer.load.max().item())
            (loss + layer.auxiliary if with_auxiliary else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        return largest[0], sum(largest[-20:]) / 20

    (start, end), (_, left_alone) = largest_load(True), largest_load(False)
    assert start > 0.9 / k
    assert end < 0.6 * start
    assert left_alone > 0.9 * start


def test_router_keeps_its_precision_under_autocast():
    layer, x = make(16, 2, dtype=torch.float32), torch.randn(200, 6)
    full, auxiliary, load = layer(x), layer.auxiliary, layer.load
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.3)
    assert torch.equal(layer.auxiliary, auxiliary)
    assert torch.equal(layer.load, load)


def test_layer_can_be_copied_after_a_forward_pass():
    layer, x = make(4, 2), torch.randn(7, 6, dtype=torch.float64)
    expected = layer(x)
    twin = deepcopy(layer)
    assert twin.auxiliary is None
    assert layer.auxiliary is not None
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 2, 8), "n_embd is 0; it must be at least 1"),
        ((8, 0, 2, 8), "n_experts is 0; it must be at least 1"),
        ((8, 4, 2, 0), "expert_width is 0; it must be at least 1"),
        ((8, 4, 0, 8), "experts_per_token is 0; it must be 1 .. n_experts = 4"),
        ((8, 4, 5, 8), "experts_per_token is 5; it must be 1 .. n_experts = 4"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MoE(*sizes)
