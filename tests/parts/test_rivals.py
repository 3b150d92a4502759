"""Rivals against slow references, their caches, and what they start as."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from l3paper import GPT, GPTConfig
from l3paper.parts.rivals import (
    HEADS,
    KERNEL,
    MULTIPLIERS,
    N_GRAMS,
    RIVALS,
    TABLES,
    Engram,
    ExtraMLP,
    PerLayerEmbedding,
    table_sizes,
)

BASE = GPTConfig(sequence_len=16, vocab_size=30, n_layer=2, n_head=2, n_kv_head=2, n_embd=8)
SIZES = dict(rival_after_layers="0", rival_rows=200, rival_d_emb=5, rival_d_up=6)
MODELS = {name: replace(BASE, rival=name, **SIZES) for name in RIVALS}
EVERY = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def random_model(config, dtype=torch.float64):
    """A model whose parameters are all random: none of its parts adds nothing."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def norm(x):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + torch.finfo(x.dtype).eps)


@torch.no_grad()
def slow_engram(layer, x, ids):
    """The layer's equations for one sequence x (T, C), ids (T,): one position after the other."""
    values, out = [], []
    for t in range(len(ids)):
        rows = []
        for n, sizes, starts in zip(N_GRAMS, layer.sizes.tolist(), layer.starts.tolist(), strict=True):
            mixed = 0
            for back in range(n):
                token = ids[t - back] if t >= back else -1
                mixed ^= (token + 1) * MULTIPLIERS[back]
            rows += [
                layer.table[start + mixed % size] for size, start in zip(sizes, starts, strict=True)
            ]
        e = torch.cat(rows)
        agreement = float(norm(x[t]) @ norm(layer.w_k.weight @ e)) / math.sqrt(x.shape[1])
        v = layer.w_v.weight @ e / (1 + math.exp(-agreement))
        values.append(norm(v))
        summed = torch.zeros_like(v)
        for i in range(KERNEL):
            if t - 3 * i >= 0:
                summed = summed + layer.convolution[i] * values[t - 3 * i]
        out.append(v + summed * torch.sigmoid(summed))
    return torch.stack(out)


def test_engram_equals_its_slow_reference():
    torch.manual_seed(0)
    layer = Engram(8, 300, 5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, ids = torch.randn(2, 14, 8, dtype=torch.float64), torch.randint(0, 30, (2, 14))
    slow = torch.stack([slow_engram(layer, *one) for one in zip(x, ids.tolist(), strict=True)])
    torch.testing.assert_close(layer(x, ids), slow)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    fast = torch.autograd.grad(layer(x, ids).square().sum(), leaves)
    assert all(grad.isfinite().all() and grad.any() for grad in fast)
    torch.autograd.gradcheck(lambda x: layer(x, ids), x, fast_mode=True)


def test_engram_sees_the_last_three_tokens_and_older_ones_by_the_convolution_alone():
    layer = Engram(8, 300, 5)
    torch.nn.init.normal_(layer.w_v.weight)
    x, ids = torch.randn(1, 12, 8), torch.randint(0, 30, (1, 12))
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 30
    changed = (layer(x, ids) != layer(x, other)).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [4, 5, 6]
    torch.nn.init.normal_(layer.convolution)
    changed = (layer(x, ids) != layer(x, other)).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [4, 5, 6, 7, 8, 9, 10, 11]


def test_hashes_spread_n_grams_over_their_tables():
    layer = Engram(4, 800, 2)
    ids = torch.randint(0, 5000, (1, 20_000), generator=torch.Generator().manual_seed(0))
    before = [F.pad(ids, (n, 0), value=-1)[:, : ids.shape[1]] for n in range(3)]
    rows = layer.row_numbers(before)  # (1, T, TABLES)
    ends = layer.starts.flatten() + layer.sizes.flatten()
    for head, (start, end) in enumerate(zip(layer.starts.flatten(), ends, strict=True)):
        counts = rows[..., head].flatten().bincount(minlength=int(end))[int(start) : int(end)]
        assert counts.sum() == ids.numel()
        assert counts.min() > 0.5 * counts.double().mean()  # 200 per row, give or take 14
    alike = (rows[0, :, 0] == rows[0, :1, 0]).sum()
    both = ((rows[0, :, 0] == rows[0, :1, 0]) & (rows[0, :, 1] == rows[0, :1, 1])).sum()
    assert both < alike / 20  # what collides in one table seldom does in another


@pytest.mark.parametrize("rows", [805, 6445, 100_000, 2**31 - 1])
def test_tables_have_different_primes_that_add_up(rows):
    sizes = table_sizes(rows)
    assert len(set(sizes)) == len(sizes) == TABLES == HEADS * len(N_GRAMS)
    assert all(n % d for n in sizes for d in range(2, math.isqrt(n) + 1))
    assert list(sizes) == sorted(sizes)
    assert sum(sizes) == pytest.approx(rows, rel=0.01)


def test_per_layer_embedding_is_l3_with_one_row_per_token():
    layer = PerLayerEmbedding(8, 30, 5, 6).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, ids = torch.randn(2, 7, 8, dtype=torch.float64), torch.randint(0, 30, (2, 7))
    up = F.rms_norm(layer.table[ids] @ layer.w_up.weight.T, (6,))
    torch.testing.assert_close(layer(x, ids), torch.cat([up, x], -1) @ layer.w_mix.weight.T)


def test_extra_mlp_equals_its_formula():
    layer = ExtraMLP(8, 6).double()
    torch.nn.init.normal_(layer.c_proj.weight)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    hidden = (F.rms_norm(x, (8,)) @ layer.c_fc.weight.T).clamp(min=0) ** 2
    torch.testing.assert_close(layer(x, torch.zeros(2, 7).long()), hidden @ layer.c_proj.weight.T)


@EVERY
def test_starts_as_the_dense_model_and_moves_every_parameter(config):
    torch.manual_seed(0)
    dense = GPT(BASE)
    torch.manual_seed(0)
    model = GPT(config)
    idx, targets = torch.randint(0, 30, (2, 2, 16))
    assert torch.equal(model(idx), dense(idx))
    start = {name: p.clone() for name, p in model.rivals.named_parameters()}
    optimizer = model.setup_optimizer()
    for _ in range(3):
        model(idx, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not p.equal(start[name]) for name, p in model.rivals.named_parameters())


@EVERY
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_whole_sequence(config):
    model = random_model(config)
    ids = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = model.hidden_states(ids)
    lengths, cache = [2, 5, 1], model.new_cache(3)
    padded = torch.stack([F.pad(row[:n], (0, 5 - n)) for row, n in zip(ids, lengths, strict=True)])
    steps = [model.hidden_states(padded, cache)]
    torch.testing.assert_close(steps[0][1], whole[1, :5])
    cache.advance(lengths)
    for step in range(6):  # the sequences go on from different positions
        idx = torch.stack([row[n + step] for row, n in zip(ids, lengths, strict=True)])[:, None]
        hidden = model.hidden_states(idx, cache)[:, 0]
        expected = torch.stack([row[n + step] for row, n in zip(whole, lengths, strict=True)])
        torch.testing.assert_close(hidden, expected)
        cache.advance([1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rival="engrams", rival_after_layers="0"), "rival is 'engrams'; choose one of"),
        (dict(rival="mlp"), "rival is 'mlp' and rival_after_layers ''; give both or neither"),
        (dict(rival_after_layers="1"), "rival is '' and rival_after_layers '1'; give both"),
        (dict(rival="mlp", rival_after_layers="2"), "rival_after_layers is '2'; give different"),
        (dict(rival_rows=-1), "rival_rows is -1; it must be at least 0"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExtraMLP(8, 0), "d_up is 0"),
        (lambda: PerLayerEmbedding(8, 30, 0, 6), "d_emb is 0"),
        (lambda: Engram(8, 99, 5), "rows is 99; it must be at least 100"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
