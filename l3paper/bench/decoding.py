"""How fast a model decodes when its L3 tables are on its device, in CPU memory, or in their file.

All models read the same held-out text, so that all read the same rows: one sequence per batch row, one
token per step, each step with logits and the likeliest token as in generation.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l3paper.bench.timing import interleaved_medians
from l3paper.checkpoints.model import TABLES, load_model, save_model
from l3paper.costs.accounting import predicted_bytes
from l3paper.data.streams import load_corpus
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.training.build import build_model
from l3paper.training.config import PRESETS

BATCHES = (1, 8, 64, 300)


def bench_decode(
    preset: str, repeats: int, device: torch.device, sweep: bool, steps: int = 32
) -> list[dict]:
    """Time decoding by a preset's model, dense and with its tables in each place, by batch size.

    With `sweep`, the L3 layer is behind every block in turn instead, at batch 1: behind an early block,
    the copy of its rows shows. Bytes are those of the rows that were read, per token.
    """
    base = PRESETS[preset]
    corpus = load_corpus(vocab_size=base.vocab_size)
    dense = build_model(replace(base, l3_after_layers=""), corpus).model.to(device)
    places = [str(i) for i in range(base.depth)] if sweep else [base.model_config().l3_after_layers]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for place in places:
            saved = Path(folder) / place
            model = build_model(replace(base, l3_after_layers=place), corpus).model
            save_model(saved, model, corpus.tokenizer)
            models = {f"L3 {tables}": load_model(saved, device, tables)[0] for tables in TABLES}
            for batch in BATCHES[:1] if sweep else BATCHES:
                ids = _held_out(corpus.validation, batch, steps)
                rows = _compare({"dense": dense} | models, ids, repeats)
                results += [{"after_block": place, "batch": batch} | row for row in rows]
    return results


def _held_out(stream: np.ndarray, batch: int, steps: int) -> Tensor:
    """Ids (steps, batch, 1), every sequence from another place of the stream."""
    starts = np.linspace(0, len(stream) - steps, batch, dtype=np.int64)
    windows = stream[starts[:, None] + np.arange(steps)].astype(np.int64)
    return torch.from_numpy(windows).T[..., None]


def decode(model: GPT, ids: Tensor) -> None:
    """Take ids (steps, batch, 1) as if each step had drawn them."""
    cache = model.new_cache(ids.shape[1])
    with torch.inference_mode(), precision(model):
        for step in ids.to(model.device):
            hidden = model.hidden_states(step, cache)
            cache.advance([1] * len(cache.lengths))
            model.logits(hidden[:, -1]).argmax(dim=-1).tolist()


def _compare(models: dict[str, GPT], ids: Tensor, repeats: int) -> list[dict]:
    jobs = {name: partial(decode, model, ids) for name, model in models.items()}
    medians = interleaved_medians(jobs, repeats)
    return [
        {
            "model": name,
            "tokens_per_second": ids.numel() / medians[name],
            "of_resident": medians["L3 resident"] / medians[name],
            "read_bytes": _read_bytes(model, ids),
            "predicted_bytes": predicted_bytes(model, ids) / ids.numel(),
        }
        for name, model in models.items()
    ]


def _read_bytes(model: GPT, ids: Tensor) -> float | None:
    """Bytes per token that the model's stores hand out; None if it has no store."""
    stores = [layer.store for layer in model.l3_layers.values() if layer.store]
    for store in stores:
        store.rows_read = 0
    decode(model, ids)
    read = sum(store.rows_read * store.row_bytes for store in stores)
    return read / ids.numel() if stores else None
