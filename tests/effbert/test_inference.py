"""The inference model gives the student's outputs, whatever the architecture, head and padding, and leaves it alone."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from effbert.architecture import PUBLISHED, Architecture
from effbert.inference import InferenceModel
from effbert.kernels.expression import STRUCTURES
from effbert.model import EffBertConfig, EffBertForQuestionAnswering, EffBertForSequenceClassification, EffBertModel
from effbert.random import generator
from effbert.search.space import random_expression

SMALL = {
    "vocab_size": 50,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
LENGTHS = (9, 5, 1)
ALL_OPS = (
    "linear1_3(add(mul(leaky_relu(linear1_3(x,wb1)),add(elu(mul(x,gelu(x))),sigmoid(x))),"
    "max(relu(mul(x,tanh(x))),add(leaky_relu(x),swish(x)))),wb2)"
)


def student(kind=EffBertForSequenceClassification, seed=0, pooler=True, **changes):
    """A student whose weights are large enough that every op matters."""
    torch.manual_seed(seed)
    options = {} if pooler else {"add_pooling_layer": False}
    model = kind(EffBertConfig(**{"architecture": drawn(seed), **SMALL, **changes}), **options).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.5)
    return model


def drawn(seed, layers=3):
    rng = generator(seed, "architecture")
    return str(Architecture(tuple(random_expression(STRUCTURES[rng.integers(16)], rng) for _ in range(layers))))


def batch(lengths=LENGTHS):
    """input_ids, attention_mask, token_type_ids, padded on the right."""
    torch.manual_seed(1)
    ids = torch.randint(50, (len(lengths), max(lengths)))
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return ids, mask, torch.randint(2, ids.shape)


@torch.no_grad()
def assert_same(model, inputs, tolerance=1e-5, **more):
    """Equal outputs, at the real tokens where there is one for each token."""
    mine, theirs = InferenceModel(model)(*inputs, **more), model(*inputs, **more)
    assert type(mine) is type(theirs) and mine.keys() == theirs.keys()
    real = inputs[1].bool() if len(inputs) > 1 else torch.ones_like(inputs[0]).bool()
    for name, expected in theirs.items():
        assert mine[name].shape == expected.shape and mine[name].dtype == expected.dtype
        select = real if name in ("last_hidden_state", "start_logits", "end_logits") else slice(None)
        torch.testing.assert_close(mine[name][select], expected[select], rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_architectures_compute_the_same(seed):
    settings = {
        "neighbour_padding": ("zero", "released")[seed % 2],
        "embedding_size": (8, 8, None)[seed % 3],
        "position_offset": (0, 3)[seed % 5 == 0],
        "intermediate_size": (24, 22)[seed % 2],
    }
    assert_same(student(seed=seed, **settings), batch())


@pytest.mark.parametrize("combine", ["truncate", "pad", "pad_released"])
@pytest.mark.parametrize("seed", range(6))
def test_widths_that_are_cut_or_filled_up(seed, combine):
    width = 24 if combine == "truncate" else 99
    assert_same(student(seed=100 + seed, intermediate_size=width, combine=combine), batch())


def test_a_maximum_that_is_filled_up_as_released():
    text = "linear1_2(max(linear1_2(x,wb1),x),wb2)"
    for combine in ("pad", "pad_released"):
        assert_same(student(architecture=text, intermediate_size=96, combine=combine), batch())


def test_every_op_and_the_published_architecture():
    for architecture in (ALL_OPS, PUBLISHED):
        assert_same(student(architecture=architecture), batch())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (EffBertForSequenceClassification, {"num_labels": 3}),
        (EffBertForSequenceClassification, {"num_labels": 1}),
        (EffBertForQuestionAnswering, {"num_labels": 2}),
        (EffBertModel, {"pooler": True}),
        (EffBertModel, {"pooler": False}),
    ],
    ids=["classification", "regression", "spans", "encoder", "encoder without pooler"],
)
@pytest.mark.parametrize("lengths", [(9, 5, 1), (7, 7), (1,), (6,), (1, 1)], ids=str)
def test_heads_and_lengths(kind, changes, lengths):
    assert_same(student(kind, fit_size=30, **changes), batch(lengths))


def test_what_may_be_left_out_of_a_call():
    ids, mask, types = batch((6, 6))
    model = student(EffBertModel)
    assert_same(model, (ids,))
    assert_same(model, (ids, mask.bool()))
    assert_same(model, (ids, mask, types), position_ids=torch.arange(6)[None].flip(1))


def test_a_mask_of_another_shape_is_refused():
    ids, mask, _ = batch((6, 4))
    for wrong in (mask[1:], mask[:, :1], mask[..., None]):
        with pytest.raises(ValueError, match=r"^the attention_mask is \[.*\], it must be as input_ids, \[2, 6\]$"):
            InferenceModel(student())(ids, wrong)


def test_more_tokens_than_positions_are_refused_by_their_number():
    fast = InferenceModel(student(position_offset=3))
    fast(*batch((37, 2)))
    with pytest.raises(ValueError, match=r"^38 tokens are too many: the model has positions for 37$"):
        fast(*batch((38, 2)))
    fast(*batch((38, 2)), position_ids=torch.arange(38)[None])


def test_padding_changes_nothing_and_is_zero_afterwards():
    ids, mask, types = batch()
    model = InferenceModel(student(EffBertModel))
    found = model(ids, mask, types)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length], types[row : row + 1, :length])
        torch.testing.assert_close(found.last_hidden_state[row, :length], alone.last_hidden_state[0])
        torch.testing.assert_close(found.pooler_output[row], alone.pooler_output[0])
    assert (found.last_hidden_state[mask == 0] == 0).all()


@pytest.mark.parametrize("kind", [EffBertForSequenceClassification, EffBertModel])
def test_a_masked_first_token_and_a_masked_row_are_read_as_the_student_reads_them(kind):
    ids, _, types = batch()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1], [0] * 9, [1] * 9])
    assert_same(student(kind), (ids, mask, types))
    if kind is EffBertModel:
        states = InferenceModel(student(kind))(ids, mask, types).last_hidden_state
        assert (states[mask == 0] == 0).all() and (states[2] != 0).any()


def test_a_nan_stays_in_its_own_sequence():
    ids, mask, types = batch()
    ids[0, 3], ids[1:] = 49, ids[1:] % 49
    model = student(architecture=f"{ALL_OPS}, {PUBLISHED}")
    model.effbert.embeddings.token_embeddings.weight.data[49] = float("nan")
    assert_same(model, (ids, mask, types))
    found = InferenceModel(model)(ids, mask, types).logits
    assert found[0].isnan().all() and found[1:].isfinite().all()


def test_the_student_is_left_as_it_was():
    model = student(architecture=f"{ALL_OPS}, {PUBLISHED}").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inference = InferenceModel(model)
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert not own & {tensor.data_ptr() for tensor in inference.parameters()}
    first = inference(*batch()).logits
    assert torch.equal(inference(*batch()).logits, first)
    inference.bfloat16()(*batch())
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(*batch(), labels=torch.tensor([0, 2, 1])).loss.backward()


def test_inputs_are_not_written_over():
    inputs = batch()
    before = copy.deepcopy(inputs)
    InferenceModel(student(EffBertModel))(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [EffBertForSequenceClassification, EffBertForQuestionAnswering, EffBertModel])
def test_weights_of_half_precision(kind, dtype):
    """No further from the outputs of the same weights in fp32 than twice the student itself is."""
    model = student(kind, architecture=f"{ALL_OPS}, {PUBLISHED}", num_labels=2).to(dtype)
    ids, mask, types = batch()
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        exact, theirs = exact(ids, mask, types), model(ids, mask, types)
    made_in_half, made_so_later = InferenceModel(model), InferenceModel(model).to(dtype)
    for inference in (made_in_half, made_so_later):
        for name, tensor in inference(ids, mask, types).items():
            assert tensor.dtype == dtype
            real = mask.bool() if tensor.shape[:2] == ids.shape else slice(None)
            allowed = 2 * (theirs[name].float() - exact[name])[real].abs().max() + torch.finfo(dtype).eps
            assert (tensor.float() - exact[name])[real].abs().max() <= allowed


@pytest.mark.parametrize(
    "other", [BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)), torch.nn.Linear(2, 2)]
)
def test_what_is_no_student_is_refused(other):
    with pytest.raises(ValueError, match=f"a {type(other).__name__} is no student"):
        InferenceModel(other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    model = student(architecture=PUBLISHED)
    with torch.no_grad():
        expected = model(*batch()).logits
    found = InferenceModel(model.to("cuda", dtype))(*(tensor.cuda() for tensor in batch())).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_a_tuple_where_it_is_asked_for_and_what_there_is_none_of_is_refused(kind):
    model = student(kind, **({"num_labels": 2} if kind is EffBertForQuestionAnswering else {}))
    fast, inputs = InferenceModel(model), batch()
    found = fast(*inputs, return_dict=False, labels=None, output_attentions=False)
    assert isinstance(found, tuple) and torch.equal(found[0], fast(*inputs).to_tuple()[0])
    for name, value in {"labels": torch.zeros(3).long(), "output_hidden_states": True}.items():
        with pytest.raises(ValueError, match=f"has no {name}: call the student"):
            fast(*inputs, **{name: value})
