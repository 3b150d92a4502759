"""How well a model predicts text that it was not trained on: nats per token and bits per byte."""

import math
from typing import NamedTuple

import numpy as np
import torch

from l3paper.data.batches import validation_batches
from l3paper.data.tokenizer import END_OF_TEXT_ID
from l3paper.gpt import GPT
from l3paper.parts.device import precision


class Evaluation(NamedTuple):
    """The losses of the targets of a stream, one after the other, both (targets,)."""

    targets: np.ndarray
    losses: np.ndarray
    """In nats."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.losses.mean())

    def bits_per_byte(self, token_bytes: np.ndarray) -> float:
        """`token_bytes` (vocab_size,) says how many bytes of text each token stands for."""
        return float(self.losses.sum()) / math.log(2) / max(1, token_bytes[self.targets].sum())

    def by_document(self) -> tuple[np.ndarray, np.ndarray]:
        """(targets, nats) of each document of a whole stream, both (documents,).

        The token that ends a document is the first of the next one, and counts there.
        """
        starts = np.flatnonzero(self.targets == END_OF_TEXT_ID)
        starts = np.concatenate([[0], starts[starts > 0]])
        tokens = np.diff(starts, append=len(self.targets))
        return tokens, np.add.reduceat(self.losses, starts)


@torch.no_grad()
def evaluate(
    model: GPT, stream: np.ndarray, batch_size: int, max_tokens: int | None = None
) -> Evaluation:
    """Evaluate a stream of ids (tokens,), or an even sample of about `max_tokens` of it.

    The stream is cut into sequences of the model's length, and each starts with no context.
    """
    length = model.config.sequence_len
    batches = list(validation_batches(stream, batch_size, length))
    if max_tokens is not None:
        wanted = max(1, max_tokens // (batch_size * length))
        taken = min(wanted, len(batches))
        batches = [batches[i * len(batches) // taken] for i in range(taken)]
    targets, losses = [], []
    for idx, batch_targets in batches:
        with precision(model):
            batch_losses = model.token_losses(idx.to(model.device), batch_targets.to(model.device))
        counts = batch_targets >= 0
        targets.append(batch_targets[counts].numpy())
        losses.append(batch_losses.cpu()[counts].double().numpy())
    return Evaluation(np.concatenate(targets), np.concatenate(losses))
