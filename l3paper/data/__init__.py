"""From text to batches: documents, a split, a tokenizer, streams of token ids, and batches."""

from l3paper.data.batches import training_batch, validation_batches
from l3paper.data.sources import open_source
from l3paper.data.streams import TokenizedCorpus, load_corpus

__all__ = ["TokenizedCorpus", "load_corpus", "open_source", "training_batch", "validation_batches"]
