"""Which backend runs an op: one choice for the process, made by context manager or EFFBERT_BACKEND.

Callers use the functions here (re-exported by `effbert.kernels`) and never a backend's own, so that backends can be
exchanged under them. This version has one backend, "eager" (plain PyTorch); "auto" takes the fastest that is present.
"""

import contextlib
import importlib
import os
from contextvars import ContextVar
from types import ModuleType

BACKENDS = {"eager": "effbert.kernels.eager"}
OPS = (
    "dropout",
    "mlp",
    "mlp_block",
    "dropout_add_layer_norm",
    "attention",
    "score_mse",
    "projected_mse",
    "soft_cross_entropy",
)
_chosen: ContextVar[str | None] = ContextVar("effbert backend", default=None)


def resolve(name: str) -> str:
    """The backend that `name` ("auto" or a backend) stands for; ValueError where it does not exist here."""
    if name == "auto":
        return "eager"
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not in this version of effbert: one of auto, {', '.join(BACKENDS)}")
    return name


def current() -> str:
    """The backend in use: the innermost `use_backend`, else EFFBERT_BACKEND, else auto."""
    return resolve(_chosen.get() or os.environ.get("EFFBERT_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str):
    """Run the ops called inside the block with backend `name`."""
    token = _chosen.set(resolve(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def _backend() -> ModuleType:
    return importlib.import_module(BACKENDS[current()])


def __getattr__(name):
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def op(*args, **kwargs):
        return getattr(_backend(), name)(*args, **kwargs)

    op.__name__ = op.__qualname__ = name
    op.__doc__ = getattr(importlib.import_module(BACKENDS["eager"]), name).__doc__
    globals()[name] = op
    return op
