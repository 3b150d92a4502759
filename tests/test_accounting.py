"""The accounting against counting: real tensors, and PyTorch's own counter of operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from l3paper import GPT, GPTConfig, allocation_to_bounds
from l3paper.accounting import account, weighted_mean_rows
from l3paper.lookup import loop

BASE = GPTConfig(sequence_len=16, vocab_size=30, n_layer=3, n_head=4, n_kv_head=4, n_embd=32)
CONFIGS = {
    "dense": BASE,
    "grouped-query": replace(BASE, n_kv_head=2),
    "l3": replace(BASE, l3_after_layers="1", l3_n_emb=90, l3_d_up=20),
    "l3 automatic d_up, twice": replace(BASE, l3_after_layers="0,2", l3_n_emb=75),
    "l3 untied": replace(BASE, l3_after_layers="1", l3_n_emb=90, l3_tie_kv=False, l3_d_emb=12),
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
    assert costs.active_parameters == pytest.approx(costs.total_parameters - idle)
    touched = sum(p.numel() for p in model.parameters()) - idle
    assert costs.active_parameters == pytest.approx(touched)


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
