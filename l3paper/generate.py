"""Text from a model, one token after the other."""

import torch
from torch import Tensor

from l3paper.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, new_tokens: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Extend token ids (B, T) by `new_tokens` sampled ones: (B, T + new_tokens).

    The model sees the last `sequence_len` tokens. A temperature of 0 takes the likeliest token.
    Raises ValueError for an empty prompt and a temperature below 0.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}; it must be (batch, time), time >= 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    ids = prompt
    for _ in range(new_tokens):
        logits = model(ids[:, -model.config.sequence_len :])[:, -1]  # (B, vocab_size)
        if temperature == 0:
            following = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            chances = (logits / temperature).softmax(dim=-1)
            following = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
        ids = torch.cat([ids, following], dim=1)
    return ids
