"""The "compile" backend: the eager functions through torch.compile, each compiled on its first use for its shapes."""

import functools

import torch

from effbert.kernels import eager


@functools.cache
def _compiled(name: str):
    return torch.compile(getattr(eager, name), fullgraph=True)


def __getattr__(name):
    if name.startswith("_") or not hasattr(eager, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _compiled(name)
