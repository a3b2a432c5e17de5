"""What the MLP of one layer computes, as an immutable tree of ops: parse, print, check, infer shapes, compare.

The one idea: every valid expression is `y = post(W2 · mid(W1 · pre(x) + b1, x) + b2, x)`, three elementwise trees round
two GEMMs, so text is read once into a tree and all else (kernels, models, the search) works on the tree. Reading is
purely syntactic; `Expression.check` decides whether the tree means something. Nothing here is ever evaluated as code.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NoReturn

BINARY = ("add", "mul", "max")
ACTIVATIONS = ("gelu", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "swish")
LINEAR = "linear"
WEIGHTS = ("wb1", "wb2")
LEAVES = ("x", *WEIGHTS)
PLACEHOLDERS = ("h", "y")
MIN_HEIGHT, MAX_HEIGHT = 3, 7
ENCODING_LENGTH = 20

_ARITY = (
    {LINEAR: 2} | dict.fromkeys(BINARY, 2) | dict.fromkeys(ACTIVATIONS, 1) | dict.fromkeys(LEAVES + PLACEHOLDERS, 0)
)
_MAX_NESTING = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPACES = re.compile(r"\s*")


class ExpressionError(ValueError):
    """Text that is no expression, or a tree that is no valid one; the message is one line and points at the place."""


@dataclass(frozen=True, order=True, slots=True)
class Structure:
    """A linear structure `n_d`: `stacks` MLPs (1 to 4) of inner width ratio 1/`divisor` (1 to 4)."""

    stacks: int
    divisor: int

    def __post_init__(self) -> None:
        if self.stacks not in range(1, 5) or self.divisor not in range(1, 5):
            raise ExpressionError(f"no structure {self.stacks}_{self.divisor}: stacks and divisor go from 1 to 4")

    @classmethod
    def parse(cls, text: str) -> "Structure":
        """`"4_2"` to `Structure(4, 2)`; raises ExpressionError for anything but the 16 names 1_1 to 4_4."""
        if text not in _STRUCTURE_BY_NAME:
            raise ExpressionError(f"no structure {_short(text)}: write stacks_divisor, each 1 to 4, for example 4_2")
        return _STRUCTURE_BY_NAME[text]

    def inner_width(self, intermediate_size: int) -> int:
        """Channels between the two GEMMs: `intermediate_size // divisor`, at least 1 or ValueError."""
        if intermediate_size < self.divisor:
            raise ValueError(f"intermediate_size {intermediate_size} is too small for the ratio 1/{self.divisor}")
        return intermediate_size // self.divisor

    def __str__(self) -> str:
        return f"{self.stacks}_{self.divisor}"


STRUCTURES = tuple(Structure(stacks, divisor) for stacks in range(1, 5) for divisor in range(1, 5))
_STRUCTURE_BY_NAME = {str(structure): structure for structure in STRUCTURES}

# The published numbering of nodes: stage 1 tells 16 linears apart, stage 2 has one.
_OPS_AND_LEAVES = (*BINARY, *ACTIVATIONS, *LEAVES)
_STRUCTURED_IDS = {name: i for i, name in enumerate((*(f"{LINEAR}{s}" for s in STRUCTURES), *_OPS_AND_LEAVES))}
_BARE_IDS = {name: i for i, name in enumerate((LINEAR, *_OPS_AND_LEAVES))}


@dataclass(frozen=True, slots=True)
class Node:
    """One op and its arguments. `structure` is set on linears only (None there: the published stage-2 form).

    Leaves are `x`, the weights `wb1` and `wb2`, and, inside `Slots`, the placeholders `h` and `y`.
    """

    op: str
    args: tuple["Node", ...] = ()
    structure: Structure | None = None

    def __post_init__(self) -> None:
        if self.op not in _ARITY:
            raise ExpressionError(f"unknown op {_short(self.op)}; known: {', '.join(_ARITY)}")
        if len(self.args) != _ARITY[self.op]:
            raise ExpressionError(f"{self.op} takes {_count(_ARITY[self.op])}, not {len(self.args)}")
        if self.structure is not None and self.op != LINEAR:
            raise ExpressionError(f"{self.op} has no structure; only linear has")

    @property
    def name(self) -> str:
        """The published name of the op: `linear4_2`, `gelu`, `x`."""
        return f"{self.op}{self.structure or ''}"

    @property
    def height(self) -> int:
        """Edges on the longest path down to a leaf."""
        return 1 + max(arg.height for arg in self.args) if self.args else 0

    def canonical(self) -> "Node":
        """The same function with the arguments of add, mul and max in one order (that of their canonical text)."""
        return self._map(
            lambda node: replace(node, args=tuple(sorted(node.args, key=str))) if node.op in BINARY else node
        )

    def _map(self, change: Callable[["Node"], "Node"]) -> "Node":
        return change(Node(self.op, tuple(arg._map(change) for arg in self.args), self.structure))

    def _prefix(self) -> Iterator["Node"]:
        yield self
        for arg in self.args:
            yield from arg._prefix()

    def __str__(self) -> str:
        return f"{self.name}({','.join(map(str, self.args))})" if self.args else self.name


@dataclass(frozen=True, slots=True)
class Slots:
    """The three elementwise trees of `y = post(W2 · mid(W1 · pre(x) + b1, x) + b2, x)`.

    `pre` reads x alone; `mid` reads `h`, the first GEMM's output, and x; `post` reads `y`, the second's, and x. A slot
    that does nothing is its placeholder (`x`, `h` or `y`) alone; `mid` always does something.
    """

    pre: Node
    mid: Node
    post: Node


@dataclass(frozen=True, slots=True)
class Expression:
    """The MLP of one layer as a tree; equality and hash follow the tree as written, `key` its canonical form.

    `text` is the tree printed, made once: ops are called with it at every step.
    """

    root: Node
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", str(self.root))

    @classmethod
    def parse(cls, text: str, structured: bool = True) -> "Expression":
        """Read the published text form; spaces are free. Raises ExpressionError for malformed text.

        `structured=True` takes `linear4_2`, `structured=False` the bare `linear` of the published stage 2; each refuses
        the other. Whether the tree is a valid MLP is for `check` to say.
        """
        return cls(_Parser(text, structured).parse())

    def __str__(self) -> str:
        return self.text

    @property
    def height(self) -> int:
        """Edges on the longest path from the root to a leaf; a leaf alone has 0."""
        return self.root.height

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in prefix order."""
        return tuple(self.root._prefix())

    @property
    def structure(self) -> Structure | None:
        """The structure its linears share, None if they are bare; ExpressionError if they differ or there is none."""
        linears = [node for node in self.nodes if node.op == LINEAR]
        if not linears:
            raise ExpressionError(f"{_short(str(self))} has no linear, so no structure")
        for node in linears:
            if node.structure != linears[0].structure:
                self._fail(node, f"both linears must have one structure, the other is {linears[0].name}")
        return linears[0].structure

    def with_structure(self, structure: Structure | None) -> "Expression":
        """The same ops with every linear given this structure."""
        return Expression(
            self.root._map(lambda node: replace(node, structure=structure) if node.op == LINEAR else node)
        )

    def without_structure(self) -> "Expression":
        """The published stage-2 form: every linear bare."""
        return self.with_structure(None)

    def canonical(self) -> "Expression":
        """The representative of all expressions that differ only in argument order of add, mul and max."""
        return Expression(self.root.canonical())

    @property
    def key(self) -> str:
        """Text of the canonical form: equal for `add(a,b)` and `add(b,a)`."""
        return str(self.canonical())

    def prefix_ids(self, length: int = ENCODING_LENGTH, structured: bool | None = None) -> list[int]:
        """The published encoding: a number per node in prefix order, filled with -1 to `length`, never cut.

        With structures the numbers are those of stage 1 (16 linears, 0 to 28), without those of stage 2 (0 to 13).
        `structured` chooses for trees that have no linear; None reads it off the linears.
        """
        if structured is None:
            structured = not any(node.op == LINEAR and node.structure is None for node in self.nodes)
        table = _STRUCTURED_IDS if structured else _BARE_IDS
        ids = [table[node.name] for node in self.nodes]
        return ids + [-1] * (length - len(ids))

    @property
    def is_valid(self) -> bool:
        """Whether `check` accepts it."""
        try:
            self.check()
        except ExpressionError:
            return False
        return True

    def check(self) -> "Expression":
        """Itself, or ExpressionError with the reason and the place (column in the printed text).

        Valid is: weights only as second argument of a linear and always there; height 3 to 7; one wb1, then one wb2;
        one structure; no linear directly in a linear, no activation directly in an activation; no add, mul or max of
        two equal inputs; widths that fit at all four ratios. Equal inputs that are themselves an add, mul or max pass,
        as they do in the published search.
        """
        self._check_weights_in_place()
        if not MIN_HEIGHT <= self.height <= MAX_HEIGHT:
            self._fail(self.root, f"height {self.height}, must be {MIN_HEIGHT} to {MAX_HEIGHT}")
        self._check_weights_once()
        _ = self.structure
        self._check_neighbours()
        for divisor in range(1, 5):
            self.output_width(12, 12 // divisor)
        return self

    def output_width(self, hidden: int, inner: int, combine: str = "truncate") -> int:
        """Channels of the result for x with `hidden` channels, wb1 hidden -> inner and wb2 inner -> hidden.

        add, mul and max of unequal widths cut both to the smaller (`combine="truncate"`) or fill the smaller up to the
        larger (`"pad"`, the 768-wide transfer variant). Raises ExpressionError where a linear meets another width.
        """
        if combine not in ("truncate", "pad"):
            raise ValueError(f"combine is truncate or pad, not {combine!r}")
        self._check_weights_in_place()
        meet = min if combine == "truncate" else max

        def width(node: Node) -> int:
            if node.op == "x":
                return hidden
            if node.op != LINEAR:
                return meet(map(width, node.args))
            data, weight = node.args
            takes, gives = (hidden, inner) if weight.op == "wb1" else (inner, hidden)
            if width(data) != takes:
                at = f"hidden width {hidden} and inner width {inner}"
                self._fail(node, f"{weight.op} takes {takes} channels and gets {width(data)} at {at}")
            return gives

        return width(self.root)

    def slots(self) -> Slots:
        """The three elementwise trees round the two GEMMs; raises ExpressionError unless valid."""
        self.check()
        first, second = (next(n for n in self.nodes if n.op == LINEAR and n.args[1].op == wb) for wb in WEIGHTS)
        post = self.root._map(lambda node: Node("y") if node == second else node)
        mid = second.args[0]._map(lambda node: Node("h") if node == first else node)
        return Slots(first.args[0], mid, post)

    def _check_weights_in_place(self) -> None:
        if self.root.op in WEIGHTS:
            self._fail(self.root, "a weight alone; it belongs as second argument of a linear")
        for parent in self.nodes:
            for index, node in enumerate(parent.args):
                wants_weight = parent.op == LINEAR and index == 1
                if wants_weight and node.op not in WEIGHTS:
                    self._fail(node, f"{parent.name} needs a weight, wb1 or wb2, as its second argument")
                if not wants_weight and node.op in WEIGHTS:
                    self._fail(node, f"{parent.name} reads a weight as data; wb1 and wb2 go second in a linear")

    def _check_weights_once(self) -> None:
        weights = [node for node in self.nodes if node.op in WEIGHTS]
        ops = [node.op for node in weights]
        if sorted(ops) != list(WEIGHTS):
            found = " and ".join(f"{ops.count(wb)} {wb}" for wb in WEIGHTS)
            self._fail(weights[-1] if weights else self.root, f"needs exactly one wb1 and one wb2, has {found}")
        if ops[0] != "wb1":
            self._fail(weights[0], "wb1 must come before wb2: the inner linear reads wb1")

    def _check_neighbours(self) -> None:
        for node in self.nodes:
            inner = node.args[0] if node.args else None
            if node.op == LINEAR and inner.op == LINEAR:
                self._fail(inner, "a linear directly in a linear; put an op between them")
            if node.op in ACTIVATIONS and inner.op in ACTIVATIONS:
                self._fail(inner, f"an activation directly in the activation {node.op}; drop one of them")
            if node.op in BINARY and inner.op not in BINARY and len({arg.canonical() for arg in node.args}) == 1:
                self._fail(node, f"{node.op} of two equal inputs; they must differ")

    def _fail(self, culprit: Node, message: str) -> NoReturn:
        text = str(self)
        column = next(column for node, column in _columns(self.root) if node is culprit)
        raise ExpressionError(_message(text, column, str(culprit), message))


def parse_architecture_text(text: str) -> tuple[Expression, ...]:
    """Layers joined by commas, `expr1, expr2, ...`, or by blanks, as the released scripts write them; ExpressionErrors
    name the layer, counted from 1."""
    layers = []
    for number, part in enumerate(_split_at_top_level(text), start=1):
        try:
            layers.append(Expression.parse(part))
        except ExpressionError as error:
            raise ExpressionError(f"layer {number}: {error}") from None
    return tuple(layers)


def _split_at_top_level(text: str) -> Iterator[str]:
    depth = start = 0
    for at, character in enumerate(text):
        begins_anew = (
            depth == 0 and at and text[at - 1].isspace() and character not in ",()" and not character.isspace()
        )
        if begins_anew and text[start:at].rstrip().endswith(")"):
            yield text[start:at].strip()
            start = at
        if character == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
        depth = max(0, depth + (character == "(") - (character == ")"))
    yield text[start:].strip()


class _Parser:
    """Recursive descent over one expression; nesting is limited well below Python's own limit."""

    def __init__(self, text: str, structured: bool):
        self.text, self.structured, self.at = text, structured, 0

    def parse(self) -> Node:
        if not self.text.strip():
            raise ExpressionError("empty text; an expression looks like linear2_1(gelu(linear2_1(x,wb1)),wb2)")
        root = self.node(1)
        if self.peek():
            self.fail(self.at, self.text[self.at :], "trailing text after the end of the expression; remove it")
        return root

    def node(self, depth: int) -> Node:
        start, name = self.name()
        if depth > _MAX_NESTING:
            self.fail(
                start, name, f"nested deeper than {_MAX_NESTING}; a valid expression has height {MAX_HEIGHT} at most"
            )
        op, structure = self.resolve(start, name)
        arity = _ARITY[op]
        if self.peek() != "(":
            if arity:
                self.fail(start, name, f"{name} takes {_count(arity)} in parentheses")
            return Node(op)
        if not arity:
            self.fail(self.at, "(", f"{name} takes no arguments")
        return Node(op, self.arguments(start, name, arity, depth), structure)

    def arguments(self, start: int, name: str, arity: int, depth: int) -> tuple[Node, ...]:
        args: list[Node] = []
        while not args or self.peek() == ",":
            if len(args) == arity:
                self.fail(self.at, ",", f"{name} of column {start + 1} takes {_count(arity)}, here is one more")
            self.at += 1
            if self.peek() == ")":
                self.fail(self.at, ")", f"{name} of column {start + 1} lacks an argument, it takes {arity}")
            args.append(self.node(depth + 1))
        if self.peek() != ")":
            token = self.text[self.at : self.at + 1]
            self.fail(self.at, token, f"expected , or ) to go on with {name} of column {start + 1}")
        if len(args) < arity:
            self.fail(self.at, ")", f"{name} of column {start + 1} takes {_count(arity)}, not {len(args)}")
        self.at += 1
        return tuple(args)

    def name(self) -> tuple[int, str]:
        self.peek()
        found = _NAME.match(self.text, self.at)
        if not found:
            self.fail(self.at, self.text[self.at : self.at + 1], "expected the name of an op, x, wb1 or wb2")
        self.at = found.end()
        return found.start(), found.group()

    def resolve(self, start: int, name: str) -> tuple[str, Structure | None]:
        if name in _ARITY and name not in PLACEHOLDERS and not (name == LINEAR and self.structured):
            return name, None
        if name == LINEAR:
            self.fail(start, name, "linear without its structure; write for example linear2_1")
        if not re.fullmatch(r"linear[0-9]+_[0-9]+", name):
            linear = "linear1_1 to linear4_4" if self.structured else LINEAR
            self.fail(start, name, f"unknown op; known: {', '.join((linear, *BINARY, *ACTIVATIONS, *LEAVES))}")
        if not self.structured:
            self.fail(start, name, "a structure is not allowed here; write linear")
        structure = _STRUCTURE_BY_NAME.get(name.removeprefix(LINEAR))
        if structure is None:
            self.fail(start, name, "structure out of range; stacks and divisor go from 1 to 4: linear1_1 to linear4_4")
        return LINEAR, structure

    def peek(self) -> str:
        self.at = _SPACES.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def fail(self, at: int, token: str, message: str) -> NoReturn:
        raise ExpressionError(_message(self.text, at, token, message))


def _columns(node: Node, column: int = 0) -> Iterator[tuple[Node, int]]:
    yield node, column
    column += len(node.name) + 1
    for arg in node.args:
        yield from _columns(arg, column)
        column += len(str(arg)) + 1


def _message(text: str, at: int, token: str, message: str) -> str:
    place = f"at {_short(token)}" if token else "at the end of the text"
    near, span = "", 36
    if len(text) > len(token):
        window = text[max(0, at - span) : at + span]
        near = f" (in {'…' if at > span else ''}{window!r}{'…' if at + span < len(text) else ''})"
    return f"column {at + 1}, {place}: {message}{near}"


def _short(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _count(arity: int) -> str:
    return {0: "no arguments", 1: "1 argument", 2: "2 arguments"}[arity]
