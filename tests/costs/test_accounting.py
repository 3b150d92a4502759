"""The accounting against counting: real tensors, and PyTorch's own counter of operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from l3paper import GPT, GPTConfig, allocation_to_bounds
from l3paper.costs.accounting import account, weighted_mean_rows
from l3paper.costs.equal import (
    STAND_INS,
    match_deeper,
    match_engram,
    match_mlp,
    match_moe,
    match_per_layer_embedding,
    match_wider,
    more_steps,
)
from l3paper.lookup.reference import loop
from l3paper.parts.rivals import RIVALS, TABLES
from l3paper.parts.variants import VARIANTS

BASE = GPTConfig(sequence_len=16, vocab_size=30, n_layer=3, n_head=4, n_kv_head=4, n_embd=32)
CONFIGS = {
    "dense": BASE,
    "grouped-query": replace(BASE, n_kv_head=2),
    "l3": replace(BASE, l3_after_layers="1", l3_n_emb=90, l3_d_up=20),
    "l3 automatic d_up, twice": replace(BASE, l3_after_layers="0,2", l3_n_emb=75),
    "l3 untied": replace(BASE, l3_after_layers="1", l3_n_emb=90, l3_tie_kv=False, l3_d_emb=12),
    **{
        f"l3 {variant}": replace(BASE, l3_after_layers="1", l3_n_emb=90, l3_d_up=20, l3_variant=variant)
        for variant in VARIANTS
        if variant
    },
    "wider": replace(BASE, mlp_width=77),
    "experts": replace(BASE, n_experts=7, experts_per_token=3, expert_width=10),
    "one expert a token": replace(BASE, n_experts=5, experts_per_token=1),
    "experts and l3": replace(BASE, n_experts=4, l3_after_layers="1", l3_n_emb=90),
    **{
        f"rival {name}": replace(
            BASE,
            rival=name,
            rival_after_layers="0,2",
            rival_rows=120,
            rival_d_emb=0 if name == "mlp" else 6,
            rival_d_up=11,
        )
        for name in RIVALS
    },
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config, seed=0):
    """A model, one batch of ids, and the mean rows of exactly those ids."""
    torch.manual_seed(seed)
    model = GPT(config)
    ids = torch.randint(0, 30, (2, 16))
    if not config.l3_blocks:
        return model, ids, 0.0
    alloc = np.full(30, 1)
    alloc[: config.l3_n_emb % 7] += 1
    alloc[3] += config.l3_n_emb - alloc.sum()
    model.set_l3_bounds(allocation_to_bounds(alloc))
    for layer in model.l3_layers.values():
        layer.lookup = loop  # the one that computes nothing in vain
    counts = np.bincount(ids.flatten(), minlength=30)
    return model, ids, weighted_mean_rows(alloc, counts)


@EVERY
def test_parameters_equal_those_of_the_model(config):
    model, _, mean_rows = make(config)
    costs = account(config, mean_rows)
    assert costs.total_parameters == sum(p.numel() for p in model.parameters())
    tables = [
        p for n, p in model.named_parameters() if n.endswith(("kv_weight", "k_weight", "v_weight"))
    ]
    rival_tables = [p for n, p in model.named_parameters() if n.endswith("table")]
    assert costs.parameters.get("rival tables", 0) == sum(p.numel() for p in rival_tables)
    assert costs.parameters["l3 tables"] == sum(p.numel() for p in tables)
    assert costs.table_bytes() == sum(p.nbytes for p in tables)


@EVERY
def test_flops_equal_those_counted(config):
    model, ids, mean_rows = make(config)
    costs = account(config, mean_rows)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(ids)
    assert forward.get_total_flops() == pytest.approx(ids.numel() * costs.flops_forward, rel=1e-12)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(ids).sum().backward()
    assert both.get_total_flops() == pytest.approx(ids.numel() * costs.flops_training, rel=1e-12)
    assert logits.isfinite().all()


@EVERY
def test_active_parameters_are_those_with_gradients(config):
    model, ids, mean_rows = make(config)
    costs = account(config, mean_rows)
    idle = 0
    for layer in model.l3_layers.values():
        rows = layer.bounds.diff()[ids].double().mean().item()
        for table in dict.fromkeys(layer.tables()):
            idle += table.numel() - rows * table.shape[1]
    for layer in model.rivals.values():
        rows = TABLES if config.rival == "engram" else 1
        idle += sum(table.numel() - rows * table.shape[1] for table in layer.tables())
    for block in model.blocks:
        for matrices in (block.mlp.c_fc, block.mlp.c_proj) if config.n_experts else ():
            idle += sum(m.numel() for m in list(matrices)[config.experts_per_token :])
    assert costs.active_parameters == pytest.approx(costs.total_parameters - idle)
    touched = sum(p.numel() for p in model.parameters()) - idle
    assert costs.active_parameters == pytest.approx(touched)


def test_parameters_of_experts_by_part():
    parts = account(CONFIGS["experts"]).parameters
    assert parts["router"] == 3 * 7 * 32
    assert parts["experts"] == 3 * 7 * 2 * 10 * 32
    assert "mlp" not in parts


def test_experts_of_the_default_width_cost_the_dense_mlp_and_the_router():
    dense, moe = account(BASE), account(replace(BASE, n_experts=8))
    assert moe.flops["experts"] == dense.flops["mlp"]
    assert moe.flops_forward - dense.flops_forward == moe.flops["router"]


def test_touched_bytes_of_one_token():
    config = CONFIGS["l3 untied"]
    assert account(config, mean_rows=5).touched_bytes() == 5 * (32 + 12) * 4
    assert account(config, mean_rows=5).touched_bytes(bytes_per_number=2) == 5 * (32 + 12) * 2


def test_shorter_sequences_cost_less_attention():
    long, short = account(BASE), account(BASE, sequence_len=8)
    assert long.flops["attention scores"] == 2 * short.flops["attention scores"]
    assert long.flops["mlp"] == short.flops["mlp"]


def test_mean_rows_are_weighted_by_frequency():
    assert weighted_mean_rows([9, 1], np.array([3, 1])) == 7.0


def test_l3_needs_mean_rows():
    with pytest.raises(ValueError, match=r"mean_rows is 0\.0; with L3 layers"):
        account(CONFIGS["l3"])


def test_summary_is_plain_numbers():
    summary = account(CONFIGS["l3"], 3.5).summary()
    assert summary["total_parameters"] == account(CONFIGS["l3"], 3.5).total_parameters
    assert all(isinstance(value, int | float) for value in summary.values())


SMALL = GPTConfig(
    sequence_len=128,
    vocab_size=1024,
    n_layer=4,
    n_head=2,
    n_kv_head=2,
    n_embd=64,
    l3_after_layers="2",
    l3_n_emb=4096,
)
LARGE = GPTConfig(vocab_size=32768, l3_after_layers="5", l3_n_emb=2**19)
SIZES = {  # name: (model, mean rows)
    "few rows": (SMALL, 12.0),
    "many rows": (replace(SMALL, l3_n_emb=16384), 40.0),
    "two layers": (replace(SMALL, l3_n_emb=16384, l3_after_layers="1,3"), 40.0),
    "untied": (replace(SMALL, l3_n_emb=8192, l3_tie_kv=False, l3_d_emb=96), 20.0),
    "large": (LARGE, 200.0),
}
TO_MATCH = pytest.mark.parametrize(("l3", "mean_rows"), SIZES.values(), ids=SIZES)


@TO_MATCH
def test_wider_model_has_the_flops_of_l3(l3, mean_rows):
    wider = match_wider(l3, mean_rows)
    assert wider == replace(l3, l3_after_layers="", l3_n_emb=0, mlp_width=wider.mlp_width)
    assert wider.mlp_width > 4 * l3.n_embd
    wanted = account(l3, mean_rows).flops_forward
    assert account(wider).flops_forward == pytest.approx(wanted, rel=1e-3)


@TO_MATCH
def test_deeper_model_has_the_fewest_blocks_that_reach_the_flops_of_l3(l3, mean_rows):
    deeper = match_deeper(l3, mean_rows)
    sizes = dict(n_layer=deeper.n_layer, mlp_width=deeper.mlp_width)
    assert deeper == replace(l3, l3_after_layers="", l3_n_emb=0, **sizes)
    assert deeper.n_layer > l3.n_layer
    wanted = account(l3, mean_rows).flops_forward
    assert account(deeper).flops_forward == pytest.approx(wanted, rel=2e-3)
    assert deeper.mlp_width <= 4 * l3.n_embd
    shallower = replace(deeper, n_layer=deeper.n_layer - 1, mlp_width=0)
    assert account(shallower).flops_forward < wanted


def test_no_deeper_model_is_made_up_where_a_block_costs_too_much():
    l3 = GPTConfig(1024, 100, 1, 2, 2, 64, l3_after_layers="0", l3_n_emb=400)
    with pytest.raises(ValueError, match="no model of 2 blocks costs as little"):
        match_deeper(l3, mean_rows=4)


@TO_MATCH
def test_longer_training_of_the_dense_model_costs_what_l3_costs(l3, mean_rows):
    steps = more_steps(l3, mean_rows, 1000)
    dense = account(STAND_INS["longer"](l3, mean_rows))
    assert steps > 1000
    assert steps * dense.flops_forward == pytest.approx(
        1000 * account(l3, mean_rows).flops_forward, rel=1e-3
    )


@TO_MATCH
@pytest.mark.parametrize("match", [match_engram, match_per_layer_embedding])
def test_rivals_with_tables_have_the_flops_and_the_parameters_of_l3(match, l3, mean_rows):
    rival, wanted = match(l3, mean_rows), account(l3, mean_rows)
    assert rival.rival_after_layers == l3.l3_after_layers
    assert account(rival).flops_forward == pytest.approx(wanted.flops_forward, rel=0.01)
    assert account(rival).total_parameters == pytest.approx(wanted.total_parameters, rel=0.01)


@TO_MATCH
def test_an_mlp_in_place_has_the_flops_of_l3(l3, mean_rows):
    wanted = account(l3, mean_rows).flops_forward
    assert account(match_mlp(l3, mean_rows)).flops_forward == pytest.approx(wanted, rel=1e-3)


def test_no_rival_is_small_enough():
    with pytest.raises(ValueError, match="no per-layer-embedding layer costs as little"):
        match_per_layer_embedding(replace(SMALL, l3_n_emb=16384, l3_d_up=1), 1.0)


@TO_MATCH
def test_mixture_has_the_flops_and_the_parameters_of_l3(l3, mean_rows):
    moe = match_moe(l3, mean_rows)
    sizes = {name: getattr(moe, name) for name in ("n_experts", "experts_per_token", "expert_width")}
    assert moe == replace(l3, l3_after_layers="", l3_n_emb=0, **sizes)
    assert moe.experts_per_token == 2
    costs, wanted = account(moe), account(l3, mean_rows)
    assert costs.flops_forward == pytest.approx(wanted.flops_forward, rel=0.01)
    assert costs.total_parameters == pytest.approx(wanted.total_parameters, rel=0.02)
    assert costs.flops["router"] < costs.flops["experts"]


@TO_MATCH
@pytest.mark.parametrize("experts_per_token", [1, 4])
def test_mixture_comes_within_its_tolerance(l3, mean_rows, experts_per_token):
    moe = match_moe(l3, mean_rows, experts_per_token, tolerance=0.08)
    assert moe.experts_per_token == experts_per_token
    costs, wanted = account(moe), account(l3, mean_rows)
    assert costs.flops_forward == pytest.approx(wanted.flops_forward, rel=0.04)
    assert costs.total_parameters == pytest.approx(wanted.total_parameters, rel=0.08)


def test_matching_keeps_what_it_does_not_size():
    l3 = replace(SMALL, mlp_width=200, n_kv_head=1)
    assert match_deeper(l3, 10.0).mlp_width <= 200
    assert 200 < match_wider(l3, 10.0).mlp_width < match_wider(replace(l3, mlp_width=0), 10.0).mlp_width
    assert match_moe(l3, 10.0).mlp_width == 0
    assert match_moe(l3, 10.0).n_kv_head == 1


@pytest.mark.parametrize("match", STAND_INS.values(), ids=STAND_INS)
def test_nothing_to_match(match):
    with pytest.raises(ValueError, match="l3_after_layers is ''; a model without L3 layers"):
        match(replace(SMALL, l3_after_layers=""), 10.0)
    with pytest.raises(ValueError, match="n_experts is 8; give an L3 model with dense blocks"):
        match(replace(SMALL, n_experts=8), 10.0)
    with pytest.raises(ValueError, match=r"mean_rows is 0\.5"):
        more_steps(SMALL, 0.5, 10) if match is STAND_INS["longer"] else match(SMALL, 0.5)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, (0,), "experts_per_token is 0"),
        ({}, (10**6,), "no mixture with experts_per_token = 1000000"),
        (dict(l3_n_emb=2**22), (2,), "no mixture with experts_per_token = 2 costs"),
        ({}, (2, 1e-9), "within tolerance = 1e-09"),
    ],
)
def test_no_mixture_matches(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        match_moe(replace(SMALL, **changes), 10.0, *arguments)
