"""Text from a model, one token after the other: `python -m l3paper.generate --help`."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from l3paper.checkpoints.model import TABLES, load_model
from l3paper.costs.accounting import predicted_bytes
from l3paper.data.tokenizer import END_OF_TEXT_ID
from l3paper.gpt import GPT
from l3paper.lookup.offload import RowStore
from l3paper.parts.device import pick_device, precision

LEAST = 1e-6
"""Of a temperature above 0, and of a chance: what is smaller does not survive float32."""


def generate(model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, **how) -> list[list[int]]:
    """Every prompt with `new_tokens` more ids behind it; for the rest, see `stream`."""
    sequences = [list(prompt) for prompt in prompts]
    for following in stream(model, prompts, new_tokens, **how):
        for sequence, token in zip(sequences, following, strict=True):
            sequence.append(token)
    return sequences


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Yield the next id of every prompt, `new_tokens` times. Prompts may differ in length.

    A temperature of 0 takes the likeliest token; otherwise one is drawn, of the top_k likeliest, and
    of the fewest that have a chance of top_p together. Raises ValueError for a prompt that is empty
    or, with what is to come, longer than the model's sequence_len, for numbers out of range, and,
    on the way, for logits that are not finite.
    """
    _check(model, prompts, new_tokens, temperature, top_k, top_p, seed)
    generator = torch.Generator(model.device).manual_seed(seed)

    @torch.inference_mode()
    def steps() -> Iterator[list[int]]:
        device, cache = model.device, model.new_cache(len(prompts))
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # Filled up with the prompt's own last id, whose rows are on their way anyway.
        padded = [[*prompt, *prompt[-1:] * (longest - len(prompt))] for prompt in map(list, prompts)]
        idx = torch.tensor(padded, device=device)
        for _ in range(new_tokens):
            hidden = model.hidden_states(idx, cache)  # (B, T, C)
            last = torch.tensor(lengths, device=device) - 1
            logits = model.logits(hidden[torch.arange(len(idx), device=device), last])  # (B, vocab)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are of no use")
            cache.advance(lengths)
            lengths = [1] * len(idx)
            idx = choose(logits, temperature, top_k, top_p, generator)  # (B, 1)
            yield idx[:, 0].tolist()

    return steps()


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Logits (B, vocab_size) to ids (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    chances, ids = (logits / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if top_k is not None:
        chances[:, top_k:] = 0
    if top_p is not None:
        before = chances.cumsum(dim=-1) - chances
        chances[before >= top_p * chances.sum(dim=-1, keepdim=True)] = 0
    return ids.gather(1, torch.multinomial(chances, 1, generator=generator))


def _check(model, prompts, new_tokens, temperature, top_k, top_p, seed) -> None:
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; it needs at least one token")
    longest, limit = max(map(len, prompts)), model.config.sequence_len
    if new_tokens < 0:
        raise ValueError(f"new_tokens is {new_tokens}; it must be at least 0")
    if longest + new_tokens > limit:
        raise ValueError(
            f"{longest} tokens of prompt and new_tokens = {new_tokens} exceed the model's context: "
            f"sequence_len = {limit}"
        )
    if temperature != 0 and not LEAST <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0, or finite and {LEAST} or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not LEAST <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be at least {LEAST} and at most 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.generate", description="Continue a text with a trained model."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a saved model")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one text or more")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="(default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from a chance of X together")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    parser.add_argument(
        "--tables",
        choices=TABLES,
        default="resident",
        help="where the L3 tables wait (default: resident)",
    )
    given = parser.parse_args(arguments)
    how = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "seed")}
    try:
        model, tokenizer = load_model(given.checkpoint, pick_device(given.device), given.tables)
        prompts = [_encode(tokenizer, text) for text in given.prompt]
        fed = [[token for prompt in prompts for token in prompt]]  # a list of ids a forward pass
        steps = _noted(stream(model, prompts, given.new_tokens, **how), fed)
        with precision(model):
            if len(prompts) == 1:
                _print_as_it_comes(tokenizer, given.prompt[0], steps)
            else:
                for prompt, *ids in zip(given.prompt, *steps, strict=True):
                    print(f"--- {prompt}{tokenizer.decode(ids)}")
        if given.tables != "resident" and model.l3_layers and given.new_tokens:
            print(_reading(model, fed[: given.new_tokens]), file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a model in training would meet it: behind the token that begins a document."""
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text come as lone surrogates
        raise ValueError(f"the prompt {text!r} is not UTF-8 text") from None
    return [END_OF_TEXT_ID, *tokenizer.encode(text, add_special_tokens=False).ids]


def _noted(steps: Iterator[list[int]], fed: list[list[int]]) -> Iterator[list[int]]:
    for step in steps:
        fed.append(step)
        yield step


def _reading(model: GPT, fed: list[list[int]]) -> str:
    """What the stores handed out, beside what the accounting says of these forward passes."""
    stores = [layer.store for layer in model.l3_layers.values()]
    rows = sum(store.rows_read for store in stores)
    read = sum(store.rows_read * store.row_bytes for store in stores)
    tokens = sum(map(len, fed))
    predicted = predicted_bytes(model, [torch.tensor(step) for step in fed])
    return (
        f"L3 rows read: {rows / tokens:,.1f} a token, {read / tokens:,.0f} bytes a token "
        f"(predicted: {predicted / tokens:,.0f}), of tables with {_table_bytes(stores):,} bytes"
    )


def _table_bytes(stores: list[RowStore]) -> int:
    return sum(int(store.bounds[-1]) * store.row_bytes for store in stores)


def _print_as_it_comes(tokenizer: Tokenizer, prompt: str, steps: Iterator[list[int]]) -> None:
    print(prompt, end="", flush=True)
    # It holds back the first bytes of a character until the others are there.
    decoder = DecodeStream(skip_special_tokens=True)
    for (token,) in steps:
        print(decoder.step(tokenizer, token) or "", end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
