"""Architectures: text, the published parameter counts by part, FLOPs by formula."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import effbert.architecture as module
from effbert.architecture import (
    Architecture,
    Dimensions,
    attention_head_size,
    bert_flops,
    bert_parameters,
    count_flops,
    count_parameters,
    mlp_parameters,
)
from effbert.kernels.expression import STRUCTURES, ExpressionError, Structure

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "params.json").read_text(encoding="utf-8"))
WIDE = Dimensions(embedding_size=None, hidden_size=768, intermediate_size=3072)
TINY = Dimensions(hidden_size=360, intermediate_size=360)
CONFIGURATIONS = {"auto_bert": Dimensions(), "auto_bert_small": TINY, "auto_bert_12": TINY, "auto_tiny_bert": WIDE}
WINNER = Architecture.parse(FIXTURE["archs"]["released_FFN_EXPR"]["auto_bert"]["exprs"])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", FIXTURE["archs"])
def test_published_architectures_have_their_true_parameters_by_part(name, configuration):
    row = FIXTURE["archs"][name][configuration]
    parameters = count_parameters(Architecture.parse(row["exprs"]), CONFIGURATIONS[configuration])
    assert parameters.embeddings == row["embeddings"]
    assert parameters.attention == row["attention"]
    assert parameters.mlp == tuple(row["ffn_per_layer"])
    assert parameters.fit_dense == row["fit_dense"]
    assert parameters.total == row["total_without_fit_dense"]
    assert parameters.total_with_projection == row["total_with_fit_dense"]
    assert parameters.pooler + parameters.head(3) == row["mnli_head (cls_pooler + classifier 3)"]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_mlp_of_every_structure_has_its_true_parameters(configuration):
    row = FIXTURE["parts"][configuration]
    counted = {str(s): mlp_parameters(s, CONFIGURATIONS[configuration]) for s in STRUCTURES}
    assert counted == {name: row[name] for name in counted}


def test_headline_counts():
    winner = count_parameters(WINNER, Dimensions())
    assert winner.total_with_projection == 15_737_724
    assert winner.total + winner.pooler + winner.head(3) == 15_615_999
    assert count_parameters(WINNER, TINY).total_with_projection == 9_375_144
    assert count_parameters(WINNER.repeat(2), TINY).total_with_projection == 14_241_864
    assert count_parameters(WINNER, WIDE).total_with_projection == 70_116_608
    assert count_parameters(WINNER, Dimensions(fit_size=None)).total_with_projection == winner.total


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("bert_base", bert_parameters()),
        ("tiny_bert", bert_parameters(hidden_size=312, intermediate_size=1200, num_layers=4, fit_size=768)),
        ("supernet", count_parameters(Architecture.uniform("4_1", 6), Dimensions())),
    ],
)
def test_whole_models_have_their_true_parameters_with_and_without_heads(model, parameters):
    row = FIXTURE["models"][model]
    assert parameters.total_with_projection == row["single"]
    for task, num_labels in (("mnli", 3), ("sst-2", 2), ("sts-b", 1)):
        whole = parameters.total_with_projection + parameters.pooler + parameters.head(num_labels)
        assert whole == row[f"task_{task}"]
    assert parameters.total_with_projection + parameters.head(2) == row["task_squad1.1"]


def test_bert_base_has_109_million_parameters_with_its_pooler():
    base = bert_parameters()
    assert base.total + base.pooler == 109_482_240


def test_flops_of_one_full_layer_are_those_of_its_matrices():
    dims = Dimensions(
        vocab_size=10, embedding_size=2, hidden_size=4, intermediate_size=8, num_attention_heads=2, fit_size=5
    )
    length = 3
    flops = count_flops(Architecture.uniform("2_4", 1), dims, length)
    assert flops.embeddings == 2 * length * (3 * 2) * 4
    assert flops.attention == 4 * (2 * length * 4 * 4) + 2 * (2 * length * length * 4)
    assert flops.mlp == (2 * (2 * (2 * length * 4 * 2)),)
    assert flops.fit_dense == 2 * (2 * length * 4 * 5)
    assert flops.total == flops.embeddings + flops.attention + sum(flops.mlp)
    assert flops.total_with_projection == flops.total + flops.fit_dense
    assert flops.pooler == 2 * 4 * 4
    assert (flops.head(3), flops.head(2, tokens=length)) == (2 * 4 * 3, 2 * length * 4 * 2)


def test_bert_base_flops_are_the_usual_22_billion_at_128_tokens():
    assert bert_flops(128).total == 12 * 2 * 128 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 128 * 768)
    assert bert_flops(128).total == 22_347_251_712
    assert bert_flops(128, fit_size=768).fit_dense == 13 * 2 * 128 * 768 * 768


def test_any_object_with_the_names_can_give_the_sizes():
    config = SimpleNamespace(**vars(Dimensions()))
    assert count_parameters(WINNER, config) == count_parameters(WINNER, Dimensions())
    assert count_flops(WINNER, config, 16) == count_flops(WINNER, Dimensions(), 16)


def test_text_round_trip_and_structures():
    text = str(WINNER)
    assert Architecture.parse(text) == WINNER and Architecture.parse(text.replace(" ", "")) == WINNER
    assert [str(s) for s in WINNER.structures] == ["4_2", "2_1", "1_2", "2_2", "1_2", "2_3"]
    swapped = Architecture.parse(text.replace("max(x,tanh(x))", "max(tanh(x),x)"))
    assert swapped != WINNER and swapped.key == WINNER.key


def test_structures_can_be_exchanged_layer_by_layer():
    changed = WINNER.with_structures(["1_1", "1_2", "1_3", "1_4", "2_1", Structure(2, 2)])
    assert [str(s) for s in changed.structures] == ["1_1", "1_2", "1_3", "1_4", "2_1", "2_2"]
    assert [e.without_structure() for e in changed.layers] == [e.without_structure() for e in WINNER.layers]
    with pytest.raises(ValueError, match="5 structures for 6 layers"):
        WINNER.with_structures(["1_1"] * 5)


def test_uniform_and_repeated_architectures():
    assert str(Architecture.uniform("2_3", 2)) == ", ".join(["linear2_3(gelu(linear2_3(x,wb1)),wb2)"] * 2)
    assert "relu(" in str(Architecture.uniform(Structure(1, 1), 1, activation="relu"))
    doubled = WINNER.repeat(2)
    assert doubled.layers[::2] == doubled.layers[1::2] == WINNER.layers
    with pytest.raises(ValueError, match="unknown activation 'softmax'"):
        Architecture.uniform("1_1", 1, activation="softmax")
    with pytest.raises(ValueError, match="at least one layer"):
        Architecture.uniform("1_1", 0)


def test_an_invalid_layer_is_named():
    good = "linear1_1(gelu(linear1_1(x,wb1)),wb2)"
    with pytest.raises(ExpressionError, match=r"layer 2: column 1, .*height 1"):
        Architecture.parse(f"{good}, gelu(x), {good}")
    with pytest.raises(ExpressionError, match="layer 3: column 1, at 'gel'"):
        Architecture.parse(f"{good}, {good}, gel(x)")


def test_heads_must_divide_hidden_size():
    assert attention_head_size(540, 12) == 45
    for heads in (7, 0):
        with pytest.raises(ValueError, match=r"540 does not divide into \d attention heads; .* 1, 2, 3, 4, 5, 6, 9"):
            attention_head_size(540, heads)


def test_the_module_needs_neither_torch_nor_transformers():
    source = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {n.module for n in ast.walk(source) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(source) if isinstance(n, ast.Import) for alias in n.names}
    assert imported == {"collections.abc", "dataclasses", "effbert.kernels.expression"}
