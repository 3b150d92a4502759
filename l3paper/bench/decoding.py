"""How fast a model decodes when its L3 tables are on its device, in CPU memory, or in their file.

The text is given, so that all read the same rows: held-out documents, one sequence a batch row, one
token a step, each step with logits and the likeliest token as in generation.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l3paper.bench.timing import interleaved_medians
from l3paper.checkpoints.model import TABLES, load_model, save_model
from l3paper.costs.accounting import predicted_bytes
from l3paper.data.streams import TokenizedCorpus, load_corpus
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.training.build import build_model
from l3paper.training.config import PRESETS

BATCHES = (1, 8, 64, 300)


def bench_decode(
    preset: str, repeats: int, device: torch.device, sweep: bool, steps: int = 32
) -> list[dict]:
    """Tokens a second of a preset's model, dense and with its tables in each place, by batch size.

    With `sweep`, instead, the L3 layer behind every block in turn, at batch 1: where it comes too
    early, the copy of its rows shows. Bytes are those of the rows that were read, a token.
    """
    base = PRESETS[preset]
    corpus = load_corpus(vocab_size=base.vocab_size)
    model = build_model(replace(base, l3_after_layers=""), corpus)[0].to(device)
    results = []
    places = [str(i) for i in range(base.depth)] if sweep else [base.model_config().l3_after_layers]
    with tempfile.TemporaryDirectory() as folder:
        for place in places:
            served = {"dense": model}
            config = replace(base, l3_after_layers=place)
            save_model(Path(folder) / place, build_model(config, corpus)[0], corpus.tokenizer)
            for tables in TABLES:
                served[f"L3 {tables}"] = load_model(Path(folder) / place, device, tables)[0]
            for batch in BATCHES[:1] if sweep else BATCHES:
                ids = _text(corpus, batch, steps)
                results += [
                    {"after_block": place, "batch": batch} | row
                    for row in _compare(served, ids, repeats)
                ]
    return results


def _text(corpus: TokenizedCorpus, batch: int, steps: int) -> Tensor:
    """Held-out ids (steps, batch, 1), every sequence from another place."""
    starts = np.linspace(0, len(corpus.validation) - steps, batch, dtype=np.int64)
    windows = corpus.validation[starts[:, None] + np.arange(steps)].astype(np.int64)
    return torch.from_numpy(windows).T[..., None]


def decode(model: GPT, ids: Tensor) -> None:
    """Take ids (steps, batch, 1) as if each step had drawn them."""
    cache = model.new_cache(ids.shape[1])
    with torch.inference_mode(), precision(model):
        for step in ids.to(model.device):
            hidden = model.hidden_states(step, cache)
            cache.advance([1] * len(cache.lengths))
            model.logits(hidden[:, -1]).argmax(dim=-1).tolist()


def _compare(served: dict[str, GPT], ids: Tensor, repeats: int) -> list[dict]:
    jobs: dict[str, Callable[[], None]] = {
        name: (lambda model=model: decode(model, ids)) for name, model in served.items()
    }
    medians = interleaved_medians(jobs, repeats)
    resident = medians["L3 resident"]
    return [
        {
            "model": name,
            "tokens_per_second": ids.numel() / seconds,
            "of_resident": resident / seconds,
            "read_bytes": _read(served[name], ids),
            "predicted_bytes": predicted_bytes(served[name], ids) / ids.numel(),
        }
        for name, seconds in medians.items()
    ]


def _read(model: GPT, ids: Tensor) -> float | None:
    """Bytes a token that the stores of a model hand out; None where it has none."""
    stores = [layer.store for layer in model.l3_layers.values() if layer.store]
    if not stores:
        return None
    before = [store.rows_read for store in stores]
    decode(model, ids)
    rows = [store.rows_read - held for store, held in zip(stores, before, strict=True)]
    return sum(n * store.row_bytes for n, store in zip(rows, stores, strict=True)) / ids.numel()
