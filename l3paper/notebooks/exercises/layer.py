"""Checkers of notebook 02."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from l3paper.allocation import allocation_to_bounds
from l3paper.lookup.reference import loop


def check_1(answer, tensors):
    """answer(x, token) is the layer's delta; tensors: bounds, keys, values, W_up, W_mix."""
    bounds, keys, values, w_up, w_mix = tensors
    for token in range(len(bounds) - 1):
        x = torch.randn(keys.shape[1], dtype=keys.dtype)
        query = rms_norm(x, x.shape)[None]
        looked_up = loop(query, torch.tensor([token]), bounds, keys, values)[0]
        up = w_up @ looked_up
        expected = w_mix @ torch.cat([rms_norm(up, up.shape), x])
        found = answer(x, token)
        assert found.shape == expected.shape, f"the result has shape {tuple(found.shape)}, not (C,)"
        assert torch.allclose(found, expected), f"wrong for token {token}: which rows does it own?"


def check_2(answer, ids, bounds):
    """answer(ids, bounds) is (rows, own), padded with each token's last row."""
    rows, own = answer(ids, bounds)
    length = bounds[ids + 1] - bounds[ids]
    assert rows.shape == own.shape == (len(ids), int(length.max())), "both have the shape (N, L)"
    assert torch.equal(own.sum(dim=1), length), "own must be true for d_t places of each position"
    last = (bounds[ids + 1] - 1)[:, None].expand_as(rows)
    assert torch.equal(rows[~own], last[~own]), "a padded place must point to its token's last row"
    first = bounds[ids][:, None] + torch.arange(rows.shape[1])
    assert torch.equal(rows[own], first[own]), "the other places must count up from the first row"


def check_3(answer):
    """answer(v, C, d_emb, d_up, tied) is the number of parameters of a layer."""
    from l3paper.layer import L3Layer

    for tied, d_emb in ((True, 8), (False, 8), (False, 4)):
        layer = L3Layer(8, 20, 12, tie_kv=tied, d_emb=d_emb)
        expected = sum(parameter.numel() for parameter in layer.parameters())
        found = answer(20, 8, d_emb, 12, tied)
        assert found == expected, f"{'tied' if tied else 'untied'}, d_emb = {d_emb}: {found} is not it"


def check_4(answer, weights_at):
    """answer is the length of the keys at which row 0 has a weight of 0.9."""
    weight = float(weights_at(answer, 0.0)[0])
    step = float(weights_at(answer + 0.01, 0.0)[0]) - weight
    assert abs(weight - 0.9) <= step, f"at that length the weight is {weight:.3f}"


def check_5(answer, layer):
    """answer(layer, gain) gives the first norm of an untied layer a gain, by changing its weights."""
    generator = torch.Generator().manual_seed(0)
    width = layer.keys.shape[1]
    layer.to(torch.float64)
    torch.nn.init.normal_(layer.w_mix.weight, generator=generator)
    ids = torch.randint(len(layer.bounds) - 1, (2, 5), generator=generator)
    x = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
    gain = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    query = (rms_norm(x, (width,)) * gain).flatten(0, 1)
    looked_up = loop(query, ids.flatten(), layer.bounds, layer.keys, layer.values)
    up = rms_norm(layer.w_up(looked_up), (layer.w_up.out_features,)).view(2, 5, -1)
    expected = layer.w_mix(torch.cat([up, x], dim=-1)).detach()
    assert not torch.allclose(layer(x, ids), expected), "the layer had that gain already"
    answer(layer, gain)
    assert torch.allclose(layer(x, ids), expected), "that is not the result with the gain"


def check_6(answer):
    """answer is a lookup: values and gradients as those of the loop."""
    for seed in range(3):
        inputs, upstream = _case(seed)
        expected, found = (_values_and_gradients(f, inputs, upstream) for f in (loop, answer))
        for name, a, b in zip(("result", "query", "keys", "values"), expected, found, strict=True):
            what = name if name == "result" else f"gradient of the {name}"
            assert torch.allclose(a, b), f"the {what} differs from the loop's"


def check_7(answer):
    """answer(q, k, v, g) are the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 1):
        q, k, v, g = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((7, 4), (rows, 4), (rows, 3), (7, 3))
        )
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        expected = torch.autograd.grad((q @ k.T).softmax(-1) @ v, leaves, g)
        with torch.no_grad():
            found = answer(q, k, v, g)
        for name, a, b in zip("qkv", expected, found, strict=True):
            assert torch.allclose(a, b), f"the gradient of {name} is wrong for a token of {rows} rows"


def _case(seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A random lookup in float64, (query, ids, bounds, keys, values), and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    bounds = allocation_to_bounds(torch.randint(1, 9, (20,), generator=generator))
    ids = torch.randint(20, (40,), generator=generator)
    query, keys, values, upstream = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((40, 6), (int(bounds[-1]), 6), (int(bounds[-1]), 3), (40, 3))
    )
    return (query, ids, bounds, keys, values), upstream


def _values_and_gradients(lookup, inputs, upstream) -> list[Tensor]:
    query, ids, bounds, keys, values = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (query, keys, values)]
    result = lookup(leaves[0], ids, bounds, *leaves[1:])
    return [result, *torch.autograd.grad(result, leaves, upstream)]
