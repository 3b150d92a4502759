"""The tables of any model get a learning rate of their own."""

import pytest
import torch
from torch import nn

from l3paper import L3Layer, allocation_to_bounds, l3_param_groups
from l3paper.lookup.offload import offload_tables

BOUNDS = allocation_to_bounds([3, 1, 2])


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_and_tables_do_not_decay(tied):
    layers = [L3Layer(6, 6, 8, tie_kv=tied, bounds=BOUNDS) for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleList(layers))
    model[0].bias.requires_grad_(False)
    rest, tables = l3_param_groups(model, lr=0.1, table_lr=0.3, weight_decay=0.01)
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 0.01)
    assert (tables["lr"], tables["weight_decay"]) == (0.3, 0.0)
    names = layers[0].table_names()
    assert {id(p) for p in tables["params"]} == {id(getattr(m, n)) for m in layers for n in names}
    both = [id(p) for group in (rest, tables) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW([rest, tables])


def test_a_model_without_tables_is_refused():
    for model in (nn.Linear(2, 2), offload_tables(L3Layer(6, 6, 8, bounds=BOUNDS), "cpu")):
        with pytest.raises(ValueError, match="model has no L3 tables"):
            l3_param_groups(model, lr=0.1, table_lr=0.3)
