"""Search spaces: everything drawn or changed is valid and in the band, structures are drawn uniformly, errors help."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.architecture import Architecture, Dimensions, count_flops, count_parameters, mlp_parameters
from effbert.kernels.expression import ACTIVATIONS, STRUCTURES, Expression
from effbert.random import generator
from effbert.search.space import MAX_NODES, ArchitectureSpace, Band, Ceiling, mutate_expression, random_expression

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "params.json").read_text(encoding="utf-8"))
WINNER = Architecture.parse(FIXTURE["archs"]["released_FFN_EXPR"]["auto_bert"]["exprs"])
SMALL = Dimensions(vocab_size=100, embedding_size=8, hidden_size=12, intermediate_size=12, num_attention_heads=2)
LOW, HIGH = 15_000_000, 16_000_000

SPACES = {
    stage: ArchitectureSpace(stage, Dimensions(), 6, LOW, HIGH, None if stage == "coarse" else WINNER)
    for stage in ("coarse", "operations", "fine")
}
seeds = st.integers(0, 2**32 - 1)


def brute_force(costs, num_layers, fixed, low, high):
    choices = itertools.product(range(len(costs)), repeat=num_layers)
    return [c for c in choices if low <= fixed + sum(costs[i] for i in c) <= high]


def assert_in_space(architecture, stage):
    total = count_parameters(architecture, Dimensions()).total_with_projection
    assert LOW <= total <= HIGH and len(architecture.layers) == 6
    for layer, base in zip(architecture.layers, WINNER.layers, strict=True):
        layer.check()
        assert len(layer.nodes) <= MAX_NODES
        if stage == "operations":
            assert layer.structure == base.structure
        if stage == "fine":
            assert layer.without_structure() == base.without_structure()


@pytest.mark.parametrize("stage", SPACES)
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_samples_and_mutations_stay_in_the_space_and_mutations_are_new(stage, seed):
    space, rng = SPACES[stage], generator(seed, "space")
    architecture = space.sample(rng)
    assert_in_space(architecture, stage)
    for _ in range(4):
        changed = space.mutate(architecture, rng)
        assert_in_space(changed, stage)
        assert space.key(changed) != space.key(architecture)
        assert sum(a != b for a, b in zip(changed.layers, architecture.layers, strict=True)) == 1
        architecture = changed


@settings(max_examples=200, deadline=None)
@given(seed=seeds, structure=st.sampled_from(STRUCTURES))
def test_random_expressions_are_valid_and_short_enough(seed, structure):
    expression = random_expression(structure, generator(seed, "expression"))
    assert expression.check().structure == structure
    assert len(expression.nodes) <= MAX_NODES


@settings(max_examples=100, deadline=None)
@given(seed=seeds, steps=st.integers(1, 12))
def test_chains_of_edits_stay_valid(seed, steps):
    rng = generator(seed, "edits")
    expression = random_expression(STRUCTURES[5], rng)
    for _ in range(steps):
        edited = mutate_expression(expression, rng)
        assert edited.check().structure == STRUCTURES[5]
        assert len(edited.nodes) <= MAX_NODES and edited.key != expression.key
        expression = edited


def test_random_expressions_cover_heights_slots_and_favour_short_ones():
    rng = generator(0, "cover")
    drawn = [random_expression(STRUCTURES[0], rng) for _ in range(1500)]
    heights = Counter(expression.height for expression in drawn)
    assert set(heights) == {3, 4, 5, 6, 7} and heights[3] + heights[4] > len(drawn) / 2
    slots = [expression.slots() for expression in drawn]
    for name, placeholder in (("pre", "x"), ("mid", "h"), ("post", "y")):
        assert any(str(getattr(s, name)) != placeholder for s in slots)
    assert {node.op for expression in drawn for node in expression.nodes} == {
        *("add", "mul", "max", "gelu", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "swish"),
        *("linear", "x", "wb1", "wb2"),
    }


def test_every_shape_of_the_published_winners_is_drawn():
    def shape(expression):
        text = re.sub(rf"\b({'|'.join(ACTIVATIONS)})\b", "activation", expression.without_structure().key)
        return re.sub("add|mul|max", "binary", text)

    rng = generator(0, "winners")
    assert {shape(layer) for layer in WINNER.layers} <= {
        shape(random_expression(STRUCTURES[0], rng)) for _ in range(1500)
    }


def test_mutation_replaces_inserts_and_deletes():
    rng = generator(0, "kinds")
    start = Expression.parse("tanh(linear1_1(gelu(linear1_1(max(x,tanh(x)),wb1)),wb2))")
    sizes = Counter(np.sign(len(mutate_expression(start, rng).nodes) - len(start.nodes)) for _ in range(200))
    assert set(sizes) == {-1, 0, 1}


def test_coarse_mutation_changes_structures_and_ops():
    space, rng = SPACES["coarse"], generator(0, "coarse")
    changes = Counter(space.mutate(WINNER, rng).structures != WINNER.structures for _ in range(100))
    assert changes[True] and changes[False]


def test_the_published_space_has_its_published_number_of_feasible_choices():
    published = {"embed_fit_dense": 48088, "attn": 11696}  # units of 100 parameters, as its own table rounds them
    table = [round(FIXTURE["parts"]["auto_bert"][str(s)] / 100) for s in STRUCTURES]
    rounded = Band(tuple(table), 6, published["embed_fit_dense"] + 6 * published["attn"], 150_000, 160_000)
    assert rounded.count == 4_480_424
    assert SPACES["coarse"].band.count == SPACES["fine"].band.count == 4_480_424


@pytest.mark.parametrize(("low", "high"), [(0, 10**9), (9_000, 11_000), (10_000, 10_000), (9_999, 10_123)])
def test_counting_ranking_and_unranking_agree_with_brute_force(low, high):
    costs = tuple(mlp_parameters(structure, SMALL) for structure in STRUCTURES)
    expected = brute_force(costs, 3, 6000, low, high)
    if not expected:
        with pytest.raises(ValueError, match="no architecture has"):
            Band(costs, 3, 6000, low, high)
        return
    band = Band(costs, 3, 6000, low, high)
    assert band.count == len(expected)
    every = max(1, band.count // 300)
    assert [band.choice(rank) for rank in range(0, band.count, every)] == expected[::every]
    assert [band.rank(choice) for choice in expected[::every]] == list(range(0, band.count, every))


def test_the_ends_of_the_band_are_in_it():
    costs = (3, 5, 9)
    sums = sorted(Counter(sum(c) for c in itertools.product(costs, repeat=2)))
    for total in sums:
        assert Band(costs, 2, 0, total, total).count == sum(sum(c) == total for c in itertools.product(costs, repeat=2))


def test_structures_are_drawn_uniformly():
    band, rng = Band((1, 2, 4, 7), 3, 0, 6, 9), generator(3, "uniform")
    expected = brute_force(band.costs, 3, 0, 6, 9)
    draws = 200 * len(expected)
    drawn = Counter(band.sample(rng) for _ in range(draws))
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[choice] - 200) ** 2 / 200 for choice in expected)
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_choice_can_be_excluded_without_bias():
    band, rng = Band((1, 2, 3), 2, 0, 3, 4), generator(4, "exclude")
    assert band.count == 5
    drawn = Counter(band.sample(rng, other_than=(0, 1)) for _ in range(4000))
    assert set(drawn) == set(brute_force(band.costs, 2, 0, 3, 4)) - {(0, 1)}
    assert max(drawn.values()) < 1.2 * min(drawn.values())


def test_a_ceiling_leaves_out_exactly_what_lies_above_it():
    costs, second = (1, 2, 4, 7), (5, 3, 9, 1)
    ceiling = Ceiling(second, 10, 21, "somethings")
    band, rng = Band(costs, 3, 0, 6, 9, ceiling), generator(5, "ceiling")
    expected = [c for c in brute_force(costs, 3, 0, 6, 9) if 10 + sum(second[i] for i in c) <= 21]
    assert 0 < len(expected) < len(brute_force(costs, 3, 0, 6, 9))
    drawn = Counter(band.sample(rng) for _ in range(200 * len(expected)))
    assert set(drawn) == set(expected) and max(drawn.values()) < 1.5 * min(drawn.values())
    for choice in expected:
        near = [other for other in expected if sum(a != b for a, b in zip(choice, other, strict=True)) == 1]
        assert sorted(band.swaps(choice)) == sorted(near)


def test_a_ceiling_that_nothing_is_below_names_the_nearest():
    costs, second = (1, 2, 4, 7), (5, 3, 9, 1)
    least = min(10 + sum(second[i] for i in c) for c in brute_force(costs, 3, 0, 6, 9))
    with pytest.raises(
        ValueError, match=f"of 6 to 9 parameters has at most {least - 1} somethings: the nearest has {least}"
    ):
        Band(costs, 3, 0, 6, 9, Ceiling(second, 10, least - 1, "somethings"))
    assert Band(costs, 3, 0, 6, 9, Ceiling(second, 10, least, "somethings")).count > 0


def test_the_one_choice_of_millions_below_a_ceiling_is_found():
    costs = tuple(range(1, 17))
    band = Band(costs, 6, 0, 6, 96, Ceiling(tuple(range(16, 0, -1)), 0, 6, "somethings"))  # one choice of 16**6
    assert band.count == 1 and band.sample(generator(5, "one")) == (15,) * 6 == band.extreme(True)
    with pytest.raises(ValueError, match="the band 6 to 96 with at most 6 somethings holds one choice of structures"):
        band.sample(generator(5, "other"), other_than=(15,) * 6)


@pytest.mark.parametrize("most", [19, 21, 27, 40])
def test_counting_ranking_and_extremes_below_a_ceiling_agree_with_brute_force(most):
    costs, second = (1, 2, 4, 7), (5, 3, 9, 1)
    band = Band(costs, 3, 0, 5, 10, Ceiling(second, 10, most, "somethings"))
    expected = [c for c in brute_force(costs, 3, 0, 5, 10) if 10 + sum(second[i] for i in c) <= most]
    assert [band.choice(rank) for rank in range(band.count)] == expected
    assert [band.rank(choice) for choice in expected] == list(range(len(expected)))
    for largest, end in ((True, max), (False, min)):
        found = band.extreme(largest)
        assert found in expected and band.total(found) == end(map(band.total, expected))


@pytest.mark.parametrize("stage", ["coarse", "operations", "fine"])
def test_flops_are_limited_in_every_stage(stage):
    limit = count_flops(WINNER, Dimensions(), 128).total
    base = None if stage == "coarse" else WINNER
    space = ArchitectureSpace(stage, Dimensions(), 6, LOW, HIGH, base, max_flops=limit, length=128)
    rng = generator(6, stage)
    architecture = space.sample(rng)
    for _ in range(30):
        assert count_flops(architecture, Dimensions(), 128).total <= limit
        architecture = space.mutate(architecture, rng) if rng.random() < 0.5 else space.sample(rng)
    if stage != "operations":
        free = ArchitectureSpace(stage, Dimensions(), 6, LOW, HIGH, base)
        assert any(count_flops(free.sample(rng), Dimensions(), 128).total > limit for _ in range(50))


def test_a_winner_with_too_many_flops_does_not_fit_the_next_stage():
    limit = count_flops(WINNER, Dimensions(), 128).total - 1
    with pytest.raises(ValueError, match=r"base takes more than the .* FLOPs at 128 tokens that are allowed"):
        ArchitectureSpace("operations", Dimensions(), 6, LOW, HIGH, WINNER, max_flops=limit, length=128)


def test_many_layers_are_counted_exactly():
    assert Band((1, 2), 70, 0, 70, 140).count == 2**70
    band = Band((1, 2), 70, 0, 140, 140)
    assert band.sample(generator(0, "many")) == (1,) * 70


def test_fine_mutation_redraws_where_no_single_swap_is_in_the_band():
    base = Architecture.uniform("1_1", 2).with_structures(["1_1", "1_2"])
    total = count_parameters(base, SMALL).total_with_projection
    space = ArchitectureSpace("fine", SMALL, 2, total, total, base)
    assert not space.band.swaps((0, 1)) and space.band.count > 1
    changed = space.mutate(base, generator(0, "tight"))
    assert changed.key != base.key
    assert count_parameters(changed, SMALL).total_with_projection == total


def test_fine_mutation_of_the_only_architecture_is_an_error():
    base = Architecture.uniform("1_4", 2)
    total = count_parameters(base, SMALL).total_with_projection
    space = ArchitectureSpace("fine", SMALL, 2, total, total, base)
    assert space.band.count == 1 and space.sample(generator(0)) == base
    with pytest.raises(ValueError, match="holds one choice of structures only"):
        space.mutate(base, generator(0))


def test_equal_generators_give_equal_architectures():
    for space in SPACES.values():
        assert space.sample(generator(7, "a")) == space.sample(generator(7, "a"))
        assert len({space.key(space.sample(generator(7, i))) for i in range(20)}) > 15


def test_encodings_are_the_published_ids_of_one_length():
    vectors = {stage: space.encode(WINNER) for stage, space in SPACES.items()}
    assert {stage: vector.shape for stage, vector in vectors.items()} == {
        "coarse": (120,),
        "operations": (120,),
        "fine": (6,),
    }
    assert all(vector.dtype == np.float32 for vector in vectors.values())
    assert vectors["coarse"][:8].tolist() == [21, 13, 19, 13, 26, 27, 28, -1]
    assert vectors["operations"][:8].tolist() == [6, 0, 4, 0, 11, 12, 13, -1]
    assert vectors["fine"].tolist() == [13, 4, 1, 5, 1, 6]


def test_equal_keys_have_equal_encodings():
    swapped = Architecture.parse(str(WINNER).replace("max(x,tanh(x))", "max(tanh(x),x)"))
    assert swapped != WINNER
    for space in SPACES.values():
        assert space.key(swapped) == space.key(WINNER)
        assert (space.encode(swapped) == space.encode(WINNER)).all()


def test_an_empty_band_names_the_range_and_the_nearest_counts():
    with pytest.raises(ValueError) as caught:
        ArchitectureSpace("coarse", Dimensions(), 6, 15_000_001, 15_000_010)
    assert str(caught.value) == (
        "no architecture has 15,000,001 to 15,000,010 parameters: at these sizes they go from "
        "12,712,014 to 25,875,324, the nearest to the band 14,973,984 and 15,001,569"
    )
    for low, high, nearest in ((1, 2, "12,712,014"), (30_000_000, 40_000_000, "25,875,324")):
        with pytest.raises(ValueError, match=f"the nearest to the band {nearest}$"):
            ArchitectureSpace("coarse", Dimensions(), 6, low, high)
    with pytest.raises(ValueError, match="lower end 5 lies above its upper end 3"):
        ArchitectureSpace("coarse", Dimensions(), 6, 5, 3)


def test_a_base_that_does_not_fit_is_refused():
    pre = "add(mul(x,gelu(x)),max(mul(x,swish(x)),add(x,tanh(x))))"
    long = f"linear4_3(mul(linear4_3({pre},wb1),max(x,leaky_relu(x))),wb2)"
    outside = Architecture.uniform("4_1", 6)
    cases = [
        ("middle", None, "unknown stage 'middle'"),
        ("operations", None, "base is missing"),
        ("fine", None, "base is missing"),
        ("operations", outside, "base has 25,875,324 parameters, outside the band 15,000,000 to 16,000,000"),
        ("operations", Architecture(WINNER.layers[:5]), "base has 5 layers, this space 6"),
        ("fine", Architecture(WINNER.layers[:5]), "base has 5 layers, this space 6"),
        ("operations", Architecture((Expression.parse(long), *WINNER.layers[1:])), "layer 1: 23 nodes"),
    ]
    for stage, base, says in cases:
        with pytest.raises(ValueError, match=says):
            ArchitectureSpace(stage, Dimensions(), 6, LOW, HIGH, base)
    assert_in_space(ArchitectureSpace("fine", Dimensions(), 6, LOW, HIGH, outside).sample(generator(0)), "coarse")


def test_an_architecture_of_another_space_cannot_be_mutated():
    with pytest.raises(ValueError, match="architecture has 25,875,324 parameters, outside the band"):
        SPACES["coarse"].mutate(Architecture.uniform("4_1", 6), generator(0))


def test_the_extremes_are_the_ends_of_the_band():
    fine = SPACES["fine"]
    sums = [count_parameters(fine.extreme(largest), Dimensions()).total_with_projection for largest in (False, True)]
    assert LOW <= sums[0] < sums[1] <= HIGH
    rng = generator(8, "extremes")
    for _ in range(50):
        total = count_parameters(fine.sample(rng), Dimensions()).total_with_projection
        assert sums[0] <= total <= sums[1]
    costs, second = (1, 2, 4, 7), (5, 3, 9, 1)
    allowed = [c for c in brute_force(costs, 3, 0, 6, 9) if 10 + sum(second[i] for i in c) <= 21]
    band = Band(costs, 3, 0, 6, 9, Ceiling(second, 10, 21, "somethings"))
    for largest, pick in ((True, max), (False, min)):
        found = band.extreme(largest)
        assert found in allowed and band.total(found) == pick(map(band.total, allowed))
    with pytest.raises(ValueError, match="stage coarse: only fine"):
        SPACES["coarse"].extreme(True)
