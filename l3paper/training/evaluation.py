"""What a model makes of text it has not seen: loss, bits a byte, and perplexity by the word."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch

from l3paper.data.batches import validation_batches
from l3paper.data.readers import read_text
from l3paper.data.streams import TokenizedCorpus
from l3paper.data.tokenizer import encode_documents
from l3paper.gpt import GPT
from l3paper.parts.device import precision


@torch.no_grad()
def evaluate(
    model: GPT,
    stream: np.ndarray,
    token_bytes: np.ndarray,
    batch_size: int,
    max_tokens: int | None = None,
) -> tuple[float, float]:
    """Return (nats per token, bits per byte) on a stream of ids, or on an even sample of it.

    `stream` has shape (tokens,), `token_bytes` (vocab_size,): the bytes of text behind every token.
    The stream is cut into sequences of the model's length, and each starts with no context.
    """
    length = model.config.sequence_len
    batches = list(validation_batches(stream, batch_size, length))
    if max_tokens is not None:
        wanted = max(1, max_tokens // (batch_size * length))
        taken = min(wanted, len(batches))
        batches = [batches[i * len(batches) // taken] for i in range(taken)]
    size = torch.from_numpy(token_bytes)
    nats = tokens = text_bytes = 0.0
    for inputs, targets in batches:
        with precision(model):
            loss = model(inputs.to(model.device), targets.to(model.device)).item()
        real = targets[targets >= 0]
        nats += loss * len(real)
        tokens += len(real)
        text_bytes += size[real].sum().item()
    return nats / tokens, nats / math.log(2) / max(1.0, text_bytes)


def read_words(path: Path) -> str:
    """A text for `word_perplexity`; ValueError where it holds no words or is not UTF-8."""
    text = read_text(path)
    if not text.split():
        raise ValueError(f"words file {path.name!r} holds no words")
    return text


def word_perplexity(model: GPT, corpus: TokenizedCorpus, text: str, batch_size: int) -> dict:
    """Perplexity by the word of `text`, whose words are divided by spaces, as WikiText-2 reports it.

    Words are counted as Merity et al. (2016, https://arxiv.org/abs/1609.07843) do: every string
    between spaces, and the end of each line. The model predicts its own tokens, spaces and line ends
    included; exp(all nats / words) is comparable between tokenizers, unlike the perplexity of a token.
    """
    words = sum(len(line.split()) + 1 for line in text.splitlines())
    stream = encode_documents(corpus.tokenizer, [text])
    nats, bits = evaluate(model, stream, corpus.token_bytes, batch_size)
    nats_a_word = nats * (len(stream) - 1) / words
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "words": words,
        "tokens": len(stream) - 1,
        "loss": nats,
        "bits_per_byte": bits,
        "perplexity": math.exp(nats_a_word) if nats_a_word < 700 else math.inf,
    }
