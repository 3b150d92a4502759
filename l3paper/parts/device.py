"""Where models compute, how precisely, and what is never compiled."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def pick_device(name: str) -> torch.device:
    """The torch device for "cpu", "cuda" or "auto"; ValueError for others and where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; choose cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def precision(model: nn.Module) -> torch.autocast:
    """The context a model computes in: bfloat16 on CUDA, its own precision elsewhere."""
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def float32_or_better(dtype: torch.dtype) -> torch.dtype:
    """The type for sums and softmaxes of numbers of this type."""
    return torch.promote_types(dtype, torch.float32)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this type of device; the meta device has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def exactly(kind: str) -> AbstractContextManager:
    """A context in which nothing is cast automatically on this type of device."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def is_traced(x: Tensor) -> bool:
    """Whether `x` holds no numbers: a compiler follows the code, or only shapes are asked for."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def eager(function: Callable) -> Callable:
    """Break the graph of a compiled model at this function, as `torch.compiler.disable` does.

    That decorator imports the compiler at once, most of a second even for a program that compiles
    nothing. This one waits until a compiled model calls the function.
    """

    @wraps(function)
    def call(*arguments, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


def uncompiled() -> AbstractContextManager:
    """A context in which compiled modules run as they are written, hooks included."""
    # Without the compiler in memory nothing is compiled, and importing it would take a second.
    compiler = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()
