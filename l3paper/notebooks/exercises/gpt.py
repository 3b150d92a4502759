"""Checkers of notebook 03: the L3 layer inside a GPT."""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from l3paper import GPT, GPTConfig, L3Layer
from l3paper.costs.accounting import account

SIZES = ({"n_embd": 128, "sequence_len": 128}, {"n_embd": 384, "sequence_len": 512})
"""The models for which exercise 4 is checked."""


def check_1(
    answer: tuple[Collection, Collection], config: GPTConfig, bounds: Tensor, idx: Tensor
) -> None:
    """Two sets: the positions of idx (1, T) whose logits depend on the rows of token 1.

    In the first, an L3 layer follows block 0 of `config`; in the second, block 1, the last.
    """
    assert len(answer) == 2, "give two sets: the layer after block 0, and the layer after block 1"
    hints = ("which positions does block 1 let look back?", "no block follows to look back")
    for places, after, hint in zip(answer, "01", hints, strict=True):
        model = _noisy(replace(config, l3_after_layers=after), bounds)
        before = model(idx)
        with torch.no_grad():
            model.l3_layers[after].kv_weight[bounds[1] : bounds[2]] = 0
        changed = (model(idx) != before).any(dim=-1)[0].nonzero().flatten().tolist()
        assert set(places) == set(changed), f"the layer after block {after}: {hint}"


def check_2(answer: Callable, config: GPTConfig, bounds: Tensor) -> None:
    """A function (model, layer, after) that puts an L3 layer into a dense model, in place."""
    expected = _noisy(config, bounds)
    (after,) = config.l3_blocks
    dense = GPT(replace(config, l3_after_layers=""))
    dense.load_state_dict(expected.state_dict(), strict=False)
    layer = L3Layer(config.n_embd, config.l3_n_emb, config.d_up, bounds=bounds)
    batches = [torch.randint(config.vocab_size, shape) for shape in ((1, 3), (2, 5))]
    plain = [dense(batch) for batch in batches]
    answer(dense, layer, after)
    for batch, logits in zip(batches, plain, strict=True):
        assert torch.equal(dense(batch), logits), "a fresh layer must not change any logits"
    layer.load_state_dict(expected.l3_layers[str(after)].state_dict())
    for batch, logits in zip(batches, plain, strict=True):
        got = dense(batch)
        assert not torch.equal(got, logits), "the layer has weights now, but the logits ignore it"
        assert torch.allclose(got, expected(batch), atol=1e-4), (
            "the logits differ from the package's; does the next block receive x + layer(x, ids), "
            "with the ids of this very batch?"
        )
    assert {id(p) for p in layer.parameters()} <= {id(p) for p in dense.parameters()}, (
        "the logits are right, but model.parameters() misses the layer, so no optimizer would train "
        "it: make the layer an attribute of a module of the model"
    )


def check_3(answer: Collection[str], config: GPTConfig, bounds: Tensor) -> None:
    """The parameters of a layer that get a gradient in step 2 if W_up and W_mix both start at zero."""
    torch.manual_seed(0)
    model = GPT(config)
    model.set_l3_bounds(bounds)
    (layer,) = model.l3_layers.values()
    nn.init.zeros_(layer.w_up.weight)
    optimizer = model.setup_optimizer()
    ids = torch.arange(config.vocab_size)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids.roll(1)).backward()
        optimizer.step()
    reached = {name for name, p in layer.named_parameters() if p.grad.abs().max() > 0}
    names = {name for name, _ in layer.named_parameters()}
    assert set(answer) <= names, f"the names are {sorted(names)}"
    assert set(answer) == reached, (
        "write down what Norm(W_up ...) is at the first step; which columns of W_mix can move then, "
        "and what does that leave for W_up?"
    )


def check_4(answer: Callable, mean_rows: float) -> None:
    """A function (config, mean_rows): the d_up for which an L3 layer costs what one block does."""
    for sizes in SIZES:
        dense = GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_kv_head=4, **sizes)
        base = account(dense).flops_forward
        block = account(replace(dense, n_layer=5)).flops_forward - base
        with_l3 = replace(
            dense, l3_after_layers="2", l3_n_emb=16_384, l3_d_up=int(answer(dense, mean_rows))
        )
        added = account(with_l3, mean_rows).flops_forward - base
        assert abs(added / block - 1) < 0.01, (
            f"for {sizes}, your layer costs {added / block:.3f} blocks; "
            "remember the attention scores, and that W_mix also takes x"
        )


def _noisy(config: GPTConfig, bounds: Tensor) -> GPT:
    """A model in which every part does something, unlike a fresh one."""
    torch.manual_seed(0)
    model = GPT(config)
    model.set_l3_bounds(bounds)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
