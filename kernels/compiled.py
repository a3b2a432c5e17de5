"""The "compile" backend: the eager functions through torch.compile, each compiled on its first use for its shapes.

torch.compile keeps what it compiled by a function's code, 8 versions of each, and with fullgraph refuses a ninth. So
every op has a copy of its code for each expression and combine; shapes and types share one. Inside a function that is
being compiled there is nothing to compile, and the eager function is called.
"""

import functools
from collections.abc import Callable
from types import FunctionType

import torch

from effbert.kernels import eager
from effbert.kernels.expression import Expression


@functools.cache
def _compiled(name: str, *_: Expression | str) -> Callable:
    function = getattr(eager, name)
    parts = function.__globals__, name, function.__defaults__, function.__closure__
    return torch.compile(FunctionType(function.__code__.replace(), *parts), fullgraph=True)


@functools.cache
def _of(name: str) -> Callable:
    function = getattr(eager, name)

    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        kinds = (value for value in (*args, *kwargs.values()) if isinstance(value, (Expression, str)))
        return _compiled(name, *kinds)(*args, **kwargs)

    return run


def __getattr__(name):
    if name.startswith("_") or not hasattr(eager, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _of(name)
