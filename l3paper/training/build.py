"""A configuration's model, made for a text; what runs of one process can share, they do."""

from functools import lru_cache
from typing import NamedTuple

import torch

from l3paper.allocation import ALLOCATIONS, allocation_to_bounds
from l3paper.costs.accounting import Accounting, account, weighted_mean_rows
from l3paper.costs.equal import STAND_INS, more_steps
from l3paper.data.streams import TokenizedCorpus
from l3paper.gpt import GPT, GPTConfig
from l3paper.training.config import TrainConfig


class Built(NamedTuple):
    model: GPT
    costs: Accounting
    num_iterations: int
    """Steps of the run: those configured, unless a dense model trains for as long as L3 costs."""


def build_model(config: TrainConfig, corpus: TokenizedCorpus) -> Built:
    """Make a fresh model, its L3 layers allocated from the training text."""
    wanted, steps = config.model_config(), config.num_iterations
    if not wanted.l3_blocks:
        return Built(GPT(wanted), account(wanted), steps)
    alloc = rows_per_token(config.l3_allocation, wanted.l3_n_emb, wanted.l3_k_max, corpus)
    mean_rows = weighted_mean_rows(alloc, corpus.token_counts)
    if config.stand_in:
        model = GPT(STAND_INS[config.stand_in](wanted, mean_rows))
        if config.stand_in == "longer":
            steps = more_steps(wanted, mean_rows, steps)
        return Built(model, account(model.config), steps)
    model = GPT(wanted)
    model.set_l3_bounds(allocation_to_bounds(alloc))
    return Built(model, account(wanted, mean_rows), steps)


@lru_cache(maxsize=8)  # for the next runs of this process: the scan of a large text takes its time
def rows_per_token(rule: str, n_emb: int, k_max: int, corpus: TokenizedCorpus) -> list[int]:
    """The rows of every token, given by a rule of ALLOCATIONS from the training text."""
    return ALLOCATIONS[rule](corpus.documents(), corpus.vocab_size, n_emb, k_max)


def compile_model(model: GPT) -> None:
    """Compile its parts; a model of the shape of the one before takes over what is there."""
    _forget_other_shapes(model.config)
    model.compile_parts()


@lru_cache(maxsize=1)  # nothing to forget for the shape of the call before
def _forget_other_shapes(config: GPTConfig) -> None:
    torch.compiler.reset()  # what other shapes compiled would count towards the limit
