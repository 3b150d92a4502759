"""The checkers and the drawing of notebook 09: right answers pass, typical wrong ones get a hint."""

import matplotlib.pyplot as plt
import pytest
import torch

from l3paper import L3Layer, allocation_to_bounds, compute_lzw_allocation, l3_param_groups
from l3paper.experiments.statistics import over_seeds
from l3paper.notebooks.drawings import own_model as draw

transformers = pytest.importorskip("transformers")

from l3paper.huggingface import add_l3_layers, l3_layers  # noqa: E402
from l3paper.notebooks.exercises.own_model import (  # noqa: E402
    check_1,
    check_2,
    check_3,
    check_4,
    check_5,
)


def padded(documents, embedding_size, n_emb, k_max):
    return allocation_to_bounds(compute_lzw_allocation(documents, embedding_size, n_emb, k_max))


def test_exercise_1():
    check_1(padded)
    with pytest.raises(AssertionError, match="8 rows"):
        check_1(lambda documents, size, *rest: padded(documents, 4, *rest))
    with pytest.raises(AssertionError, match="without rows"):
        check_1(lambda *given: torch.cat([padded(given[0], 4, 16, 6), torch.full((4,), 16)]))
    with pytest.raises(AssertionError, match="20 rows in all"):
        check_1(lambda *given: torch.cat([padded(given[0], 4, 16, 6), torch.arange(17, 21)]))
    with pytest.raises(AssertionError, match="padded ids"):
        check_1(lambda *given: allocation_to_bounds([2] * 8))


def groups_of(model, lr, table_lr, projection_lr, decay=0.0):
    rest, tables = l3_param_groups(model, lr, table_lr)
    layers = [module for module in model.modules() if isinstance(module, L3Layer)]
    own = [projection.weight for layer in layers for projection in layer.projections()]
    ids = {id(parameter) for parameter in own}
    rest["params"] = [parameter for parameter in rest["params"] if id(parameter) not in ids]
    return [rest, tables | {"weight_decay": decay}, {"params": own, "lr": projection_lr}]


def test_exercise_2():
    check_2(groups_of)
    with pytest.raises(AssertionError, match="projection: the rate is"):
        check_2(lambda model, lr, table_lr, _: l3_param_groups(model, lr, table_lr))
    with pytest.raises(AssertionError, match="must not decay"):
        check_2(lambda *given: groups_of(*given, decay=0.01))
    with pytest.raises(AssertionError, match="in no group"):
        check_2(lambda *given: groups_of(*given)[1:])
    with pytest.raises(AssertionError, match="frozen"):
        check_2(lambda model, *_: [{"params": model.parameters()}])


def soft(model, soft_prompt, ids, stand_in):
    inputs = torch.cat([soft_prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
    first = torch.full((len(ids), len(soft_prompt)), stand_in)
    return model(inputs_embeds=inputs, token_ids=torch.cat([first, ids], 1)).logits


def test_exercise_3():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = add_l3_layers(transformers.LlamaForCausalLM(config), [0], allocation_to_bounds([3] * 8))
    torch.nn.init.normal_(l3_layers(model)[0].w_mix.weight)
    check_3(soft, model)
    with pytest.raises(AssertionError, match="3 \\+ 4 positions"):
        check_3(lambda model, soft_prompt, ids, stand_in: model(ids).logits, model)
    with pytest.raises(AssertionError, match="own rows"):
        check_3(lambda model, prompt, ids, _: soft(model, prompt, ids, 5), model)


@torch.no_grad()
def twin(layer, like):
    first, last = layer.bounds[like].item(), layer.bounds[like + 1].item()
    layer.grow([last - first])
    for table in layer.tables():
        table[first - last :] = table[first:last]


def test_exercise_4():
    check_4(twin)
    with pytest.raises(AssertionError, match="one token more"):
        check_4(lambda layer, like: None)
    with pytest.raises(AssertionError, match="how many rows"):
        check_4(lambda layer, like: layer.grow([1]))
    with pytest.raises(AssertionError, match="other rows"):
        check_4(lambda layer, like: layer.grow([5]))


@torch.no_grad()
def average_parameters(average, model, decay):
    for mine, other in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(other, 1 - decay)


@torch.no_grad()
def average_all(average, model, decay):
    average_parameters(average, model, decay)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(other)


def test_exercise_5():
    check_5(average_all)
    with pytest.raises(AssertionError, match="is a buffer"):
        check_5(average_parameters)
    with pytest.raises(AssertionError, match="copied"):
        check_5(lambda average, model, decay: average.load_state_dict(model.state_dict()))
    with pytest.raises(AssertionError, match="formula"):
        check_5(lambda average, model, decay: average_all(average, model, 1 - decay))


def test_drawing():
    legs = {"dense": {30: 5.0, 60: 4.5}, "continued": {90: 4.4, 105: 4.3}, "with L3": {90: 4.2}}
    losses = {leg: [run, {k: v + 0.1 for k, v in run.items()}] for leg, run in legs.items()}
    gains = {name: over_seeds([0.1, 0.2]) for name in ("equal steps", "equal FLOPs")}
    fig = draw.retrofit(losses, 60, gains)
    lengths = [len(line.get_xdata()) for line in fig.axes[0].lines]
    assert lengths == [2, 3, 2, 2]
    assert [text.get_text() for text in fig.axes[0].get_legend().texts] == ["dense", "L3 added"]
    plt.close(fig)
