"""The three search spaces: which architectures a stage may visit, how to draw, change and encode one.

The one idea: parameters depend on the linear structures alone and add up over layers, so a table of how many ways the
remaining layers can reach each sum ranks every in-band choice of structures. Drawing one is drawing its rank: exactly
uniform, never by trial. Expressions are built slot by slot in the grammar, so that they are valid by construction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from effbert.architecture import Architecture, Dimensions, count_flops, count_parameters, mlp_parameters
from effbert.kernels.expression import (
    ACTIVATIONS,
    BINARY,
    ENCODING_LENGTH,
    LINEAR,
    MAX_HEIGHT,
    MIN_HEIGHT,
    STRUCTURES,
    Expression,
    Node,
    Structure,
)

STAGES = ("coarse", "operations", "fine")
MAX_NODES = ENCODING_LENGTH
MAX_DRAWS = 20_000

# How often a drawn expression has height 3 to 7: the published winners have 4 or 5.
_HEIGHT_WEIGHTS = (0.25, 0.35, 0.22, 0.12, 0.06)
_ACTIVATION_RATE = 0.7
_PLAIN_OPERAND_RATE = 0.6
_MAX_EDITS = 3


class Space(Protocol):
    """All that a sampler knows of a search space. `rng` is a numpy Generator, the only source of randomness."""

    def sample(self, rng: np.random.Generator) -> Architecture:
        """An architecture of the space."""

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """An architecture of the space near this one and with another key."""

    def encode(self, architecture: Architecture) -> np.ndarray:
        """A float32 vector of one length for the whole space; equal keys give equal vectors."""

    def key(self, architecture: Architecture) -> str:
        """Equal exactly for architectures that are the same candidate."""


class ArchitectureSpace:
    """The space of one stage: architectures with `min_params` to `max_params` parameters, both included.

    Parameters are counted with the training-only projection, without pooler and head.

    - `coarse`: expressions and linear structures are free.
    - `operations`: the structures are `base`'s; each layer's expression is `base`'s after a few edits.
    - `fine`: the expressions are `base`'s; each layer picks one of the 16 structures.

    max_flops: most FLOPs of a text of `length` tokens, as count_flops totals them; 0 for any. Raises ValueError where
    nothing lies in the band and below it, or `base` does not fit the stage.
    """

    def __init__(
        self,
        stage: str,
        dims: Dimensions,
        num_layers: int,
        min_params: int,
        max_params: int,
        base: Architecture | None = None,
        max_flops: int = 0,
        length: int = 0,
    ):
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
        self.stage, self.dims, self.num_layers, self.base = stage, dims, num_layers, base
        costs = tuple(mlp_parameters(structure, dims) for structure in STRUCTURES)
        smallest = Architecture.uniform(STRUCTURES[0], num_layers)
        fixed = count_parameters(smallest, dims).total_with_projection - num_layers * costs[0]
        ceiling = flops_ceiling(dims, num_layers, length, max_flops) if max_flops else None
        self.max_flops, self.length = max_flops, length
        self.band = Band(costs, num_layers, fixed, min_params, max_params, ceiling)
        if stage != "coarse":
            self._check_base()

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random in-band architecture.

        `coarse` and `fine` draw the structures uniformly from all in-band combinations; `coarse` then draws each
        expression slot by slot, short ones more often. `operations` makes 0 to 3 random edits on each layer of `base`.
        """
        if self.stage == "operations":
            return Architecture(tuple(self._edited(layer, rng) for layer in self.base.layers))
        structures = _from_ids(self.band.sample(rng))
        if self.stage == "fine":
            return self.base.with_structures(structures)
        return Architecture(tuple(random_expression(structure, rng) for structure in structures))

    def extreme(self, largest: bool) -> Architecture:
        """An in-band architecture of `fine` with the most parameters, or with the fewest, that the ceiling admits."""
        if self.stage != "fine":
            raise ValueError(f"stage {self.stage}: only fine has one expression a layer to give structures to")
        return self.base.with_structures(_from_ids(self.band.extreme(largest)))

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """One layer changed: an op replaced, inserted or deleted, or the structure swapped, as the stage allows.

        The result is valid, in the band and has another key. Where the band admits no swap in a single layer, `fine`
        draws all structures anew; ValueError where the band holds this one architecture only.
        """
        self._check_belongs(architecture, "architecture")
        if self.stage == "fine":
            return self._swap_structure(architecture, rng) or self._redraw_structures(architecture, rng)
        if self.stage == "coarse" and rng.random() < 0.25:
            swapped = self._swap_structure(architecture, rng)
            if swapped:
                return swapped
        index = int(rng.integers(self.num_layers))
        layers = list(architecture.layers)
        layers[index] = mutate_expression(layers[index], rng)
        return Architecture(tuple(layers))

    def encode(self, architecture: Architecture) -> np.ndarray:
        """float32 [num_layers × 20] published node ids of each layer's canonical form, -1 where it is shorter.

        `coarse` numbers the 16 linears apart, `operations` has one. `fine`: [num_layers] ids of the structures, 0 to 15
        in the order 1_1, 1_2, ..., 4_4.
        """
        if self.stage == "fine":
            return np.array(_to_ids(architecture.structures), dtype=np.float32)
        layers = [layer.canonical() for layer in architecture.layers]
        if self.stage == "operations":
            layers = [layer.without_structure() for layer in layers]
        return np.array([layer.prefix_ids(ENCODING_LENGTH) for layer in layers], dtype=np.float32).ravel()

    def key(self, architecture: Architecture) -> str:
        """Canonical text: `add(a,b)` and `add(b,a)` are one candidate."""
        return architecture.key

    def _edited(self, layer: Expression, rng: np.random.Generator) -> Expression:
        for _ in range(rng.integers(_MAX_EDITS + 1)):
            layer = mutate_expression(layer, rng)
        return layer

    def _swap_structure(self, architecture: Architecture, rng: np.random.Generator) -> Architecture | None:
        swaps = self.band.swaps(_to_ids(architecture.structures))
        return architecture.with_structures(_from_ids(swaps[rng.integers(len(swaps))])) if swaps else None

    def _redraw_structures(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        return architecture.with_structures(
            _from_ids(self.band.sample(rng, other_than=_to_ids(architecture.structures)))
        )

    def _check_base(self) -> None:
        if self.base is None:
            raise ValueError(f"stage {self.stage} starts from the winner of the stage before it; base is missing")
        for number, layer in enumerate(self.base.layers, start=1):
            layer.check()
            if self.stage == "operations" and len(layer.nodes) > MAX_NODES:
                raise ValueError(
                    f"base, layer {number}: {len(layer.nodes)} nodes, the search takes {MAX_NODES} at most"
                )
        if self.stage == "operations":
            self._check_belongs(self.base, "base")
        elif len(self.base.layers) != self.num_layers:
            raise ValueError(f"base has {len(self.base.layers)} layers, this space {self.num_layers}")

    def _check_belongs(self, architecture: Architecture, what: str) -> None:
        if len(architecture.layers) != self.num_layers:
            raise ValueError(f"{what} has {len(architecture.layers)} layers, this space {self.num_layers}")
        total = self.band.total(_to_ids(architecture.structures))
        if not self.band.low <= total <= self.band.high:
            raise ValueError(
                f"{what} has {total:,} parameters, outside the band {self.band.low:,} to {self.band.high:,}"
            )
        if not self.band.allows(_to_ids(architecture.structures)):
            raise ValueError(
                f"{what} takes more than the {self.max_flops:,} FLOPs at {self.length} tokens that are allowed"
            )


@dataclass(frozen=True)
class Ceiling:
    """A second sum over a choice, and its upper end: `fixed` plus one of `costs` a layer is at most `most`."""

    costs: tuple[int, ...]
    fixed: int
    most: int
    what: str


def flops_ceiling(dims: Dimensions, num_layers: int, length: int, most: int) -> Ceiling:
    """FLOPs of a text of `length` tokens, as `count_flops` totals them."""
    counted = [count_flops(Architecture.uniform(structure, num_layers), dims, length) for structure in STRUCTURES]
    costs = tuple(flops.mlp[0] for flops in counted)
    return Ceiling(costs, counted[0].total - num_layers * costs[0], most, f"FLOPs at {length} tokens")


class Band:
    """All ways to give each of `num_layers` layers one of `costs` so that `fixed` plus the sum lies in [low, high].

    The choices are tuples of indices into `costs`, one a layer, ranked in lexicographic order, so that a rank can be
    drawn; `count` says how many there are. A ceiling leaves out some of them: draws go on until one is below it. Raises
    ValueError where there are none, with the nearest sums.
    """

    def __init__(
        self, costs: tuple[int, ...], num_layers: int, fixed: int, low: int, high: int, ceiling: Ceiling | None = None
    ):
        if low > high:
            raise ValueError(f"the band's lower end {low:,} lies above its upper end {high:,}; swap them")
        self.costs, self.num_layers, self.fixed, self.low, self.high = costs, num_layers, fixed, low, high
        self.ceiling = ceiling
        self._sums: list[np.ndarray] = []
        self._ways_below: list[list[int]] = []
        ways = {0: 1}
        for _ in range(num_layers + 1):
            self._remember(ways)
            ways = self._one_layer_more(ways)
        self.count = self._completions(fixed, num_layers)
        if not self.count:
            raise ValueError(self._why_empty())
        if ceiling is not None:
            least = min(other for other, _ in self._lightest().values())
            if least > ceiling.most:
                raise ValueError(
                    f"no architecture of {low:,} to {high:,} parameters has at most {ceiling.most:,} {ceiling.what}: "
                    f"the nearest has {least:,}"
                )
            self.sample(np.random.default_rng(0))  # so few may be left that draws do not find them: said now

    def allows(self, choice: tuple[int, ...]) -> bool:
        """Whether a choice is below the ceiling."""
        ceiling = self.ceiling
        return ceiling is None or ceiling.fixed + sum(ceiling.costs[i] for i in choice) <= ceiling.most

    def _lightest(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """For every sum in the band, of the choices that have it the smallest second sum, and one that has that."""
        second = self.ceiling.costs if self.ceiling else (0,) * len(self.costs)
        found = {self.fixed: (self.ceiling.fixed if self.ceiling else 0, ())}
        for _ in range(self.num_layers):
            more: dict[int, tuple[int, tuple[int, ...]]] = {}
            for total, (other, choice) in found.items():
                for index, (cost, add) in enumerate(zip(self.costs, second, strict=True)):
                    there = more.get(total + cost)
                    if there is None or other + add < there[0]:
                        more[total + cost] = other + add, (*choice, index)
            found = more
        return {total: value for total, value in found.items() if self.low <= total <= self.high}

    def total(self, choice: tuple[int, ...]) -> int:
        """The sum of a choice, `fixed` included."""
        return self.fixed + sum(self.costs[i] for i in choice)

    def sample(self, rng: np.random.Generator, other_than: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A uniformly drawn choice, or one drawn uniformly from all but `other_than` (itself in the band)."""
        for _ in range(MAX_DRAWS):
            choice = self._draw(rng, other_than)
            if self.allows(choice):
                return choice
        raise ValueError(
            f"{MAX_DRAWS:,} draws from {self.low:,} to {self.high:,} parameters gave none with at most "
            f"{self.ceiling.most:,} {self.ceiling.what}: raise one of them"
        )

    def _draw(self, rng: np.random.Generator, other_than: tuple[int, ...] | None) -> tuple[int, ...]:
        if other_than is None:
            return self.choice(_random_below(self.count, rng))
        if self.count == 1:
            raise ValueError(f"the band {self.low:,} to {self.high:,} holds one choice of structures only; widen it")
        rank = _random_below(self.count - 1, rng)
        return self.choice(rank + (rank >= self.rank(other_than)))

    def extreme(self, largest: bool) -> tuple[int, ...]:
        """A choice with the largest or the smallest sum in the band that has one below the ceiling."""
        most = self.ceiling.most if self.ceiling else 0
        below = {total: choice for total, (other, choice) in self._lightest().items() if other <= most}
        return below[max(below) if largest else min(below)]

    def swaps(self, choice: tuple[int, ...]) -> list[tuple[int, ...]]:
        """All choices in the band, below its ceiling, that differ from this one in exactly one layer."""
        total, found = self.total(choice), []
        for layer, old in enumerate(choice):
            for new, cost in enumerate(self.costs):
                swapped = (*choice[:layer], new, *choice[layer + 1 :])
                if new != old and self.low <= total - self.costs[old] + cost <= self.high and self.allows(swapped):
                    found.append(swapped)
        return found

    def choice(self, rank: int) -> tuple[int, ...]:
        """The choice of this rank, 0 to `count` - 1."""
        total, chosen = self.fixed, []
        for left in reversed(range(self.num_layers)):
            index = 0
            while rank >= (ways := self._completions(total + self.costs[index], left)):
                rank -= ways
                index += 1
            chosen.append(index)
            total += self.costs[index]
        return tuple(chosen)

    def rank(self, choice: tuple[int, ...]) -> int:
        """The inverse of `choice`."""
        total, rank = self.fixed, 0
        for left, index in zip(reversed(range(self.num_layers)), choice, strict=True):
            rank += sum(self._completions(total + cost, left) for cost in self.costs[:index])
            total += self.costs[index]
        return rank

    def _remember(self, ways: dict[int, int]) -> None:
        sums = sorted(ways)
        below = [0]
        for one in sums:
            below.append(below[-1] + ways[one])
        self._sums.append(np.array(sums))
        self._ways_below.append(below)

    def _one_layer_more(self, ways: dict[int, int]) -> dict[int, int]:
        more: dict[int, int] = {}
        for total, number in ways.items():
            for cost in self.costs:
                more[total + cost] = more.get(total + cost, 0) + number
        return more

    def _completions(self, total: int, layers_left: int) -> int:
        sums, below = self._sums[layers_left], self._ways_below[layers_left]
        first = np.searchsorted(sums, self.low - total, side="left")
        last = np.searchsorted(sums, self.high - total, side="right")
        return max(0, below[last] - below[first])

    def _why_empty(self) -> str:
        reachable = self._sums[-1] + self.fixed
        under, over = reachable[reachable < self.low], reachable[reachable > self.high]
        nearest = [f"{side[at]:,}" for side, at in ((under, -1), (over, 0)) if len(side)]
        return (
            f"no architecture has {self.low:,} to {self.high:,} parameters: at these sizes they go from "
            f"{reachable[0]:,} to {reachable[-1]:,}, the nearest to the band {' and '.join(nearest)}"
        )


def random_expression(structure: Structure, rng: np.random.Generator) -> Expression:
    """A random valid expression of height 3 to 7 and at most 20 nodes, short ones more often.

    The height beyond the two linears is dealt out to the slots, at least one to the middle. A slot grows from its input
    upwards by an activation, or by add, mul or max with x or an activation of x.
    """
    height = int(rng.choice(np.arange(MIN_HEIGHT, MAX_HEIGHT + 1), p=_HEIGHT_WEIGHTS))
    pre, mid, post = rng.multinomial(height - 3, [1 / 3] * 3)
    tree = _grow(Node("x"), pre, rng)
    tree = _grow(Node(LINEAR, (tree, Node("wb1")), structure), mid + 1, rng)
    return Expression(_grow(Node(LINEAR, (tree, Node("wb2")), structure), post, rng))


def mutate_expression(expression: Expression, rng: np.random.Generator) -> Expression:
    """One op of a valid expression replaced, inserted or deleted; valid, at most 20 nodes, and with another key."""
    for kind in rng.permutation(len(_EDITS)):
        candidates = list(_EDITS[kind](expression.root))
        for index in rng.permutation(len(candidates)):
            edited = Expression(candidates[index]())
            if len(edited.nodes) <= MAX_NODES and edited.is_valid:
                return edited
    raise ValueError(f"{expression} has no valid neighbour; only a valid expression has one")


def _grow(tree: Node, height: int, rng: np.random.Generator) -> Node:
    """`tree` with ops on top that add exactly `height`; each adds at most 3 nodes, which keeps to MAX_NODES."""
    while height > 0:
        binary_adds = 2 if tree.op == "x" else 1
        may_activate = tree.op not in ACTIVATIONS
        if may_activate and (height < binary_adds or rng.random() < _ACTIVATION_RATE):
            tree = Node(_pick(ACTIVATIONS, rng), (tree,))
            height -= 1
        else:
            pair = [tree, _operand(tree, rng)]
            rng.shuffle(pair)
            tree = Node(_pick(BINARY, rng), tuple(pair))
            height -= binary_adds
    return tree


def _operand(tree: Node, rng: np.random.Generator) -> Node:
    if tree.op != "x" and rng.random() < _PLAIN_OPERAND_RATE:
        return Node("x")
    return _pick([node for node in _activations_of_x() if node != tree], rng)


def _activations_of_x() -> list[Node]:
    return [Node(op, (Node("x"),)) for op in ACTIVATIONS]


Edit = Callable[[], Node]


def _replacements(root: Node) -> Iterator[Edit]:
    for node, rebuild in _places(root):
        family = next((ops for ops in (ACTIVATIONS, BINARY) if node.op in ops), ())
        for op in family:
            if op != node.op:
                yield lambda rebuild=rebuild, op=op, node=node: rebuild(Node(op, node.args))


def _insertions(root: Node) -> Iterator[Edit]:
    for node, rebuild in _places(root):
        wrapped = [(op, (node,)) for op in ACTIVATIONS]
        wrapped += [(op, (node, other)) for op in BINARY for other in (Node("x"), *_activations_of_x())]
        for op, args in wrapped:
            yield lambda rebuild=rebuild, op=op, args=args: rebuild(Node(op, args))


def _deletions(root: Node) -> Iterator[Edit]:
    for node, rebuild in _places(root):
        if node.op != LINEAR:
            for arg in node.args:
                yield lambda rebuild=rebuild, arg=arg: rebuild(arg)


_EDITS = (_replacements, _insertions, _deletions)


def _places(node: Node, rebuild: Callable[[Node], Node] = lambda new: new) -> Iterator[tuple[Node, Callable]]:
    """Every data node with a function that gives the whole tree with another node in its place."""
    yield node, rebuild
    for index, arg in enumerate(node.args[:1] if node.op == LINEAR else node.args):

        def inner(new: Node, node=node, index=index) -> Node:
            args = (*node.args[:index], new, *node.args[index + 1 :])
            return rebuild(Node(node.op, args, node.structure))

        yield from _places(arg, inner)


def _pick(options, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def _random_below(limit: int, rng: np.random.Generator) -> int:
    """A whole number from 0 to limit - 1 for limits of any size; 64 spare bits make the bias immeasurable."""
    return int.from_bytes(rng.bytes(limit.bit_length() // 8 + 9), "little") % limit


def _to_ids(structures: tuple[Structure, ...]) -> tuple[int, ...]:
    return tuple(STRUCTURES.index(structure) for structure in structures)


def _from_ids(ids: tuple[int, ...]) -> tuple[Structure, ...]:
    return tuple(STRUCTURES[i] for i in ids)
