"""The generated file: what effbert.model computes, for every op and width, in clean code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from effbert.architecture import PUBLISHED, Architecture
from effbert.kernels.expression import STRUCTURES, Expression, ExpressionError
from effbert.model import EffBertConfig, EffBertForQuestionAnswering, EffBertForSequenceClassification, EffBertModel
from effbert.random import generator
from effbert.search.space import random_expression
from effbert.standalone import load, plain_model, source, statements

ROOT = Path(__file__).resolve().parents[2]
LONG = (
    "linear1_3(add(mul(leaky_relu(linear1_3(x,wb1)),add(leaky_relu(mul(x,gelu(x))),sigmoid(x))),"
    "max(leaky_relu(mul(x,tanh(x))),add(leaky_relu(x),swish(x)))),wb2)"
)
SMALL = {
    "vocab_size": 50,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def student(kind=EffBertForSequenceClassification, seed=0, **changes):
    torch.manual_seed(seed)
    model = kind(EffBertConfig(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():  # large enough that every op matters
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.5)
    return model


def batch(lengths=(9, 5, 1), offset=0):
    torch.manual_seed(1)
    ids = torch.randint(50, (len(lengths), max(lengths)))
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return ids, mask, torch.randint(2, ids.shape)


def drawn(seed, layers=3):
    rng = generator(seed, "architecture")
    return str(Architecture(tuple(random_expression(STRUCTURES[rng.integers(16)], rng) for _ in range(layers))))


def assert_same(model):
    plain = plain_model(model, load(source(model.config)))
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert plain(*batch()).hidden_states is None
    plain.config.output_hidden_states = True
    with torch.no_grad():
        mine = plain(*batch()).to_tuple()
        theirs = model(*batch(), output_hidden_states=True).to_tuple()
    assert len(mine) == len(theirs)
    for a, b in zip(mine[:-1] + mine[-1], theirs[:-1] + theirs[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_drawn_architectures_compute_the_same(seed):
    settings = {
        "neighbour_padding": ("zero", "released")[seed % 2],
        "embedding_size": (8, 8, None)[seed % 3],
        "position_offset": (0, 3)[seed % 5 == 0],
    }
    assert_same(student(architecture=drawn(seed), intermediate_size=(24, 22)[seed % 2], **settings))


@pytest.mark.parametrize("combine", ["pad", "pad_released"])
@pytest.mark.parametrize("seed", range(10))
def test_widths_that_are_filled_up(seed, combine):
    assert_same(student(architecture=drawn(100 + seed), intermediate_size=99, combine=combine))


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForQuestionAnswering])
def test_the_encoder_and_question_answering(kind):
    assert_same(student(kind, architecture=PUBLISHED, num_labels=2))


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_tuples_and_attention_probabilities_as_in_the_student(kind):
    model = student(kind, architecture=PUBLISHED, num_labels=2)
    plain = plain_model(model, load(source(model.config)))
    whole, output = plain(*batch()), plain(*batch(), return_dict=False)
    assert type(output) is tuple
    torch.testing.assert_close(output, whole.to_tuple())
    with pytest.raises(ValueError, match=r"^output_attentions=True: .* leave it out$"):
        plain(*batch(), output_attentions=True)
    plain.config.return_dict = False
    assert type(plain(*batch())) is tuple and type(plain(*batch(), return_dict=True)) is type(whole)


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_more_tokens_than_positions_are_refused_by_their_number(kind):
    model = student(kind, architecture=PUBLISHED, num_labels=2, position_offset=2)
    plain = plain_model(model, load(source(model.config)))
    plain(*batch((38, 2)))
    with pytest.raises(ValueError, match=r"^39 tokens are too many: the model has positions for 38$"):
        plain(*batch((39, 2)))
    plain(*batch((39, 2)), position_ids=torch.arange(39)[None])


def test_a_padded_maximum_of_released_students_differs_from_the_right_one():
    text = "linear1_2(max(linear1_2(x,wb1),x),wb2)"
    outputs = []
    for combine in ("pad", "pad_released"):
        model = student(architecture=text, intermediate_size=96, combine=combine)
        outputs.append(plain_model(model, load(source(model.config)))(*batch()).logits)
        torch.testing.assert_close(outputs[-1], model(*batch()).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(*outputs, atol=1e-3)


def test_half_precision_fills_with_what_it_can_hold():
    model = student(architecture="linear1_2(max(linear1_2(x,wb1),x),wb2)", intermediate_size=96, combine="pad").half()
    plain = plain_model(model, load(source(model.config))).half()
    torch.testing.assert_close(plain(*batch()).logits, model(*batch()).logits, rtol=0, atol=2e-2)


def test_long_expressions_are_named_part_by_part():
    expression = Expression.parse(LONG).check()
    lines = statements(expression, 24, 8, "truncate")
    assert any(line.startswith("part1 = ") for line in lines) and all(len(line) <= 100 for line in lines)
    assert_same(student(architecture=LONG))


def test_widths_that_do_not_meet_are_refused():
    expression = Expression.parse("linear1_2(mul(linear1_2(x,wb1),x),wb2)")
    assert statements(expression, 24, 12, "truncate")[-1] == "return self.dense2(h * x[..., :12])"
    assert statements(expression, 24, 48, "pad")[-1] == "return self.dense2(h * pad(x, 24, 1.0))"
    with pytest.raises(ExpressionError, match="wb2 takes 12 channels and gets 24"):
        statements(expression, 24, 12, "pad")
    with pytest.raises(ExpressionError, match=r"combine='truncate': .*wb2 takes 48 channels and gets 24"):
        source(
            EffBertConfig(
                **{**SMALL, "intermediate_size": 96}, architecture=f"{PUBLISHED.split(', ')[0]}, {expression}"
            )
        )


def test_forms_are_written_once_and_stacked_as_the_architecture_says():
    text = source(EffBertConfig(architecture=", ".join(PUBLISHED.split(", ") * 2)))
    assert text.count("(MLP):") == 6 and text.count("    (MLP1, 4),\n") == 2
    assert "import effbert" not in text and "from effbert" not in text and "fit_dense" not in text


def test_a_projection_is_left_behind():
    model = student(architecture=drawn(0), fit_size=30)
    plain = plain_model(model, load(source(model.config)))
    torch.testing.assert_close(plain(*batch()).logits, model(*batch()).logits, rtol=0, atol=1e-5)
    assert not any("fit_dense" in name for name in plain.state_dict())


def test_the_plain_model_trains():
    model = student(architecture=drawn(2), hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    plain = plain_model(model, load(source(model.config))).train()
    inputs = batch()
    losses = [plain(*inputs, labels=torch.tensor([0, 2, 1])).loss for _ in range(2)]
    losses[0].backward()
    assert losses[0] != losses[1] and all(parameter.grad is not None for parameter in plain.parameters())


def test_the_plain_model_compiles_once_for_every_batch_and_length():
    counted = CompileCounterWithBackend("eager")
    model = student(architecture=drawn(4))
    plain = plain_model(model, load(source(model.config)))
    compiled = torch.compile(plain, dynamic=True, fullgraph=True, backend=counted)
    for lengths in ((9, 5, 1), (17, 3)):
        mine, theirs = (run(*batch(lengths)).logits for run in (compiled, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert counted.frame_count == 1


def test_another_configuration_is_refused():
    module = load(source(EffBertConfig(**SMALL, architecture=PUBLISHED)))
    with pytest.raises(ValueError, match="combine = 'pad', but this code is written for 'truncate'"):
        module.EffBertModel(module.EffBertConfig(combine="pad"))


@pytest.mark.parametrize("settings", [{}, {"combine": "pad", "intermediate_size": 96}, {"embedding_size": None}])
def test_the_generated_code_is_clean(settings, tmp_path):
    file = tmp_path / "modeling_effbert.py"
    file.write_text(source(EffBertConfig(**{**SMALL, **settings}, architecture=drawn(7, layers=8))))
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "E501"]  # texts of architectures may be long
    for command in (["check", *rules], ["format", "--check", *rules[:2]]):
        done = subprocess.run([*ruff, *command, "--no-cache", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
