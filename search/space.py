"""The three search spaces: which architectures a stage may visit, how to draw, change and encode one.

The one idea: parameters and FLOPs depend on the linear structures alone and add up over layers, so a table of how many
ways the remaining layers can end within the limits ranks every choice of structures. Drawing one is drawing its rank:
exactly uniform, never by trial. Expressions are built slot by slot in the grammar, so that they are valid by
construction.
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
Sums = tuple[int, int]  # of parameters and FLOPs, or of any two costs

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
        structures = self.drawn_structures(rng)
        if self.stage == "fine":
            return self.base.with_structures(structures)
        return Architecture(tuple(random_expression(structure, rng) for structure in structures))

    def drawn_structures(self, rng: np.random.Generator) -> tuple[Structure, ...]:
        """The structures of a random architecture, uniform over all in-band combinations."""
        return _from_ids(self.band.sample(rng))

    def holds(self, architecture: Architecture) -> bool:
        """Whether its structures lie in the band and below its ceiling."""
        choice = _to_ids(architecture.structures)
        return self.band.low <= self.band.total(choice) <= self.band.high and self.band.allows(choice)

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
    """All ways to give each of `num_layers` layers one of `costs` so that `fixed` plus the sum lies in [low, high], and
    the second sum below a ceiling's end.

    The choices are tuples of indices into `costs`, one a layer, ranked in lexicographic order, so that a rank can be
    drawn; `count` says how many there are. With `weights`, whole numbers for each layer and cost, each choice counts as
    often as the product of its own says, and is drawn as often; `rank` is for a band without. Raises ValueError where
    there are none, with the nearest sums.
    """

    def __init__(
        self,
        costs: tuple[int, ...],
        num_layers: int,
        fixed: int,
        low: int,
        high: int,
        ceiling: Ceiling | None = None,
        weights: tuple[tuple[int, ...], ...] | None = None,
    ):
        if low > high:
            raise ValueError(f"the band's lower end {low:,} lies above its upper end {high:,}; swap them")
        self.costs, self.num_layers, self.fixed, self.low, self.high = costs, num_layers, fixed, low, high
        self.ceiling = ceiling or Ceiling((0,) * len(costs), 0, 0, "")
        self._steps = tuple(zip(costs, self.ceiling.costs, strict=True))
        self._weights = weights or ((1,) * len(costs),) * num_layers
        reached = self._reached()
        self._ways = self._completions(reached)  # by layers chosen: pair of sums -> ways to choose the others
        self.count = self._ways[0].get(self._start, 0)
        if not self.count:
            raise ValueError(self._why_empty(reached[-1]))

    @property
    def _start(self) -> Sums:
        return self.fixed, self.ceiling.fixed

    def _reached(self) -> list[set[Sums]]:
        """The pairs of sums that so many layers can give, for every number of layers."""
        reached = [{self._start}]
        for _ in range(self.num_layers):
            reached.append({self._after(sums, step) for sums in reached[-1] for step in self._steps})
        return reached

    def _completions(self, reached: list[set[Sums]]) -> list[dict[Sums, int]]:
        """For every number of layers and pair of sums, in how many ways the layers left end in the band; pairs from
        which none does are left out."""
        ways = [{sums: 1 for sums in reached[-1] if self._holds(sums)}]
        for before, weights in zip(reversed(reached[:-1]), reversed(self._weights), strict=True):
            then, weighted = ways[-1], tuple(zip(weights, self._steps, strict=True))
            found = {sums: sum(w * then.get(self._after(sums, step), 0) for w, step in weighted) for sums in before}
            ways.append({sums: number for sums, number in found.items() if number})
        return ways[::-1]

    @staticmethod
    def _after(sums: Sums, step: Sums) -> Sums:
        return sums[0] + step[0], sums[1] + step[1]

    def _holds(self, sums: Sums) -> bool:
        return self.low <= sums[0] <= self.high and sums[1] <= self.ceiling.most

    def total(self, choice: tuple[int, ...]) -> int:
        """The sum of a choice, `fixed` included."""
        return self.fixed + sum(self.costs[i] for i in choice)

    def allows(self, choice: tuple[int, ...]) -> bool:
        """Whether a choice is below the ceiling."""
        return self.ceiling.fixed + sum(self.ceiling.costs[i] for i in choice) <= self.ceiling.most

    def sample(self, rng: np.random.Generator, other_than: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A uniformly drawn choice, or one drawn uniformly from all but `other_than` (itself in the band)."""
        if other_than is None:
            return self.choice(_random_below(self.count, rng))
        if self.count == 1:
            raise ValueError(
                f"the band {self.low:,} to {self.high:,}{self._and_below()} holds one choice of structures only; "
                "widen it"
            )
        rank = _random_below(self.count - 1, rng)
        return self.choice(rank + (rank >= self.rank(other_than)))

    def extreme(self, largest: bool) -> tuple[int, ...]:
        """The first choice with the largest or the smallest sum in the band that has one below the ceiling; of those
        with one of the smallest second sum."""
        ends = self._ways[-1]
        end = max(ends, key=lambda sums: (sums[0], -sums[1])) if largest else min(ends)
        leads = [{end}]
        for before in reversed(self._ways[:-1]):
            leads.append({sums for sums in before if any(self._after(sums, step) in leads[-1] for step in self._steps)})
        sums, chosen = self._start, []
        for then in leads[-2::-1]:
            index = next(i for i, step in enumerate(self._steps) if self._after(sums, step) in then)
            chosen.append(index)
            sums = self._after(sums, self._steps[index])
        return tuple(chosen)

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
        sums, chosen = self._start, []
        for then, weights in zip(self._ways[1:], self._weights, strict=True):
            index = 0
            while rank >= (ways := weights[index] * then.get(self._after(sums, self._steps[index]), 0)):
                rank -= ways
                index += 1
            rank //= weights[index]
            chosen.append(index)
            sums = self._after(sums, self._steps[index])
        return tuple(chosen)

    def rank(self, choice: tuple[int, ...]) -> int:
        """The inverse of `choice`."""
        sums, rank = self._start, 0
        for then, index in zip(self._ways[1:], choice, strict=True):
            rank += sum(then.get(self._after(sums, step), 0) for step in self._steps[:index])
            sums = self._after(sums, self._steps[index])
        return rank

    def _and_below(self) -> str:
        return f" with at most {self.ceiling.most:,} {self.ceiling.what}" if self.ceiling.what else ""

    def _why_empty(self, ends: set[Sums]) -> str:
        others = [other for total, other in ends if self.low <= total <= self.high]
        if others:
            return (
                f"no architecture of {self.low:,} to {self.high:,} parameters has at most {self.ceiling.most:,} "
                f"{self.ceiling.what}: the nearest has {min(others):,}"
            )
        reachable = sorted({total for total, _ in ends})
        under, over = [t for t in reachable if t < self.low], [t for t in reachable if t > self.high]
        nearest = [f"{side[at]:,}" for side, at in ((under, -1), (over, 0)) if side]
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
