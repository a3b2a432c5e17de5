"""Turns the elementwise slots of an expression, and their exact gradients, into Triton functions in real source files.

The one idea: a slot is a function of one value v (x in `pre`, h in `mid`, y in `post`) and perhaps of the block's input
x, so slots are named by that function alone, and few of them serve all expressions. Hand-written kernels take them as
tl.constexpr arguments. A function's file is named by a hash of its source and written once; source is made from the
parsed tree only.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import secrets
import sys
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from effbert.kernels.eager import FILL
from effbert.kernels.expression import ACTIVATIONS, BINARY, Expression, Node

COMBINES = ("truncate", *FILL)


@dataclass(frozen=True)
class SlotFunction:
    """One elementwise function of the value v and the extra operand x, loaded.

    forward(v, x, inside) -> value and backward(v, x, inside, g) -> (dv, dx) are @triton.jit functions on fp32 tiles of
    one shape; g is the gradient of the value. Where an operand is not read, anything may be passed for it (0.0, True);
    dx is zero where not `uses_x`. inside: bool tile, True where the column is below the width of x; read only where
    `needs_inside`. It may have one row.

    name: of its module, from a hash of `source`. text: the canonical tree, its value called v, and what fills it up;
    one text means one function. The other flags say what is read: x at all, v or x by `backward`.
    """

    name: str
    text: str
    source: str
    forward: Any
    backward: Any
    uses_x: bool
    backward_uses_value: bool
    backward_uses_x: bool
    is_identity: bool
    needs_inside: bool

    @property
    def statements(self) -> int:
        """Lines of both functions: about how many tiles a kernel that runs them may hold in registers."""
        return self.source.count("\n    ")


@dataclass(frozen=True)
class SlotFunctions:
    """The functions of the three slots of `y = post(W2 · mid(W1 · pre(x) + b1, x) + b2, x)`."""

    pre: SlotFunction
    mid: SlotFunction
    post: SlotFunction


@functools.lru_cache(maxsize=100_000)
def slot_functions(expression: Expression | str, combine: str = "truncate") -> SlotFunctions:
    """The functions of the three slots: the same objects for all expressions that share a slot's function.

    expression: a tree, or its text with or without structures. combine: "truncate", "pad" or "pad_released", as in
    `effbert.kernels.eager.binary`. With "truncate" widths must already work out: everything is elementwise at columns
    below the smaller width. With the others, parts of `mid` that read x alone are filled up beyond the width of x where
    they meet a part that reads the value; where both widths are equal, "truncate" says the same more cheaply.

    Raises ExpressionError for an expression that is not valid, ValueError for another `combine`.
    """
    return SlotFunctions(**{slot: _function(tree, fills) for slot, (_, tree, fills) in _trees(expression, combine)})


def source_of(expression: Expression | str, combine: str = "truncate") -> str:
    """The sources of the three slots for people to read, each below a line that names its slot. Nothing is loaded."""
    parts, slot_of = [], {}
    for slot, (written, tree, fills) in _trees(expression, combine):
        first = slot_of.setdefault((tree, fills), slot)
        same = f": the function of {first}\n" if first != slot else f"\n{_Generated(tree, fills).source}"
        parts.append(f"# {slot}, {written}{same}")
    return "\n".join(parts)


def cache_dir() -> Path:
    """Folder of generated files: kernels/ in `$EFFBERT_CACHE`, else `$XDG_CACHE_HOME/effbert`, `~/.cache/effbert`."""
    if own := os.environ.get("EFFBERT_CACHE"):
        return Path(own).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "effbert" / "kernels"


# What fills up the narrower side of an op that mixes widths: (op, value) pairs, none where nothing is filled.
_Fills = tuple[tuple[str, float], ...]

_VALUE = "h"  # how trees call the value v, whichever slot they come from
_NAMES = {_VALUE: "v", "x": "x"}
_VALUES = {"pre": "x", "mid": "h", "post": "y"}
_STRUCTURED = re.compile(r"linear\d")

# op -> its statement, and the gradient of each argument: {0} and {1} are the arguments, {g} the gradient of the result.
_RULES = {
    "add": ("{0} + {1}", ("{g}", "{g}")),
    "mul": ("{0} * {1}", ("{g} * {1}", "{g} * {0}")),
    "max": ("maximum({0}, {1})", ("maximum_grad({0}, {1}, {g})", "maximum_grad({1}, {0}, {g})")),
    "fill": ("tl.where(inside, {0}, {1})", ("tl.where(inside, {g}, 0.0)",)),
    **{name: (f"{name}({{0}})", (f"{name}_grad({{0}}, {{g}})",)) for name in ACTIVATIONS},
}

_SOURCE = '''\
"""{text}

As a function of the value v, and its gradient, on fp32 tiles. Written by effbert.kernels.codegen; any change is undone.
"""

import triton
import triton.language as tl
{imports}

@triton.jit
def forward(v, x, inside):
{forward}


@triton.jit
def backward(v, x, inside, g):
{backward}
'''


def _trees(expression: Expression | str, combine: str) -> Iterator[tuple[str, tuple[Node, Node, _Fills]]]:
    """(slot, (its tree as written, its canonical tree of the value, its fills)) for all three."""
    if combine not in COMBINES:
        raise ValueError(f"combine {combine!r}: one of {', '.join(COMBINES)}")
    if isinstance(expression, str):
        expression = Expression.parse(expression, structured=bool(_STRUCTURED.search(expression)))
    slots = expression.slots()
    for slot, value in _VALUES.items():
        written = getattr(slots, slot)
        tree = _renamed(written, value).canonical()
        # pre and post meet x at its own width: only the inner width can differ
        mixing = _mixing_ops(tree) if slot == "mid" and combine in FILL else ()
        yield slot, (written, tree, tuple((op, FILL[combine][op]) for op in BINARY if op in mixing))


def _renamed(node: Node, value: str) -> Node:
    return Node(_VALUE) if node.op == value else Node(node.op, tuple(_renamed(arg, value) for arg in node.args))


def _mixing_ops(node: Node) -> set[str]:
    """The ops of which one argument reads the value and the other does not: there widths can differ."""
    ops = set().union(*map(_mixing_ops, node.args))
    return ops | {node.op} if len({_reads(arg, _VALUE) for arg in node.args}) == 2 else ops


def _reads(node: Node, leaf: str) -> bool:
    return node.op == leaf or any(_reads(arg, leaf) for arg in node.args)


_loading = threading.Lock()


def _function(tree: Node, fills: _Fills) -> SlotFunction:
    with _loading:
        return _load(tree, fills)


@functools.cache
def _load(tree: Node, fills: _Fills) -> SlotFunction:
    generated = _Generated(tree, fills)
    name = f"effbert_slot_{hashlib.sha256(generated.source.encode()).hexdigest()[:16]}"
    module = _module(name, generated.source)
    return SlotFunction(
        name=name,
        text=generated.text,
        source=generated.source,
        forward=module.forward,
        backward=module.backward,
        uses_x=_reads(tree, "x"),
        backward_uses_value=generated.backward_reads("v"),
        backward_uses_x=generated.backward_reads("x"),
        is_identity=not tree.args,
        needs_inside=bool(fills),
    )


class _Generated:
    """The source of one slot function: the tree's statements, then reverse-mode differentiation of them.

    A statement's text is its key, so what is asked for twice is computed once; each function keeps the statements that
    its results need.
    """

    def __init__(self, tree: Node, fills: _Fills):
        self.fills = dict(fills)
        self.names: dict[str, str] = {}  # statement -> its name
        self.steps: list[tuple[str, str, tuple[str, ...]]] = []  # name, op, arguments of each forward statement
        forward = self._body(self._value(tree))
        self.backward = self._body(*self._gradients())
        used = sorted(set(re.findall(r"(?<![.\w])(\w+)\(", forward + self.backward)))
        imports = f"\nfrom effbert.kernels.activations import {', '.join(used)}\n" if used else ""
        filled = ", ".join(f"{op} {value!r}" for op, value in fills)
        self.text = re.sub(rf"\b{_VALUE}\b", "v", str(tree)) + (f" filled up in {filled}" if fills else "")
        self.source = _SOURCE.format(text=self.text, imports=imports, forward=forward, backward=self.backward)

    def backward_reads(self, operand: str) -> bool:
        """Whether the statements of `backward` read v or x."""
        return bool(re.search(rf"\b{operand}\b", self.backward))

    def _value(self, node: Node) -> str:
        if not node.args:
            return _NAMES[node.op]
        args = [self._value(arg) for arg in node.args]
        if node.op in self.fills:
            reads = [_reads(arg, _VALUE) for arg in node.args]
            if any(reads) and not all(reads):
                narrow = reads.index(False)
                args[narrow] = self._apply("fill", args[narrow], repr(self.fills[node.op]))
        return self._apply(node.op, *args)

    def _apply(self, op: str, *args: str) -> str:
        statement = _RULES[op][0].format(*args)
        known = statement in self.names
        name = self._name("t", statement)
        if not known:
            self.steps.append((name, op, args))
        return name

    def _name(self, prefix: str, statement: str) -> str:
        if statement.isidentifier():
            return statement
        return self.names.setdefault(statement, f"{prefix}{len(self.names) + 1}")

    def _gradients(self) -> tuple[str, str]:
        """The gradients of v and x, the last step's value having gradient g."""
        parts = defaultdict(list)  # of each name's gradient
        parts[self.steps[-1][0] if self.steps else "v"].append("g")

        def total(name: str) -> str:
            return self._name("g", " + ".join(parts[name])) if parts[name] else "tl.zeros_like(g)"

        for name, op, args in reversed(self.steps):
            g = total(name)
            for arg, rule in zip(args, _RULES[op][1], strict=False):  # the value that fills up is no argument
                parts[arg].append(self._name("g", rule.format(*args, g=g)))
        return total("v"), total("x")

    def _body(self, *results: str) -> str:
        statements = {name: statement for statement, name in self.names.items()}
        needed, pending = set(), set(results)
        while pending:
            needed |= pending
            pending = {name for one in pending for name in re.findall(r"\w+", statements.get(one, ""))} - needed
        lines = [f"{name} = {statement}" for name, statement in statements.items() if name in needed]
        return "\n".join(f"    {line}" for line in (*lines, f"return {', '.join(results)}"))


class _Loader(SourceFileLoader):
    """Compiles the file's text each time: bytecode kept beside it could be that of another text."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


def _module(name: str, source: str) -> ModuleType:
    path = _written(f"{name}.py", source.encode())
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where `inspect` looks for the source
    spec.loader.exec_module(module)
    return module


def _written(name: str, data: bytes) -> Path:
    """The path of a file with exactly this content: in the cache, or in a temporary folder where that fails."""
    folder = Path(os.environ.get("EFFBERT_CACHE") or "~/.cache")
    try:
        folder = cache_dir()
        return _write(folder / name, data)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows a home folder
        return _write(_temporary_folder(folder, getattr(error, "strerror", None) or str(error)) / name, data)


def _write(path: Path, data: bytes) -> Path:
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


_temporary_folders: dict[Path, tempfile.TemporaryDirectory] = {}


def _temporary_folder(folder: Path, reason: str) -> Path:
    """Where files go that `folder` does not take, until the process ends; a warning the first time."""
    if folder not in _temporary_folders:
        _temporary_folders[folder] = tempfile.TemporaryDirectory(prefix="effbert-kernels-")
        warnings.warn(
            f"cannot write generated kernels to {folder} ({reason}): using {_temporary_folders[folder].name} until "
            "this process ends; set EFFBERT_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return Path(_temporary_folders[folder].name)
