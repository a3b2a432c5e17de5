"""Which backend runs an op: one choice, made by argument, by context manager or by EFFBERT_BACKEND.

Callers use the functions here (re-exported by `effbert.kernels`) and never a backend's own, so that backends can be
exchanged under them. Each checks its inputs (effbert.kernels.checks), then calls the backend's function of its name.

    eager     plain PyTorch, any device and dtype (effbert.kernels.eager)
    triton    the fused kernels; on a CPU only under Triton's interpreter, for tests (effbert.kernels.fused)
    compile   the eager functions through torch.compile (effbert.kernels.compiled)
    auto      for each call: triton on a GPU that can run it, for the dtypes and sizes it has, else eager
"""

import contextlib
import functools
import importlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch

from effbert.kernels import checks
from effbert.kernels.launch import is_interpreted

BACKENDS = {
    "eager": "effbert.kernels.eager",
    "triton": "effbert.kernels.fused",
    "compile": "effbert.kernels.compiled",
}
OPS = (
    "dropout",
    "mlp",
    "mlp_block",
    "dropout_add_layer_norm",
    "attention",
    "distill_attention",
    "score_mse",
    "projected_mse",
    "soft_cross_entropy",
)
OF_LISTS = ("projected_mse",)  # whose first argument is a list of tensors
ENVIRONMENT = "EFFBERT_BACKEND"
OLDEST_CAPABILITY = (8, 0)
_chosen: str | None = None
OLDEST_TRITON = (3, 6)
_NOTHING = torch.empty(0)  # stands for the first tensor of an empty list, which the checks then refuse
_log = logging.getLogger("effbert.kernels")
_saying = threading.Lock()  # threads that meet in functools.cache would each say it


def resolve(name: str) -> str:
    """`name` where it is "auto" or a backend; ValueError otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no backend {name!r}: one of auto, {', '.join(BACKENDS)}")
    return name


def current() -> str:
    """The backend in use, "auto" included: the innermost `use_backend`, else EFFBERT_BACKEND, else auto."""
    if _chosen:
        return _chosen
    name = os.environ.get(ENVIRONMENT) or "auto"
    try:
        return resolve(name)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT}={name}: {error}") from None


@contextlib.contextmanager
def use_backend(name: str):
    """Run the ops called inside the block with backend `name`, in all threads."""
    global _chosen
    if resolve(name) == "compile" or (name == "triton" and _why_no_triton() is None):
        for op in OPS:
            _implementation(name, op)
    outer, _chosen = _chosen, resolve(name)
    try:
        yield
    finally:
        _chosen = outer


@torch.compiler.assume_constant_result  # a plain function: torch.compile traces into what functools.cache makes
def why_not_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device`, in a line; None where they run."""
    return _why_not_on(device)


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    missing = _why_no_triton()
    if missing or device.type == "meta":
        return missing
    if device.type == "cpu":
        if is_interpreted():
            return None
        tested = "set TRITON_INTERPRET=1 to test kernels (slow; Triton 3.6 then needs numpy<2.4)"
        return f"tensors are on the CPU: move them to a GPU, or {tested}"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type}: an NVIDIA or AMD GPU is needed"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        have = ".".join(map(str, capability))
        return f"{torch.cuda.get_device_name(device)} has compute capability {have}: the kernels need 8.0, bf16 too"
    return None


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install 'triton>=3.6,<3.10'"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is too old: pip install 'triton>=3.6,<3.10'"
    return None


@functools.cache
def _log_once(level: int, message: str) -> None:
    _log.log(level, message)


def _say(level: int, message: str) -> None:
    if not torch.compiler.is_compiling():
        with _saying:
            _log_once(level, message)


def _automatic(op: str, device: torch.device, args, kwargs) -> str:
    """The backend for one call under "auto"; checks the inputs on the way."""
    reason = "inputs on the CPU" if device.type == "cpu" else why_not_triton(device)
    if reason is None:
        try:
            getattr(checks, op)("triton", *args, **kwargs)
            _say(logging.INFO, f"kernels: triton on {device}")
            return "triton"
        except (TypeError, ValueError) as error:
            reason = f"{op}: {error}"
    getattr(checks, op)("eager", *args, **kwargs)  # raises where the input is wrong for any backend
    _say(logging.INFO if device.type == "cpu" else logging.WARNING, f"kernels: eager PyTorch ({reason})")
    return "eager"


def _explicit(op: str, backend: str, device: torch.device, args, kwargs) -> None:
    if backend == "triton":
        reason = why_not_triton(device)
        if reason is not None:
            raise RuntimeError(f"{op}: backend 'triton' cannot run: {reason}; backend 'auto' or 'eager' runs here")
    getattr(checks, op)(backend, *args, **kwargs)


_functions: dict[tuple[str, str], Callable] = {}


def _implementation(backend: str, op: str) -> Callable:
    """The backend's function; found before torch.compile traces, which cannot import."""
    if (backend, op) not in _functions:
        _functions[backend, op] = getattr(importlib.import_module(BACKENDS[backend]), op)
    return _functions[backend, op]


def _make(op: str) -> Callable:
    eager = _implementation("eager", op)
    signature = inspect.signature(eager)
    first_name = next(iter(signature.parameters))

    def dispatched(*args, backend: str | None = None, **kwargs):
        device = _device(op, first_name, args[0] if args else kwargs.get(first_name, _NOTHING))
        chosen = current() if backend is None else resolve(backend)
        if chosen == "auto":
            chosen = _automatic(op, device, args, kwargs)
        else:
            _explicit(op, chosen, device, args, kwargs)
        return _implementation(chosen, op)(*args, **kwargs)

    dispatched.__name__ = dispatched.__qualname__ = op
    dispatched.__doc__ = eager.__doc__
    own = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
    dispatched.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])
    if (torch.cuda.is_available() or is_interpreted()) and _why_no_triton() is None:
        _implementation("triton", op)
    if os.environ.get(ENVIRONMENT) == "compile":
        _implementation("compile", op)
    return dispatched


def _device(op: str, name: str, first: torch.Tensor | Sequence[torch.Tensor]) -> torch.device:
    """Where an op's first argument lies, of `projected_mse` the first of these."""
    tensor = first
    if op in OF_LISTS and isinstance(first, (list, tuple)):
        tensor = first[0] if first else _NOTHING
    if not isinstance(tensor, torch.Tensor):
        what = "a list of tensors" if op in OF_LISTS else "a tensor"
        raise TypeError(f"{op}: {name} is a {type(first).__name__}: it must be {what}")
    return tensor.device


def __getattr__(name):
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update((op, _make(op)) for op in OPS)  # all at once: torch.compile sees none that comes while it traces
    return globals()[name]
