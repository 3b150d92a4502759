"""The batches of a run, on their way to the device before their step."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from l3paper.data.batches import batch_starts, documents_at, training_batch
from l3paper.data.streams import TokenizedCorpus
from l3paper.training.config import TrainConfig
from l3paper.training.distributed import Group


class Batches:
    """The batches of a run. While one is used, the next is cut, and pinned for the copy."""

    def __init__(
        self, config: TrainConfig, corpus: TokenizedCorpus, group: Group, device: torch.device
    ):
        self.config, self.stream, self.group, self.device = config, corpus.train, group, device
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: dict[int, Future] = {}

    def take(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return this process's part of the step's batch, on the device, and start cutting the next.

        For each of `accumulate` passes, these are inputs and targets, both (b, T).
        """
        coming = self._ahead.pop(step, None)
        host = coming.result() if coming else self._cut(step)
        self._ahead = {step + 1: self._thread.submit(self._cut, step + 1)}
        # The copies are queued before the kernels that need them, so nothing waits.
        inputs, targets = (
            part.to(self.device, non_blocking=True).chunk(self.config.accumulate) for part in host
        )
        return list(zip(inputs, targets, strict=True))

    def documents(self, step: int) -> list[int]:
        """Return the training documents that the step's batch is from, in all processes together."""
        starts = batch_starts(self.stream, *self._which(step))
        return documents_at(self.stream, starts, self.config.sequence_len + 1)

    def _cut(self, step: int) -> list[Tensor]:
        batch = training_batch(self.stream, *self._which(step))
        parts = [self.group.part(part).contiguous() for part in batch]
        return [part.pin_memory() for part in parts] if self.device.type == "cuda" else parts

    def _which(self, step: int) -> tuple[int, int, int, int]:
        """Return the arguments of `training_batch` for this step, behind the stream."""
        config = self.config
        number = 0 if config.overfit_batch else step
        return config.batch_size, config.sequence_len, config.seed, number
