"""GPT with and without L3 layers."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from l3paper import GPT, GPTConfig, allocation_to_bounds, compute_lzw_allocation
from l3paper.lookup.reference import loop

DENSE = GPTConfig(sequence_len=12, vocab_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
WITH_L3 = replace(DENSE, l3_after_layers="0,2", l3_n_emb=100, l3_d_up=16, l3_k_max=6)
MOE = replace(DENSE, n_experts=6, experts_per_token=2, expert_width=20)


def make_model(config, seed=0):
    torch.manual_seed(seed)
    model = GPT(config)
    if config.l3_blocks:
        documents = [torch.randint(0, 40, (200,)) for _ in range(4)]
        alloc = compute_lzw_allocation(documents, 40, config.l3_n_emb, config.l3_k_max)
        model.set_l3_bounds(allocation_to_bounds(alloc))
    return model


def make_batch(seed=1):
    torch.manual_seed(seed)
    return torch.randint(0, 40, (2, 12)), torch.randint(0, 40, (2, 12))


def stir(model):
    """Replace every zero start, so that all parts of the model matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("same", [True, False])
def test_layers_with_the_same_bounds_share_one_plan(same):
    model = stir(make_model(WITH_L3))
    if not same:
        model.l3_layers["2"].set_bounds(allocation_to_bounds([61] + [1] * 39))
    model.load_state_dict(deepcopy(model.state_dict()))
    idx, _ = make_batch()
    plans = model.plans(idx)
    assert (plans["0"] is plans["2"]) == same
    logits = model(idx)
    for each in model.l3_layers.values():
        each.lookup = loop
    torch.testing.assert_close(logits, model(idx))


def test_bounds_that_change_in_place_end_the_sharing():
    model = stir(make_model(WITH_L3))
    idx, _ = make_batch()
    model(idx)
    model.l3_layers["2"].bounds.copy_(allocation_to_bounds([61] + [1] * 39))
    logits = model(idx)
    for each in model.l3_layers.values():
        each.lookup = loop
    torch.testing.assert_close(logits, model(idx))


@pytest.mark.parametrize("config", [WITH_L3, MOE], ids=["l3", "moe"])
def test_compiles_once_for_batches_of_all_kinds(config):
    model = stir(make_model(config))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for seed in range(5):
        batch = make_batch(seed)
        torch.testing.assert_close(compiled(*batch), model(*batch))
        if seed == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.parametrize("config", [replace(WITH_L3, n_layer=12), replace(MOE, n_layer=12)])
def test_parts_compile_once_for_all_blocks(config):
    model = stir(make_model(config))
    expected = [model(*make_batch(seed)) for seed in range(3)]
    counter = CompileCounter()
    model.compile_parts(counter)
    for seed in range(3):
        loss = model(*make_batch(seed))
        torch.testing.assert_close(loss, expected[seed])
        loss.backward()
        if seed == 0:
            frames = counter.frame_count
    assert 0 < counter.frame_count == frames < 12


def test_a_model_of_the_same_shape_takes_over_what_is_compiled():
    counter, frames = CompileCounter(), []
    for seed in range(3):
        model = stir(make_model(WITH_L3))
        model.compile_parts(counter)
        model(*make_batch(seed)).backward()
        frames.append(counter.frame_count)
    assert 0 < frames[0] == frames[1] == frames[2]


def test_compiled_parts_leave_generation_and_state_dict_alone():
    model = stir(make_model(WITH_L3))
    names, (idx, _) = list(model.state_dict()), make_batch()
    with torch.no_grad():
        expected = model.logits(model.hidden_states(idx, model.new_cache(2)))
        counter = CompileCounter()
        model.compile_parts(counter)
        cache = model.new_cache(2)
        found = model.logits(model.hidden_states(idx, cache))
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == 0
    assert list(model.state_dict()) == names


CONFIGS = pytest.mark.parametrize("config", [DENSE, WITH_L3, MOE], ids=["dense", "l3", "moe"])


@CONFIGS
def test_loss_is_the_cross_entropy_of_the_logits(config):
    model = stir(make_model(config))
    idx, targets = make_batch()
    targets[0, :5] = -1
    logits = model(idx)
    assert logits.shape == (2, 12, 40)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(idx, targets), expected)


@CONFIGS
def test_logits_depend_on_the_past_alone(config):
    model = stir(make_model(config))
    idx, _ = make_batch()
    other = idx.clone()
    other[:, 7] = (other[:, 7] + 1) % 40
    same = torch.isclose(model(idx), model(other), atol=1e-6).all(dim=-1).all(dim=0)
    assert same[:7].all()
    assert not same[7]


def test_rotary_positions_are_relative():
    # Attention alone sees positions. With all tokens equal, nothing can depend on them.
    model = stir(make_model(DENSE))
    logits = model(torch.full((1, 12), 3))
    torch.testing.assert_close(logits[0, 0], logits[0, -1], rtol=1e-4, atol=1e-4)


def test_losses_come_apart():
    model, batch = stir(make_model(MOE)), make_batch()
    loss = model(*batch)
    expected = sum(block.mlp.auxiliary for block in model.blocks)
    torch.testing.assert_close(model.auxiliary_loss(), expected)
    logits = model(batch[0])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()))


@pytest.mark.parametrize("config", [DENSE, WITH_L3], ids=["dense", "l3"])
def test_without_experts_the_auxiliary_loss_is_zero(config):
    assert torch.equal(make_model(config).auxiliary_loss(), torch.tensor(0.0))


def test_auxiliary_loss_needs_a_forward_pass():
    with pytest.raises(ValueError, match="no auxiliary loss yet: call forward"):
        make_model(MOE).auxiliary_loss()


def test_experts_work_behind_l3_layers_too():
    model = stir(make_model(replace(WITH_L3, n_experts=4)))
    (model(*make_batch()) + model.auxiliary_loss()).backward()
    assert all(block.mlp.router.weight.grad.any() for block in model.blocks)
    assert all(layer.kv_weight.grad.any() for layer in model.l3_layers.values())


def test_a_mixture_of_one_expert_is_an_mlp():
    # With one expert the router's weight is 1, whatever it says.
    dense = stir(make_model(DENSE))
    single = GPT(replace(DENSE, n_experts=1, experts_per_token=1))
    state = single.state_dict()
    for name, parameter in dense.state_dict().items():
        renamed = name.replace("mlp.c_fc.weight", "mlp.c_fc.0").replace(
            "mlp.c_proj.weight", "mlp.c_proj.0"
        )
        state[renamed] = parameter
    single.load_state_dict(state)
    idx, _ = make_batch()
    torch.testing.assert_close(single(idx), dense(idx))


def test_l3_starts_as_a_no_op():
    dense, with_l3 = make_model(DENSE), make_model(WITH_L3)
    shared = with_l3.state_dict()
    for name, parameter in stir(dense).state_dict().items():
        shared[name] = parameter
    with_l3.load_state_dict(shared)
    idx, _ = make_batch()
    assert torch.equal(dense(idx), with_l3(idx))


def test_without_l3_there_is_no_trace_of_it():
    model = make_model(DENSE)
    assert len(model.l3_layers) == 0
    assert not any("l3" in name for name in model.state_dict())


def test_l3_layers_are_keyed_by_the_block_before_them():
    assert list(make_model(WITH_L3).l3_layers) == ["0", "2"]


@CONFIGS
def test_optimizer_holds_every_parameter_once(config):
    model = make_model(config)
    held = [p for group in model.setup_optimizer().param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_routers_have_a_group_of_their_own():
    model = make_model(MOE)
    groups = {group["name"]: group for group in model.setup_optimizer().param_groups}
    assert [*groups] == ["matrix", "embedding", "head", "router"]
    assert [p.shape for p in groups["router"]["params"]] == [(6, 32)] * 3
    assert groups["router"]["lr"] == pytest.approx(2.5 * groups["head"]["lr"])
    experts = {id(p) for block in model.blocks for p in [*block.mlp.c_fc, *block.mlp.c_proj]}
    assert experts < {id(p) for p in groups["matrix"]["params"]}


@CONFIGS
def test_all_parameters_learn_after_the_first_step(config):
    model = make_model(config)
    optimizer = model.setup_optimizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        (model(*make_batch(step)) + model.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


@CONFIGS
def test_state_dict_round_trip(config, tmp_path):
    model = stir(make_model(config))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = GPT(config)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    idx, _ = make_batch()
    assert torch.equal(model(idx), other(idx))


@CONFIGS
def test_init_weights_starts_over(config):
    model = make_model(config)
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    stir(model)
    torch.manual_seed(0)
    model.init_weights()
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())


def test_a_seed_gives_the_same_blocks_with_and_without_l3():
    with_l3 = dict(make_model(WITH_L3).named_parameters())
    assert all(torch.equal(p, with_l3[name]) for name, p in make_model(DENSE).named_parameters())


@pytest.mark.parametrize("change", [dict(n_experts=6), dict(mlp_width=50)], ids=["moe", "wider"])
def test_a_seed_gives_the_same_model_around_other_mlps(change):
    other = dict(make_model(replace(WITH_L3, **change)).named_parameters())
    same = [(n, p) for n, p in make_model(WITH_L3).named_parameters() if ".mlp." not in n]
    assert all(torch.equal(p, other[name]) for name, p in same)
    numbers = torch.cat([p.flatten() for name, p in other.items() if "c_proj" not in name])
    assert len(numbers.unique()) > 0.99 * len(numbers[numbers != 0])  # nothing is drawn twice


def test_mlp_width_is_the_hidden_width():
    model = stir(make_model(replace(DENSE, mlp_width=50)))
    assert {tuple(block.mlp.c_fc.weight.shape) for block in model.blocks} == {(50, 32)}
    assert model(*make_batch()).isfinite()


def test_experts_are_by_default_as_wide_as_keeps_the_cost():
    model = make_model(replace(DENSE, n_experts=8, experts_per_token=4))
    assert {tuple(fc.shape) for block in model.blocks for fc in block.mlp.c_fc} == {(32, 32)}


def test_model_built_without_storage_becomes_real():
    with torch.device("meta"):
        model = GPT(DENSE)
    model.to_empty(device="cpu")
    model.init_weights()
    assert model(*make_batch()).isfinite()


def test_grouped_query_attention_is_attention_with_repeated_heads():
    grouped = stir(make_model(DENSE))
    full = GPT(replace(DENSE, n_kv_head=4))
    state = grouped.state_dict()
    for name, matrix in state.items():
        if name.endswith(("c_k.weight", "c_v.weight")):  # two heads of 8, each serving two queries
            state[name] = matrix.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    idx, _ = make_batch()
    torch.testing.assert_close(full(idx), grouped(idx))


def test_logits_are_capped():
    model = make_model(DENSE)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=100)
    assert model(make_batch()[0]).abs().max() <= 15


@CONFIGS
def test_bfloat16_is_close_and_trains(config):
    model = make_model(config)
    optimizer = model.setup_optimizer()
    for step in range(2):  # past the zero starts
        model(*make_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch)
    torch.testing.assert_close(loss, model(*batch), rtol=0.02, atol=0.02)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_layer=0), "n_layer is 0"),
        (dict(n_head=3), "must give an even head width"),
        (dict(n_embd=36), "must give an even head width"),
        (dict(n_kv_head=3), "n_kv_head is 3; it must divide n_head = 4"),
        (dict(l3_after_layers="3"), "different blocks out of 0 .. 2"),
        (dict(l3_after_layers="-1"), "different blocks out of 0 .. 2"),
        (dict(l3_after_layers="1,1"), "different blocks out of 0 .. 2"),
        (dict(l3_after_layers="one"), "'one'; give block numbers"),
        (dict(l3_n_emb=39), "l3_n_emb is 39; every token needs a row: at least 40"),
        (dict(l3_k_max=0), "l3_k_max is 0"),
        (dict(l3_d_up=-1), "l3_d_up is -1"),
        (dict(l3_d_emb=16), "l3_d_emb is 16, but tied"),
        (dict(n_embd=32.0), "n_embd is 32.0; it must be of type int"),
        (dict(l3_after_layers=2), "l3_after_layers is 2; it must be of type str"),
        (dict(l3_tie_kv=1), "l3_tie_kv is 1; it must be of type bool"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WITH_L3, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_experts=-1), "n_experts is -1; it must be at least 0"),
        (dict(expert_width=-1), "expert_width is -1; it must be at least 0"),
        (dict(n_experts=0, mlp_width=-1), "mlp_width is -1; it must be at least 0"),
        (dict(mlp_width=9), "mlp_width is 9, but with n_experts = 6 no block has an MLP"),
        (dict(experts_per_token=0), "experts_per_token is 0; it must be 1 .. n_experts = 6"),
        (dict(experts_per_token=7), "experts_per_token is 7; it must be 1 .. n_experts = 6"),
        (dict(experts_per_token=3, expert_width=0), "3 does not divide 4 \\* n_embd = 128"),
    ],
)
def test_bad_experts(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MOE, **changes)


@pytest.mark.parametrize("shape", [(12,), (1, 13), (1, 2, 3)])
def test_bad_ids(shape):
    with pytest.raises(ValueError, match="must be \\(batch, time\\), time at most sequence_len = 12"):
        make_model(DENSE)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("token_id", [-1, 40])
def test_ids_outside_the_vocabulary(token_id):
    with pytest.raises(ValueError, match=r"they must be in 0 \.\. 39"):
        make_model(DENSE)(torch.tensor([[3, token_id]]))


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (16,)])
def test_targets_of_another_shape(shape):
    model, idx = make_model(DENSE), torch.zeros(2, 8, dtype=torch.long)
    for use in (model, model.token_losses):
        with pytest.raises(ValueError, match=r"targets have shape .* that of idx: \(2, 8\)"):
            use(idx, torch.zeros(shape, dtype=torch.long))


def test_bounds_of_another_vocabulary():
    with pytest.raises(ValueError, match="bounds have 3 entries; they must be vocab_size \\+ 1 = 41"):
        make_model(WITH_L3).set_l3_bounds(torch.tensor([0, 50, 100]))
