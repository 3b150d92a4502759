"""Checkers of notebook 09: L3 in a model of one's own."""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from l3paper import L3Layer, allocation_to_bounds, compute_lzw_allocation

ALLOC = [2, 1, 5, 3]


def check_1(answer: Callable) -> None:
    """A function (documents, embedding_size, n_emb, k_max): bounds for all rows of the embedding."""
    documents, size, n_emb, k_max = [[0, 1, 2, 1, 2, 3, 1, 2]] * 20, 8, 16, 6
    bounds = answer(documents, size, n_emb, k_max)
    assert len(bounds) == size + 1, (
        f"{len(bounds)} bounds cover {len(bounds) - 1} ids, but the embedding has {size} rows"
    )
    assert (bounds.diff() >= 1).all(), "an id without rows: a softmax over no rows has no value"
    assert bounds[-1] == n_emb, f"the tokens own {int(bounds[-1])} rows in all, not n_emb = {n_emb}"
    expected = allocation_to_bounds(compute_lzw_allocation(documents, size, n_emb, k_max))
    assert bounds.tolist() == expected.tolist(), "do padded ids take more than the one row they need?"


def check_2(answer: Callable) -> None:
    """A function (model, lr, table_lr, projection_lr): param groups, each parameter in one of them."""
    bounds = allocation_to_bounds(ALLOC)
    layers = [L3Layer(4, 11, 6, tied, bounds=bounds) for tied in (True, False)]
    model = nn.Sequential(nn.Linear(4, 4), *layers)
    model[0].bias.requires_grad_(False)
    groups = answer(model, 1e-3, 1e-2, 1e-4)
    optimizer = torch.optim.AdamW(groups)  # which decays by 0.01 if a group says nothing else
    found = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained <= found.keys(), "a parameter is in no group; is one layer untied?"
    assert found.keys() <= trained, "a frozen parameter needs no optimizer"
    assert max(found.values()) == 1, "a parameter is in two groups; do tied tables come twice?"
    tables = {id(table) for layer in layers for table in layer.tables()}
    projections = {id(module.weight) for layer in layers for module in layer.projections()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = "table" if id(p) in tables else "projection" if id(p) in projections else "rest"
            expected = {"table": 1e-2, "projection": 1e-4, "rest": 1e-3}[kind]
            assert group["lr"] == expected, f"{kind}: the rate is {group['lr']}, not {expected}"
            decays = kind == "table" and group["weight_decay"]
            assert not decays, "AdamW decays weights unless told otherwise; tables must not decay"


def check_3(answer: Callable, model: nn.Module) -> None:
    """A function (model, soft_prompt, ids, stand_in): logits (B, P + T, vocab_size)."""
    embedding = model.get_input_embeddings()
    torch.manual_seed(0)
    soft_prompt, stand_in = torch.randn(3, embedding.embedding_dim), 2
    ids = torch.randint(3, model.config.vocab_size, (2, 4))
    with torch.no_grad():
        logits = answer(model, soft_prompt, ids, stand_in)
        assert logits.shape[:2] == (2, 7), (
            f"logits {tuple(logits.shape)}; are all 3 + 4 positions there?"
        )
        inputs = torch.cat([soft_prompt.expand(2, -1, -1), embedding(ids)], dim=1)
        token_ids = torch.cat([torch.full((2, 3), stand_in), ids], dim=1)
        expected = model(inputs_embeds=inputs, token_ids=token_ids).logits
    assert torch.allclose(logits, expected, atol=1e-5), (
        "the logits differ: the soft prompt comes first, and each real token keeps its own rows"
    )


def check_4(answer: Callable) -> None:
    """A function (layer, like) that adds a token whose rows are copies of those of `like`."""
    for tied in (True, False):
        torch.manual_seed(0)
        layer = L3Layer(4, sum(ALLOC), 6, tied, bounds=allocation_to_bounds(ALLOC))
        nn.init.normal_(layer.w_mix.weight)
        x, ids, new = torch.randn(3, 4), torch.tensor([0, 1, 3]), torch.full((3,), len(ALLOC))
        before = layer(x, ids)
        answer(layer, 2)
        assert len(layer.bounds) == len(ALLOC) + 2, "the layer must know one token more"
        assert torch.equal(layer(x, ids), before), "the tokens of before must keep their rows"
        assert layer.bounds.diff()[-1] == ALLOC[2], "how many rows does the token `like` own?"
        same = torch.allclose(layer(x, new), layer(x, torch.full((3,), 2)))
        assert same, "the new token reads other rows; untied layers have keys and values to copy"
        assert all(p.requires_grad and p.is_leaf for p in layer.parameters()), (
            "the tables must still be trained: copy their numbers without autograd"
        )


def check_5(answer: Callable) -> None:
    """A function (average, model, decay) that moves `average` towards `model`, in place."""
    bounds = allocation_to_bounds([1 + i % 5 for i in range(200)])
    model = nn.ModuleList([L3Layer(4, int(bounds[-1]), 6, bounds=bounds), nn.BatchNorm1d(4)])
    average = copy.deepcopy(model)
    model[1](torch.randn(8, 4))  # moves its buffers
    expected = {}
    for name, parameter in model.named_parameters():
        old = parameter.detach().clone()
        nn.init.normal_(parameter)
        expected[name] = 0.9 * old + 0.1 * parameter
    answer(average, model, 0.9)
    for name, parameter in average.named_parameters():
        assert not torch.equal(parameter, model.get_parameter(name)), f"{name} is copied, not averaged"
        assert torch.allclose(parameter, expected[name], atol=1e-6), f"{name}: see the formula"
    for name, buffer in average.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), f"{name} is a buffer: keep the model's"
