"""Every variant equals its own formula, and starts as a no-op unless it says otherwise."""

import pytest
import torch

from l3paper import allocation_to_bounds
from l3paper.layer import L3Layer, rms_norm
from l3paper.lookup.reference import loop
from l3paper.parts.variants import VARIANTS

ALLOC = [3, 1, 5, 2]


def make(name, **options):
    torch.manual_seed(0)
    layer = VARIANTS[name](8, sum(ALLOC), 12, **options).double()
    layer.set_bounds(allocation_to_bounds(ALLOC))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def found(layer, x, ids, query=None, keys=None):
    own_keys, values = layer.tables()
    query = rms_norm(x) if query is None else query
    keys = own_keys if keys is None else keys
    flat = loop(query.flatten(0, 1), ids.flatten(), layer.bounds, keys, values)
    return flat.view(*x.shape[:-1], -1)


def mixed(layer, up, *rest):
    return layer.w_mix(torch.cat([up, *rest], dim=-1))


def up(layer, vector):
    return rms_norm(layer.w_up(vector))


FORMULAS = {
    "": lambda m, x, ids: mixed(m, up(m, found(m, x, ids)), x),
    "no-up": lambda m, x, ids: mixed(m, rms_norm(found(m, x, ids)), x),
    "no-residual": lambda m, x, ids: mixed(m, up(m, found(m, x, ids))),
    "normalised-residual": lambda m, x, ids: mixed(m, up(m, found(m, x, ids)), rms_norm(x)),
    "scaled-softmax": lambda m, x, ids: mixed(m, up(m, found(m, x, ids, rms_norm(x) / 8**0.5)), x),
    "normalised-keys": lambda m, x, ids: mixed(
        m, up(m, found(m, x, ids, keys=m.tables()[0] / m.tables()[0].norm(dim=1, keepdim=True))), x
    ),
    "random-start": lambda m, x, ids: mixed(m, up(m, found(m, x, ids)), x),
}


@pytest.mark.parametrize("options", [{}, {"tie_kv": False, "d_emb": 5}], ids=["tied", "untied"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_its_formula(name, options):
    layer = make(name, **options)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    ids = torch.randint(0, 4, (2, 7))
    torch.testing.assert_close(layer(x, ids), FORMULAS[name](layer, x, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_starts_as_a_no_op_or_not(name):
    layer = VARIANTS[name](8, sum(ALLOC), 12)
    layer.set_bounds(allocation_to_bounds(ALLOC))
    delta = layer(torch.randn(2, 7, 8), torch.randint(0, 4, (2, 7)))
    assert delta.any() == (name == "random-start")


@pytest.mark.parametrize("name", VARIANTS)
def test_projections_and_tables_are_all_parameters(name):
    layer = VARIANTS[name](8, sum(ALLOC), 12)
    named = {id(p) for p in [*layer.tables(), *(m.weight for m in layer.projections())]}
    assert {id(p) for p in layer.parameters()} == named
    assert isinstance(layer, L3Layer)
