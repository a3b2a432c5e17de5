"""The published search's proposals and its sampler, as the released code has them: for --preset paper, beside ours.

Proposals come from genetic programming. Stages 1 and 2 change each layer on its own: a subtree of an MLP becomes a
random one, a node another of its kind, and an op goes in somewhere. Whatever that gives is checked; one in hundreds is
an MLP, and after so many that are none the layer stays as it was. Stage 3 draws a structure for each layer.

The sampler splits what was evaluated at its median, the better half at its own, and so on, and learns at each split to
tell the halves apart by gradient-boosted trees over the node ids, which are read as quantities. Proposals are drawn
until all the trees call one good: there is no exploration term, and the better side of every split is taken.

Facts are those of the released code. Not so here: the trees are scikit-learn's, which have none of LightGBM's bagging,
L1 penalty and least weight of a leaf to be tuned, and are tried with 20 seeds at most; a changed MLP keeps its
structure and has 20 nodes at most; everything lies in the band, also what comes first, where the released code gives
the band up after 1,000 or, in stage 3, 10,000 draws; and equal proposals are told by their canonical text, not by what
they compute from fixed numbers.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from effbert.architecture import Architecture
from effbert.kernels.expression import ACTIVATIONS, BINARY, LEAVES, LINEAR, STRUCTURES, Expression, Node, Structure
from effbert.search.partition import PartitionSampler, split_at_median
from effbert.search.space import MAX_NODES, ArchitectureSpace, Band

TRIES = {"coarse": 1000, "operations": 400}  # changes of a layer before it stays as it was
SUBTREE_HEIGHT = 3
SPLITS = (400, 800, 1600, 3200)  # one split up to so many evaluations, two up to the next, ...
DRAWS = 20_000  # for a proposal that all trees call good
DRAWN_AT_ONCE = 16
TREES = 100
SETTINGS = 10  # of the trees, that are tried
HELD_OUT = 0.2
LEAF_ROWS = 20  # of a tree, at least
FITS = 20  # until trees are right more often than wrong


class ReleasedSpace(ArchitectureSpace):
    """`ArchitectureSpace` with the published draws; all else is the same."""

    @property
    def first(self) -> tuple[Architecture, ...]:
        """What is evaluated before anything is drawn, as far as the band admits it: plain MLPs of structure 1_1 in
        stage 1; the base, then plain MLPs of its structures in stage 2; the base in stage 3."""
        if self.stage == "coarse":
            found = [Architecture.uniform(STRUCTURES[0], self.num_layers)]
        else:
            found = [self.base] if self.stage == "fine" else [self.base, self._plain(self.base.structures)]
        return tuple(architecture for architecture in found if self.holds(architecture))

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random in-band architecture.

        `coarse` draws the structures uniformly from all in-band combinations and changes the plain MLPs of them;
        `operations` changes in each layer the base's MLP or the plain one; `fine` takes for each layer the base's own
        structure or one of the 16, each of these 17 as often among what the band holds.
        """
        if self.stage == "fine":
            return self.base.with_structures([STRUCTURES[index] for index in self._weighted_band.sample(rng)])
        draw = random.Random(int(rng.integers(2**63)))
        if self.stage == "coarse":
            sources = [(layer,) for layer in self._plain(self.drawn_structures(rng)).layers]
        else:
            sources = zip(self.base.layers, self._plain(self.base.structures).layers, strict=True)
        return Architecture(tuple(changed(draw.choice(source), self.stage, draw) for source in sources))

    @cached_property
    def _weighted_band(self) -> Band:
        """The band, in which the base's structure counts twice in its layer."""
        band = self.band
        weights = tuple(tuple(1 + (one == own) for one in STRUCTURES) for own in self.base.structures)
        return Band(band.costs, band.num_layers, band.fixed, band.low, band.high, band.ceiling, weights)

    def _plain(self, structures: Sequence[Structure]) -> Architecture:
        return Architecture.uniform(STRUCTURES[0], self.num_layers).with_structures(structures)


class ReleasedSampler(PartitionSampler):
    """The `first` architectures of a ReleasedSpace and random ones until `initial` have a value; then draws of the
    space that all the trees call good, learned anew every `refit_every` values. Below 50 values there are no trees, and
    every draw is good."""

    def _propose(self, rng: np.random.Generator) -> Architecture:
        for architecture in self.space.first if isinstance(self.space, ReleasedSpace) else ():
            if architecture not in self.seen:
                return architecture
        return super()._propose(rng)

    def _fit(self, codes: np.ndarray, values: np.ndarray) -> list["Trees"]:
        splits, members = [], np.arange(len(values))
        for _ in range(1 + np.searchsorted(SPLITS, len(values))):
            good = split_at_median(values[members])
            if good.all():
                break
            splits.append(Trees(codes[members], good))
            members = members[good]
        return splits

    def _from_model(self, rng: np.random.Generator) -> Architecture:
        splits, unseen = self._refitted(), None
        for _ in range(DRAWS // DRAWN_AT_ONCE):
            drawn = [self.space.sample(rng) for _ in range(DRAWN_AT_ONCE)]
            codes = np.array([np.asarray(self.space.encode(one)).ravel() for one in drawn])
            good = np.logical_and.reduce([trees(codes) for trees in splits]) if splits else np.ones(len(drawn), bool)
            for architecture, taken in zip(drawn, good, strict=True):
                if architecture not in self.seen:
                    if taken:
                        return architecture
                    unseen = architecture if unseen is None else unseen
        return self._sample_new(rng) if unseen is None else unseen


class Trees:
    """Gradient-boosted trees that tell `good` [N] from the rest by codes [N, D]; called, bool [M] for codes [M, D].

    Ten random settings are tried, always the same ones, with a fifth of the rows held out. The setting and the number
    of trees with the fewest errors there are taken, and other seeds tried while half of these rows or more are wrong.
    Where the other rows are too few for two leaves, or of one kind, everything is called good.
    """

    def __init__(self, codes: np.ndarray, good: np.ndarray):
        from sklearn.model_selection import train_test_split

        self.error, self._model = 1.0, None
        rows, held_out = train_test_split(np.arange(len(good)), test_size=HELD_OUT, random_state=1)
        if len(rows) < 2 * LEAF_ROWS or len(set(good[rows])) < 2:
            return
        for seed in range(FITS):
            for settings in _settings():
                self._try(settings | {"random_state": seed}, codes, good, rows, held_out)
            if self.error < 0.5:
                break

    def _try(self, settings: dict, codes: np.ndarray, good: np.ndarray, rows: np.ndarray, held_out: np.ndarray) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        def fitted(trees: int):
            return HistGradientBoostingClassifier(
                max_iter=trees, min_samples_leaf=LEAF_ROWS, early_stopping=False, **settings
            ).fit(codes[rows], good[rows])

        stages = fitted(TREES).staged_predict(codes[held_out])
        errors = [np.mean(predicted != good[held_out]) for predicted in stages]
        if min(errors) < self.error:
            self.error, self._model = min(errors), fitted(1 + int(np.argmin(errors)))

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        return np.ones(len(codes), bool) if self._model is None else self._model.predict(codes)


def _settings() -> Iterator[dict]:
    rng = np.random.default_rng(1)
    for _ in range(SETTINGS):
        depth = int(rng.integers(1, 7))
        yield {
            "learning_rate": float(np.exp(rng.uniform(np.log(0.01), np.log(0.5)))),
            "max_depth": None if depth == 1 else depth,
            "max_leaf_nodes": int(rng.integers(10, 201)),
            "max_features": float(rng.integers(5, 11)) / 10,
            "l2_regularization": float(rng.uniform(0, 2)),
        }


def changed(layer: Expression, stage: str, draw: random.Random) -> Expression:
    """The MLP `layer` after one random change that leaves it an MLP of its structure, or as it was.

    In stage 1 ("coarse") the 16 linears are as many ops, in stage 2 ("operations") they are one.
    """
    bare = stage == "operations"
    linears = [LINEAR] if bare else [f"{LINEAR}{structure}" for structure in STRUCTURES]
    ops = [*linears, *BINARY, *ACTIVATIONS]
    names = [node.name for node in (layer.without_structure() if bare else layer).nodes]
    for _ in range(TRIES[stage]):
        found = mlp_of(mutated(names, ops, draw))
        if found is not None and (bare or found.structure == layer.structure):
            return found.with_structure(layer.structure)
    return layer


def mutated(names: list[str], ops: Sequence[str], draw: random.Random) -> list[str]:
    """A tree in prefix order after the published changes, one after the other, whether or not it is an MLP still.

    A subtree, drawn by its root, is replaced by a full one of height 0 to 3; a node but the root by one of as many
    arguments; and above a drawn node goes an op, with leaves for its other arguments.
    """
    at = draw.randrange(len(names))
    names = [*names[:at], *_full(draw.randint(0, SUBTREE_HEIGHT), ops, draw), *names[_end(names, at) :]]
    if len(names) > 1:
        at = draw.randrange(1, len(names))
        kind = [op for op in ops if _arity(op) == _arity(names[at])] or LEAVES
        names[at] = draw.choice(kind)
    at = draw.randrange(len(names))
    op = draw.choice(ops)
    args = [[draw.choice(LEAVES)] for _ in range(_arity(op))]
    args[draw.randrange(len(args))] = names[at : _end(names, at)]
    return [*names[:at], op, *(name for arg in args for name in arg), *names[_end(names, at) :]]


def mlp_of(names: Sequence[str]) -> Expression | None:
    """The valid expression that a tree in prefix order is, or None."""
    linears = [name for name in names if name.startswith(LINEAR)]
    if len(names) > MAX_NODES or len(linears) != 2 or names.count("wb1") != 1 or names.count("wb2") != 1:
        return None
    expression = Expression(_node(iter(names)))
    return expression if expression.is_valid else None


def _node(names: Iterator[str]) -> Node:
    name = next(names)
    args = tuple(_node(names) for _ in range(_arity(name)))
    if name.startswith(LINEAR) and name != LINEAR:
        return Node(LINEAR, args, Structure.parse(name.removeprefix(LINEAR)))
    return Node(name, args)


def _full(height: int, ops: Sequence[str], draw: random.Random) -> list[str]:
    """A random tree all of whose leaves lie at `height`."""
    if not height:
        return [draw.choice(LEAVES)]
    op = draw.choice(ops)
    return [op, *(name for _ in range(_arity(op)) for name in _full(height - 1, ops, draw))]


def _end(names: Sequence[str], at: int) -> int:
    """One past the subtree that begins at `at`."""
    missing = 1
    while missing:
        missing += _arity(names[at]) - 1
        at += 1
    return at


def _arity(name: str) -> int:
    return 0 if name in LEAVES else 1 if name in ACTIVATIONS else 2
