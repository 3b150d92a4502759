"""Text from a model, one token after the other: `python -m l3paper.generate --help`."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from l3paper.checkpoints.model import TABLES, load_model
from l3paper.data.tokenizer import END_OF_TEXT_ID
from l3paper.errors import at_least, at_most, command, nonempty_path
from l3paper.gpt import GPT
from l3paper.parts.device import pick_device, precision

LEAST = 1e-6
"""The least temperature above 0, and the least top_p: smaller numbers do not survive float32."""


def generate(model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, **how) -> list[list[int]]:
    """Return every prompt with `new_tokens` more ids behind it; for the arguments, see `stream`."""
    steps = stream(model, prompts, new_tokens, **how)
    return [[*prompt, *ids] for prompt, *ids in zip(prompts, *steps, strict=True)]


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

    A temperature of 0 takes the most probable token. Otherwise one is drawn: of the top_k most
    probable, and of the fewest whose probabilities add up to top_p. Raises ValueError for numbers out
    of range and for a prompt that is empty, has ids outside the vocabulary or is, with the new tokens,
    longer than the model's sequence_len; and, while it runs, for logits that are not finite.
    """
    _check(model, prompts, new_tokens, temperature, top_k, top_p, seed)
    generator = torch.Generator(model.device).manual_seed(seed)
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _steps(model, prompts, new_tokens, pick)


@torch.inference_mode()
def _steps(
    model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, pick: Callable[[Tensor], Tensor]
) -> Iterator[list[int]]:
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    device, cache = model.device, model.new_cache(len(prompts), longest + new_tokens)
    # A short prompt is filled up with its own last id, whose rows are read anyway.
    padded = [[*prompt, *prompt[-1:] * (longest - len(prompt))] for prompt in map(list, prompts)]
    idx = torch.tensor(padded, device=device)
    for _ in range(new_tokens):
        hidden = model.hidden_states(idx, cache)  # (B, T, C)
        last = torch.tensor(lengths, device=device) - 1
        logits = model.logits(hidden[torch.arange(len(idx), device=device), last])  # (B, vocab_size)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are of no use")
        cache.advance(lengths)
        lengths = [1] * len(idx)
        idx = pick(logits)  # (B, 1)
        yield idx[:, 0].tolist()


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Choose an id for every row of logits: (B, vocab_size) to (B, 1); for the rest, see `stream`."""
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
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(
                f"prompt {i} has ids {min(prompt)} .. {max(prompt)}; they must be in "
                f"0 .. {model.config.vocab_size - 1}"
            )
    at_least(0, new_tokens=new_tokens, seed=seed)
    at_most(2**63 - 1, seed=seed)
    longest, limit = max(map(len, prompts)), model.config.sequence_len
    if longest + new_tokens > limit:
        raise ValueError(
            f"{longest} tokens of prompt and new_tokens = {new_tokens} exceed the model's context: "
            f"sequence_len = {limit}"
        )
    if temperature != 0 and not LEAST <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0, or finite and {LEAST} or more")
    if top_k is not None:
        at_least(1, top_k=top_k)
    if top_p is not None:
        at_least(LEAST, top_p=top_p)
        at_most(1, top_p=top_p)


PROGRAM = "python -m l3paper.generate"


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> None:
    """Continue one prompt as its tokens come, or several prompts together."""
    parser = argparse.ArgumentParser(PROGRAM, description="Continue a text with a trained model.")
    parser.add_argument(
        "--checkpoint",
        type=nonempty_path,
        required=True,
        metavar="DIR",
        help="a saved model, or a folder of checkpoints, of which the newest whole one is taken",
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one text or more")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="(default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N most probable tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="draw from the fewest tokens of this probability"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    parser.add_argument(
        "--tables",
        choices=TABLES,
        default="resident",
        help="where the L3 tables stay (default: resident)",
    )
    given = parser.parse_args(arguments)
    model, tokenizer = _load(given.checkpoint, pick_device(given.device), given.tables)
    prompts = [_encode(tokenizer, text) for text in given.prompt]
    choice = given.temperature, given.top_k, given.top_p, given.seed
    steps = stream(model, prompts, given.new_tokens, *choice)
    with precision(model):
        if len(prompts) == 1:
            _print_as_it_comes(tokenizer, given.prompt[0], steps)
        else:
            for prompt, *ids in zip(given.prompt, *steps, strict=True):
                print(f"--- {prompt}{tokenizer.decode(ids)}")


def _load(folder: Path, device: torch.device, tables: str) -> tuple[GPT, Tokenizer]:
    """Load the model in `folder` or, if that is the folder of a run, in its newest whole checkpoint.

    Damaged checkpoints are reported on stderr. Raises what `load_model` raises, and ValueError if no
    checkpoint is whole.
    """
    checkpoints = sorted(folder.glob("step-" + "[0-9]" * 9), reverse=True)
    if not checkpoints:
        return load_model(folder, device, tables)
    for checkpoint in checkpoints:
        try:
            loaded = load_model(checkpoint, device, tables)
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
        else:
            print(f"checkpoint: {checkpoint}", file=sys.stderr)
            return loaded
    raise ValueError(f"no checkpoint in {str(folder)!r} is whole")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text as a model meets it in training: behind the token that begins a document."""
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # other bytes of the command line come as lone surrogates
        raise ValueError(f"the prompt {text!r} is not UTF-8 text") from error
    return [END_OF_TEXT_ID, *tokenizer.encode(text, add_special_tokens=False).ids]


def _print_as_it_comes(tokenizer: Tokenizer, prompt: str, steps: Iterable[list[int]]) -> None:
    """Print the prompt, then each token of its continuation at once."""
    print(prompt, end="", flush=True)
    # It holds back the first bytes of a character until the others are there.
    decoder = DecodeStream(skip_special_tokens=True)
    try:
        for (token,) in steps:
            print(decoder.step(tokenizer, token) or "", end="", flush=True)
    finally:
        print()


if __name__ == "__main__":
    sys.exit(main())
