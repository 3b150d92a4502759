"""L3Layer: the equation around the lookup, its state, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from l3paper import L3Layer, allocation_to_bounds
from l3paper.layer import rms_norm
from l3paper.lookup import LOOKUPS, loop, padded
from l3paper.lookup import grouped as grouped_module

ALLOC = [5, 1, 9, 2, 1, 6]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make_layer(tied=True, d_emb=None, lookup="grouped", n_embd=16, dtype=torch.float32):
    torch.manual_seed(0)
    layer = L3Layer(n_embd, sum(ALLOC), d_up=24, tie_kv=tied, d_emb=d_emb, lookup=lookup).to(dtype)
    layer.set_bounds(allocation_to_bounds(ALLOC))
    with torch.no_grad():  # as somebody else's initialisation would do
        for parameter in layer.parameters():
            parameter.normal_(std=0.1) if parameter.ndim >= 2 else parameter.zero_()
    return layer


def make_batch(n_embd=16, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 7, n_embd, dtype=dtype), torch.randint(0, len(ALLOC), (3, 7))


@TIED
def test_forward_is_the_equation(tied):
    layer = make_layer(tied, dtype=torch.float64)
    x, ids = make_batch(dtype=torch.float64)
    keys, values = layer.tables()
    expected = torch.empty_like(x)
    for b in range(3):
        for t in range(7):
            state, token = x[b, t], ids[b, t]
            own = slice(layer.bounds[token], layer.bounds[token + 1])
            normed = state / state.square().mean().add(torch.finfo(state.dtype).eps).sqrt()
            found = values[own].T @ (keys[own] @ normed).softmax(0)
            up = layer.w_up.weight @ found
            up = up / up.square().mean().add(torch.finfo(up.dtype).eps).sqrt()
            expected[b, t] = layer.w_mix.weight @ torch.cat([up, state])
    torch.testing.assert_close(layer(x, ids), expected)


@TIED
@pytest.mark.parametrize("shape", [(2, 5), (5,), (1, 2, 3), (), (0,)])
def test_output_has_the_shape_of_x(tied, shape):
    layer = make_layer(tied)
    out = layer(torch.randn(*shape, 16), torch.randint(0, len(ALLOC), shape))
    assert out.shape == (*shape, 16)
    assert out.isfinite().all()


@TIED
def test_every_parameter_and_the_input_get_gradients(tied):
    layer = make_layer(tied)
    x, ids = make_batch()
    x.requires_grad_()
    layer(x, ids).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_gradients_reach_only_rows_of_tokens_in_the_batch():
    layer = make_layer()
    x, _ = make_batch()
    layer(x, torch.full(x.shape[:2], 2)).square().sum().backward()
    touched = layer.kv_weight.grad.abs().sum(dim=1) > 0
    own = torch.zeros(sum(ALLOC), dtype=torch.bool)
    own[layer.bounds[2] : layer.bounds[3]] = True
    assert (touched == own).all()


def test_names_of_tied_and_untied_parameters():
    tied = {name for name, _ in make_layer(True).named_parameters()}
    untied = {name for name, _ in make_layer(False, d_emb=4).named_parameters()}
    assert tied == {"kv_weight", "w_up.weight", "w_mix.weight"}
    assert untied == {"k_weight", "v_weight", "w_up.weight", "w_mix.weight"}


def test_untied_values_may_have_another_width():
    layer = make_layer(False, d_emb=4)
    assert layer.v_weight.shape == (sum(ALLOC), 4)
    assert layer(*make_batch()).shape == (3, 7, 16)


@TIED
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_interchangeable(name, tied):
    x, ids = make_batch()
    layer = make_layer(tied, lookup=name)
    torch.testing.assert_close(layer(x, ids), make_layer(tied, lookup=loop)(x, ids))


@TIED
@pytest.mark.parametrize("most", [1, grouped_module.FEW])
def test_few_positions_without_gradients_give_the_same(tied, most, monkeypatch):
    monkeypatch.setattr(grouped_module, "FEW", most)
    calls = []
    monkeypatch.setattr(grouped_module, "padded", lambda *given: calls.append(1) or padded(*given))
    x, ids = make_batch()
    layer = make_layer(tied)
    with torch.no_grad():
        found = layer(x, ids)
    assert bool(calls) == (most > 1)
    torch.testing.assert_close(found, make_layer(tied, lookup=loop)(x, ids))


def test_same_input_same_output():
    layer = make_layer()
    x, ids = make_batch()
    assert torch.equal(layer(x, ids), layer(x, ids))


def test_positions_do_not_mix():
    layer = make_layer()
    x, ids = make_batch()
    before = layer(x, ids)
    x[0, 0] += 1
    changed = (layer(x, ids) != before).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 0]]


def test_fresh_layer_is_a_no_op_that_can_learn():
    layer = L3Layer(16, sum(ALLOC), d_up=24)
    layer.set_bounds(allocation_to_bounds(ALLOC))
    x, ids = make_batch()
    assert not layer(x, ids).any()
    layer(x, ids).sum().backward()
    assert layer.w_mix.weight.grad.any()


@TIED
def test_fresh_keys_give_scores_of_unit_variance(tied):
    torch.manual_seed(0)
    layer = L3Layer(256, 4096, d_up=8, tie_kv=tied)
    scores = rms_norm(torch.randn(64, 256)) @ layer.tables()[0].T
    assert scores.std().item() == pytest.approx(1, rel=0.05)


def test_norm_gains_would_be_superfluous():
    layer, folded = make_layer(False), make_layer(False)
    x, ids = make_batch()
    gain_in, gain_out = torch.rand(16) + 0.5, torch.rand(24) + 0.5
    with torch.no_grad():
        folded.k_weight.mul_(gain_in)
        folded.w_mix.weight[:, :24].mul_(gain_out)
    found = loop((rms_norm(x) * gain_in).flatten(0, 1), ids.flatten(), layer.bounds, *layer.tables())
    up = rms_norm(layer.w_up(found)).view(3, 7, 24) * gain_out
    torch.testing.assert_close(folded(x, ids), layer.w_mix(torch.cat([up, x], -1)))


@TIED
@pytest.mark.parametrize("other_has", ["no bounds", "the same bounds", "bounds of another vocabulary"])
def test_state_dict_loads_whatever_the_other_layer_had(tied, other_has):
    layer = make_layer(tied)
    other = L3Layer(16, sum(ALLOC), d_up=24, tie_kv=tied)
    if other_has != "no bounds":
        other.set_bounds(allocation_to_bounds(ALLOC if "same" in other_has else [sum(ALLOC) - 1, 1]))
    other.load_state_dict(layer.state_dict())
    batch = make_batch()
    assert torch.equal(other(*batch), layer(*batch))


def test_state_dict_without_bounds_keeps_the_layers_own():
    layer = make_layer()
    layer.load_state_dict(L3Layer(16, sum(ALLOC), d_up=24).state_dict())
    assert layer.bounds.tolist() == allocation_to_bounds(ALLOC).tolist()


def test_state_dict_with_wrong_bounds_is_refused():
    layer = make_layer()
    state = layer.state_dict()
    state["bounds"] = allocation_to_bounds([sum(ALLOC) + 1])
    with pytest.raises(RuntimeError, match="must start at 0 and end at n_emb = 24"):
        layer.load_state_dict(state)
    assert layer.bounds.tolist() == allocation_to_bounds(ALLOC).tolist()


def test_bounds_exist_from_construction():
    bounds = allocation_to_bounds(ALLOC)
    unset = L3Layer(16, sum(ALLOC), d_up=24, vocab_size=len(ALLOC))
    assert unset.state_dict()["bounds"].tolist() == [0] * (len(ALLOC) + 1)
    given = L3Layer(16, sum(ALLOC), d_up=24, bounds=bounds)
    assert torch.equal(given.bounds, bounds)
    given(*make_batch())
    with pytest.raises(ValueError, match="call set_bounds"):
        unset(*make_batch())


def test_loaders_that_copy_into_the_buffers_set_the_bounds():
    layer = make_layer()
    other = L3Layer(16, sum(ALLOC), d_up=24, vocab_size=len(ALLOC))
    for name, tensor in other.state_dict().items():
        tensor.copy_(layer.state_dict()[name])
    assert torch.equal(other(*make_batch()), layer(*make_batch()))


def corrupt_in_place(layer):
    layer.bounds[3] -= 1
    layer.bounds[2] = layer.bounds[3]


def corrupt_by_averaging(layer):
    averaged = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(4):
        averaged.update_parameters(layer)
    layer.bounds = averaged.module.bounds


@pytest.mark.parametrize("corrupt", [corrupt_in_place, corrupt_by_averaging])
def test_bounds_corrupted_on_the_way_are_refused(corrupt):
    layer = make_layer()
    layer(*make_batch())  # so that they have been checked once before
    corrupt(layer)
    with pytest.raises(ValueError, match="bounds"):
        layer(*make_batch())


def test_bounds_are_looked_at_once_after_a_change():
    layer, batch = make_layer(), make_batch()
    layer(*batch)
    checked = layer._checked
    layer(*batch)
    assert layer._checked is checked
    same = layer.bounds_id()
    layer.bounds.copy_(allocation_to_bounds(ALLOC[::-1]))
    assert layer.bounds_id() != same
    torch.testing.assert_close(layer(*batch), make_reversed(layer)(*batch))


def make_reversed(layer):
    other = L3Layer(16, sum(ALLOC), d_up=24, lookup="loop", bounds=allocation_to_bounds(ALLOC[::-1]))
    weights = {name: p for name, p in layer.state_dict().items() if name != "bounds"}
    other.load_state_dict(weights)
    return other


@TIED
def test_device_and_type_of_the_parameters(tied):
    layer = L3Layer(16, 24, 8, tie_kv=tied, vocab_size=4, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.bounds.dtype == torch.long
    meta = L3Layer(16, 24, 8, tie_kv=tied, vocab_size=4, device="meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_bounds_are_a_copy():
    bounds = allocation_to_bounds(ALLOC)
    layer = L3Layer(16, sum(ALLOC), d_up=24)
    layer.set_bounds(bounds)
    bounds.zero_()
    assert layer.bounds.tolist() == allocation_to_bounds(ALLOC).tolist()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 3, 23]), "end at n_emb = 24"),
        (torch.tensor([1, 3, 24]), "start at 0"),
        (torch.tensor([0, 3, 3, 24]), "token 1 owns no row"),
        (torch.tensor([0, 9, 3, 24]), "token 1 owns no row"),
        (torch.tensor([0]), "start at 0 and end"),
        (torch.tensor([], dtype=torch.long), "start at 0 and end"),
        (torch.tensor([0.0, 24.0]), "LongTensor"),
        (torch.tensor([[0, 24]]), "one-dimensional"),
        ([0, 24], "LongTensor"),
    ],
)
def test_bad_bounds(bounds, message):
    with pytest.raises(ValueError, match=message):
        L3Layer(16, 24, d_up=24).set_bounds(bounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(n_embd=0), "n_embd is 0"),
        (dict(n_emb=0), "n_emb is 0"),
        (dict(d_up=-1), "d_up is -1"),
        (dict(d_emb=0), "d_emb is 0"),
        (dict(d_emb=8), "d_emb is 8, but tied"),
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(vocab_size=3, bounds=torch.tensor([0, 9, 24])), "vocab_size is 3, but bounds have 3"),
        (dict(lookup="fastest"), "lookup is 'fastest'; choose one of loop, padded, blocked, grouped"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        L3Layer(**{"n_embd": 16, "n_emb": 24, "d_up": 24, **arguments})


def test_forward_before_set_bounds():
    with pytest.raises(ValueError, match="call set_bounds"):
        L3Layer(16, 24, d_up=24)(*make_batch())


@pytest.mark.parametrize(
    ("x", "ids", "message"),
    [
        (torch.randn(2, 3, 16), torch.full((2, 3), 6), "span 6 .. 6; they must be in 0 .. 5"),
        (torch.randn(2, 3, 16), torch.full((2, 3), -1), "span -1 .. -1"),
        (torch.randn(2, 3, 15), torch.zeros(2, 3, dtype=torch.long), "must be"),
        (torch.randn(2, 3, 16), torch.zeros(2, 4, dtype=torch.long), "must be"),
        (torch.randn(2, 3, 16), torch.zeros(6, dtype=torch.long), "must be"),
        (torch.randn(2, 3, 16), torch.zeros(2, 3), "integers, int64"),
        (torch.randn(2, 3, 16), [[0, 1, 2], [0, 1, 2]], "token_ids list; they must be tensors"),
        (torch.tensor(1.0), torch.tensor(0), "must be"),
    ],
)
def test_bad_input(x, ids, message):
    with pytest.raises(ValueError, match=message):
        make_layer()(x, ids)


def test_works_under_autocast():
    layer = make_layer()
    x, ids = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, ids)
    expected = layer(x, ids)
    assert F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tables_take_the_type_of_autocast(tied):
    seen = []

    def spy(query, ids, bounds, keys, values):
        seen.append((keys.dtype, values.dtype, keys is values))
        return padded(query.to(keys.dtype), ids, bounds, keys, values)

    layer = make_layer(tied)
    layer.lookup = spy
    x, ids = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, ids).float().square().sum().backward()
        with torch.no_grad():
            layer(x, ids)
    layer(x, ids)
    low, own = (torch.bfloat16,) * 2, (torch.float32,) * 2
    assert seen == [(*low, tied), (*own, tied), (*own, tied)]
    assert all(table.grad.dtype == torch.float32 for table in layer.tables())


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_at_its_end(tied):
    layer = L3Layer(6, 10, 8, tie_kv=tied, bounds=allocation_to_bounds([3, 1, 6]))
    torch.nn.init.normal_(layer.w_mix.weight)
    x, ids = torch.randn(2, 5, 6), torch.randint(3, (2, 5))
    before, tables = layer(x, ids), [table.clone() for table in layer.tables()]
    with pytest.raises(ValueError, match=r"they must be in 0 \.\. 2"):
        layer(x, torch.full((2, 5), 3))
    layer.grow([2, 4])
    assert torch.equal(layer(x, ids), before)
    assert all(torch.equal(new[:10], old) for new, old in zip(layer.tables(), tables, strict=True))
    assert (layer.n_emb, layer.bounds.tolist()) == (16, [0, 3, 4, 10, 12, 16])
    assert layer(x, torch.full((2, 5), 4)).isfinite().all()
    assert (layer.tables()[0] is layer.tables()[1]) == tied
    again = L3Layer(6, 16, 8, tie_kv=tied, vocab_size=5)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, ids), before)
    with pytest.raises(ValueError, match="at least 1"):
        layer.grow([0])
    assert layer.n_emb == 16
    layer.requires_grad_(False)
    layer.grow([1])
    assert not any(table.requires_grad for table in layer.tables())


def test_another_type_than_the_weights_is_refused_outside_autocast():
    layer = L3Layer(6, 4, 8, bounds=allocation_to_bounds([3, 1]))
    x, ids = torch.randn(1, 2, 6), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, but the layer's"):
        layer(x.bfloat16(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16(), ids).dtype == torch.bfloat16
