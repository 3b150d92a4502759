"""From text to batches: documents, a split, a tokenizer, streams of token ids, and batches."""

from l3paper.data.batches import training_batch, validation_batches
from l3paper.data.sources import Document, read_documents
from l3paper.data.split import split_documents
from l3paper.data.streams import TokenizedCorpus, load_corpus

__all__ = [
    "Document",
    "TokenizedCorpus",
    "load_corpus",
    "read_documents",
    "split_documents",
    "training_batch",
    "validation_batches",
]
