"""The checkers of notebook 02 accept what is right and refuse what is nearly right."""

import pytest
import torch

from l3paper import allocation_to_bounds
from l3paper.lookup import LOOKUPS
from l3paper.notebooks.exercises import check

BOUNDS = allocation_to_bounds([2, 1, 3])
IDS = torch.tensor([2, 0, 1, 2])


def rms(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def delta(x, token, tensors, wrong=0):
    bounds, keys, values, w_up, w_mix = tensors
    rows = slice(bounds[token], bounds[token + 1] - wrong)
    looked_up = (keys[rows] @ rms(x)).softmax(0) @ values[rows]
    return w_mix @ torch.cat([rms(w_up @ looked_up), x])


def test_one_position():
    shapes = ((6, 4), (6, 4), (5, 4), (4, 9))
    tensors = (BOUNDS, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    check("02.1", lambda x, token: delta(x, token, tensors), tensors=tensors)
    with pytest.raises(AssertionError, match="which rows does it own"):
        check("02.1", lambda x, token: delta(x, token, tensors, wrong=1), tensors=tensors)


def padded(ids, bounds, filler):
    start, length = bounds[ids], bounds[ids + 1] - bounds[ids]
    place = torch.arange(int(length.max()))
    own = place < length[:, None]
    last = start[:, None] + torch.minimum(place, length[:, None] - 1)
    return torch.where(own, start[:, None] + place, 0) if filler == "first of all" else last, own


def test_padding():
    check("02.2", lambda ids, bounds: padded(ids, bounds, "last"), ids=IDS, bounds=BOUNDS)
    with pytest.raises(AssertionError, match="its token's last row"):
        check("02.2", lambda ids, bounds: padded(ids, bounds, "first of all"), ids=IDS, bounds=BOUNDS)


def test_parameters():
    def count(v, C, d_emb, d_up, tied):
        return v * (C if tied else C + d_emb) + d_up * d_emb + C * (d_up + C)

    check("02.3", count)
    with pytest.raises(AssertionError, match="untied, d_emb = 8"):
        check("02.3", lambda v, C, d_emb, d_up, tied: count(v, C, d_emb, d_up, True))


def test_length_of_keys():
    def weights_at(length, degrees):
        return torch.tensor([length * 2**0.5, 0.0, -length]).softmax(0)

    with pytest.raises(AssertionError, match="at that length the weight is"):
        check("02.4", 1.0, weights_at=weights_at)
    right = min((i / 1000 for i in range(5000)), key=lambda s: abs(weights_at(s, 0)[0] - 0.9))
    check("02.4", right, weights_at=weights_at)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bounds", BOUNDS)
        self.keys = torch.nn.Parameter(torch.randn(6, 4))
        self.values = torch.nn.Parameter(torch.randn(6, 4))
        self.w_up, self.w_mix = torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(9, 4, bias=False)

    def forward(self, x, ids):
        query = rms(x).flatten(0, 1)
        looked_up = LOOKUPS["loop"](query, ids.flatten(), self.bounds, self.keys, self.values)
        up = rms(self.w_up(looked_up)).view(*ids.shape, -1)
        return self.w_mix(torch.cat([up, x], dim=-1))


def test_gain():
    check("02.5", lambda layer, gain: layer.keys.data.mul_(gain), layer=Layer())
    with pytest.raises(AssertionError, match="not the result with the gain"):
        check("02.5", lambda layer, gain: layer.values.data.mul_(gain), layer=Layer())


def test_lookup():
    check("02.6", LOOKUPS["padded"])
    with pytest.raises(AssertionError, match="the result differs"):
        check("02.6", lambda *inputs: 2 * LOOKUPS["loop"](*inputs))


def test_backward():
    def backward(q, k, v, g, mean=True):
        weights = (q @ k.T).softmax(-1)
        scores = g @ v.T
        scores = weights * (scores - mean * (weights * scores).sum(-1, keepdim=True))
        return scores @ k, scores.T @ q, weights.T @ g

    check("02.7", backward)
    with pytest.raises(AssertionError, match="gradient of q"):
        check("02.7", lambda *inputs: backward(*inputs, mean=False))


def test_no_answer_yet_and_no_such_exercise(capsys):
    check("02.6", None)
    assert capsys.readouterr().out == "exercise 02.6: not attempted yet\n"
    with pytest.raises(ValueError, match=r"exercise is '02\.99'"):
        check("02.99", None)
    with pytest.raises(ValueError, match="know no such number"):
        check("99.1", None)
