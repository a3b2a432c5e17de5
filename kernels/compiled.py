"""The "compile" backend: the eager functions through torch.compile, each compiled on its first use for its shapes.

torch.compile keeps what it compiled by a function's code, 8 versions of each, and with fullgraph refuses a ninth. So
every op has a copy of its code for all that it compiles anew for but strides and sizes of two and more: expression and
other names, numbers that are no integers, types and dimensions of its tensors, which of these are 0 or 1, those that
are left out, what wants a gradient, autocast. Inside a function that is
being compiled there is nothing to compile, and the eager function is called.
"""

import functools
from collections.abc import Callable, Hashable
from types import FunctionType

import torch

from effbert.kernels import eager
from effbert.kernels.expression import Expression


@functools.cache
def _compiled(name: str, *_: Hashable) -> Callable:
    function = getattr(eager, name)
    parts = function.__globals__, name, function.__defaults__, function.__closure__
    return torch.compile(FunctionType(function.__code__.replace(), *parts), fullgraph=True)


def _kind(value) -> Hashable:
    """What code is compiled for, of an argument."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(min(size, 2) for size in value.shape)
        return value.dtype, sizes, value.device.type, value.requires_grad
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return value if value is None or isinstance(value, (Expression, str, bool, float)) else type(value)


def _state() -> Hashable:
    """The same, of what is round the call."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.is_grad_enabled(), *((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


@functools.cache
def _of(name: str) -> Callable:
    function = getattr(eager, name)

    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return _compiled(name, _state(), *map(_kind, (*args, *kwargs.values())))(*args, **kwargs)

    return run


def __getattr__(name):
    if name.startswith("_") or not hasattr(eager, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _of(name)
