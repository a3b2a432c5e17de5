"""The student as a transformers model: saving, loading, padding, dropout, heads."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import effbert  # noqa: F401  (registers the model type)
from effbert import standalone
from effbert.architecture import Architecture, count_parameters
from effbert.data.tasks import TaskSpec
from effbert.kernels import gradients_in_place
from effbert.model import (
    EffBertConfig,
    EffBertForQuestionAnswering,
    EffBertForSequenceClassification,
    EffBertModel,
)
from effbert.optim import Optimizer, TrainingArguments
from effbert.supernet import Supernet, supernet_config

MIXED = "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), add(linear1_3(mul(linear1_3(max(x,tanh(x)),wb1),x),wb2),x)"


def config(**changes):
    small = {
        "architecture": MIXED,
        "vocab_size": 50,
        "embedding_size": 8,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
    }
    return EffBertConfig(**{**small, **changes})


def batch(lengths=(9, 5, 1), pad=0, total=None):
    ids = torch.randint(1, 50, (len(lengths), total or max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return ids * mask + pad * (1 - mask), mask


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_a_saved_classifier_loads_through_the_auto_class_and_agrees(tmp_path, num_labels):
    model = EffBertForSequenceClassification(config(num_labels=num_labels)).eval()
    ids, mask = batch()
    before = model(ids, mask).logits
    assert before.shape == (3, num_labels)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, EffBertForSequenceClassification)
    torch.testing.assert_close(loaded(ids, mask).logits, before, rtol=1e-6, atol=1e-7)
    assert str(loaded.config.architecture) == MIXED


def test_encoder_and_question_answering_load_through_their_auto_classes(tmp_path):
    ids, mask = batch()
    for kind, auto in ((EffBertModel, AutoModel), (EffBertForQuestionAnswering, AutoModelForQuestionAnswering)):
        model = kind(config()).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = auto.from_pretrained(tmp_path / kind.__name__).eval()
        for mine, theirs in zip(loaded(ids, mask).to_tuple(), model(ids, mask).to_tuple(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_a_tuple_comes_where_the_call_or_the_config_asks_for_one(kind):
    model, inputs = kind(config(num_labels=2)).eval(), batch()
    whole = model(*inputs, output_hidden_states=True)
    for output in (
        model(*inputs, output_hidden_states=True, return_dict=False),
        kind.forward(model, *inputs, output_hidden_states=True, return_dict=False),
    ):
        assert type(output) is tuple and len(output) == len(whole)
        torch.testing.assert_close(output, whole.to_tuple())
    model.config.return_dict = False
    assert type(model(*inputs)) is tuple and type(model(*inputs, return_dict=True)) is type(whole)


@pytest.mark.parametrize("module", ["own", "exported"])
@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0, 1])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 1}, torch.tensor([[0.5], [-1.0], [2.0]])),
        ({"num_labels": 3, "problem_type": "regression"}, torch.ones(3, 3)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(3)),
    ],
)
def test_losses_are_those_of_transformers(module, settings, labels):
    model = EffBertForSequenceClassification(config(**settings)).eval()
    sizes = {"num_hidden_layers": 0, "hidden_size": 4, "num_attention_heads": 1, "vocab_size": 9}
    bert = BertForSequenceClassification(BertConfig(**sizes, **settings))
    if module == "exported":
        model = standalone.plain_model(model, standalone.load(standalone.source(model.config)))
    output = model(*batch(), labels=labels)
    torch.testing.assert_close(output.loss, bert.loss_function(labels, output.logits, bert.config))


@pytest.mark.parametrize("module", ["own", "exported"])
def test_positions_beyond_the_sequence_add_nothing_to_the_loss(module):
    model = EffBertForQuestionAnswering(config(num_labels=2)).eval()
    if module == "exported":
        model = standalone.plain_model(model, standalone.load(standalone.source(model.config)))
    ids, mask = batch()
    given = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 99, 5])}
    output = model(ids, mask, **given)
    kept = torch.tensor([0, 2])
    start = F.cross_entropy(output.start_logits, given["start_positions"])
    end = F.cross_entropy(output.end_logits[kept], given["end_positions"][kept])
    torch.testing.assert_close(output.loss, (start + end) / 2)
    assert model(ids, mask, start_positions=given["start_positions"]).loss is None


@pytest.mark.parametrize("kinds", [(0, 1), (1, 0)])
def test_a_head_of_another_kind_is_not_taken_for_ones_own(tmp_path, kinds):
    classes = (EffBertForSequenceClassification, EffBertForQuestionAnswering)
    saved, loaded = (classes[index] for index in kinds)
    saved(config(num_labels=2)).save_pretrained(tmp_path)
    _, found = loaded.from_pretrained(tmp_path, output_loading_info=True)
    assert {f"{loaded.head_name}.weight", f"{loaded.head_name}.bias"} <= set(found["missing_keys"])


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_hidden_states_come_where_the_call_or_the_config_asks_for_them(kind):
    model, inputs = kind(config(num_labels=2)).eval(), batch()
    assert model(*inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(*inputs).hidden_states) == 1 + model.config.num_hidden_layers
    assert model(*inputs, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_attention_probabilities_are_refused(kind):
    model = kind(config(num_labels=2)).eval()
    with pytest.raises(ValueError, match=r"^output_attentions=True: .* leave it out$"):
        model(*batch(), output_attentions=True)
    model(*batch(), output_attentions=False)
    asking = kind(config(num_labels=2, output_attentions=True, attn_implementation="eager")).eval()
    with pytest.raises(ValueError, match="output_attentions=True"):
        asking(*batch())
    asking(*batch(), output_attentions=False)


def test_losses_follow_the_labels():
    ids, mask = batch()
    classes = EffBertForSequenceClassification(config(num_labels=3)).eval()
    output = classes(ids, mask, labels=torch.tensor([0, 2, 1]))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(output.loss, expected)
    score = EffBertForSequenceClassification(config(num_labels=1)).eval()
    output = score(ids, mask, labels=torch.tensor([0.5, 2.0, 1.0]))
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - torch.tensor([0.5, 2.0, 1.0])).square().mean())
    spans = EffBertForQuestionAnswering(config()).eval()
    output = spans(ids, mask, start_positions=torch.tensor([1, 0, 0]), end_positions=torch.tensor([2, 3, 0]))
    assert torch.isfinite(output.loss) and output.start_logits.shape == (3, 9)


@pytest.mark.parametrize("pad", [0, 7])
def test_logits_do_not_depend_on_padding(pad):
    model = EffBertForSequenceClassification(config(num_labels=3)).eval()
    lengths = (9, 5, 1)
    ids, mask = batch(lengths, pad=pad, total=31)
    together = model(ids, mask).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_fresh_model_has_a_pad_row_where_neighbours_see_it(tmp_path):
    rows = {}
    for padding in ("zero", "released"):
        model = EffBertModel(config(neighbour_padding=padding))
        rows[padding] = model.embeddings.token_embeddings.weight[0]
        model.save_pretrained(tmp_path / padding)
        loaded = EffBertModel.from_pretrained(tmp_path / padding).embeddings.token_embeddings.weight[0]
        assert torch.equal(loaded, rows[padding])
    assert not rows["zero"].any() and 0 < rows["released"].std() < 0.1


def test_released_neighbour_padding_lets_the_pad_row_in():
    ids, mask = batch((9, 5))
    outputs = []
    for padding in ("zero", "released"):
        torch.manual_seed(0)
        model = EffBertModel(config(neighbour_padding=padding)).eval()
        with torch.no_grad():
            model.embeddings.token_embeddings.weight[0] = 1.0
        outputs.append(model(ids, mask).last_hidden_state)
    assert not torch.allclose(outputs[0][1, 4], outputs[1][1, 4])
    torch.testing.assert_close(outputs[0][0], outputs[1][0])


def test_dropout_follows_the_default_generator_and_only_in_training():
    model = EffBertModel(config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    ids, mask = batch()

    def output(seed):
        torch.manual_seed(seed)
        return model(ids, mask).last_hidden_state

    torch.testing.assert_close(output(1), output(1), rtol=0, atol=0)
    assert not torch.allclose(output(1), output(2))
    model.eval()
    torch.testing.assert_close(output(1), output(2), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForSequenceClassification, EffBertForQuestionAnswering])
def test_one_compilation_serves_every_batch_and_length(kind):
    counted = CompileCounterWithBackend("eager")
    model = kind(config()).eval()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counted)
    for lengths in ((9, 5, 1), (17, 3)):
        for mine, plain in zip(compiled(*batch(lengths)).to_tuple(), model(*batch(lengths)).to_tuple(), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    assert counted.frame_count == 1


TOO_LONG = r"^39 tokens are too many: the model has positions for 38$"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForQuestionAnswering])
@pytest.mark.parametrize("training", [False, True])
def test_more_tokens_than_positions_are_refused_by_their_number(auto, training):
    model = auto.from_config(config(position_offset=2, num_labels=2)).train(training)
    model(*batch((38, 3)))
    with pytest.raises(ValueError, match=TOO_LONG):
        model(*batch((39, 3)))


def test_positions_of_ones_own_may_repeat_but_not_leave_the_table():
    model = EffBertModel(config()).eval()
    ids, mask = batch((60, 3))
    assert model(ids, mask, position_ids=torch.arange(60)[None] % 40).last_hidden_state.shape == (2, 60, 24)
    with pytest.raises(ValueError, match=r"^60 tokens are too many: the model has positions for 40$"):
        model(ids, mask, position_ids=torch.arange(60)[None])


def test_a_graph_does_not_ask_for_the_length():
    model = EffBertForSequenceClassification(config(return_dict=False)).eval()
    length = {1: torch.export.Dim("length", min=3, max=1000)}  # beyond the table: a graph that asked would be refused
    program = torch.export.export(model, batch(), dynamic_shapes={"input_ids": length, "attention_mask": length})
    longer = batch((17, 5, 3))
    torch.testing.assert_close(program.module()(*longer)[0], model(*longer)[0], rtol=1e-5, atol=1e-6)
    embeddings, (ids, mask) = model.effbert.embeddings, batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(embeddings, (ids, mask, torch.zeros_like(ids), torch.arange(ids.shape[1])[None]))


def test_a_model_in_training_compiles_with_dynamic_shapes_and_draws_the_same_dropout():
    model = EffBertModel(config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    for lengths in ((9, 5, 1), (17, 3)):
        found = []
        for run in (compiled, model):
            torch.manual_seed(1)
            found.append(run(*batch(lengths)).last_hidden_state)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_standalone_model_has_exactly_the_counted_parameters():
    for fit_size in (None, 30):
        settings = config(fit_size=fit_size)
        counted = count_parameters(Architecture.parse(MIXED), settings)
        model = EffBertModel(settings, add_pooling_layer=False)
        total = counted.total_with_projection if fit_size else counted.total
        assert sum(p.numel() for p in model.parameters()) == total
    classifier = EffBertForSequenceClassification(config(num_labels=3))
    assert classifier.num_parameters() == counted.total + counted.pooler + counted.head(3)


def test_a_direct_token_table_has_no_neighbours():
    settings = config(embedding_size=None)
    model = EffBertModel(settings, add_pooling_layer=False)
    assert model.embeddings.dense is None
    counted = count_parameters(Architecture.parse(MIXED), settings)
    assert sum(p.numel() for p in model.parameters()) == counted.total


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_attention_heads": 5}, "24 does not divide into 5"),
        ({"neighbour_padding": "none"}, "'zero', 'released'"),
        ({"combine": "cut"}, "'truncate', 'pad'"),
        ({"architecture": "softmax(x)"}, "softmax"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(Exception, match=message):
        config(**changes)


def test_gradients_reach_exactly_the_slices_a_candidate_uses():
    supernet = Supernet(
        supernet_config(config(fit_size=30), 2), [TaskSpec("t", "classification", ("a", "b"), ("accuracy",), False)]
    )
    architecture = Architecture.parse(MIXED)
    ids, mask = batch()
    supernet.train().trace(ids, mask, None, architecture, "t").logits.square().sum().backward()
    first, second = (layer.mlps for layer in supernet.effbert.layers)
    assert first[3].dense1.weight.grad[:12].abs().sum() > 0 and first[3].dense1.weight.grad[12:].abs().sum() == 0
    assert second[0].dense2.weight.grad[:, 8:].abs().sum() == 0
    assert all(parameter.grad is None for mlp in second[1:] for parameter in mlp.parameters())


def test_a_saved_supernet_loads_by_itself(tmp_path):
    specs = [
        TaskSpec("one", "classification", ("no", "yes"), ("accuracy",), False),
        TaskSpec("two.0", "spans", (), ("f1",), True),
        TaskSpec("three", "regression", (), ("pearson",), True),
    ]
    supernet = Supernet(supernet_config(config(fit_size=30), 2), specs).eval()
    supernet.save_pretrained(tmp_path)
    loaded = Supernet.from_pretrained(tmp_path).eval()
    ids, mask = batch()
    architecture = Architecture.parse(MIXED)
    for task, shape in (("one", (3, 2)), ("two.0", (3, 9, 2)), ("three", (3, 1))):
        mine = loaded.trace(ids, mask, None, architecture, task).logits
        assert mine.shape == shape
        torch.testing.assert_close(
            mine, supernet.trace(ids, mask, None, architecture, task).logits, rtol=1e-6, atol=1e-7
        )
        alone = loaded.extract(architecture, task, fit_size=None)
        torch.testing.assert_close(alone.trace(ids, mask).logits, mine, rtol=1e-6, atol=1e-6)
    assert alone.config.num_labels == 1 and loaded.extract(architecture, "one").config.id2label == {0: "no", 1: "yes"}
    bare = loaded.extract(architecture)
    torch.testing.assert_close(
        bare(ids, mask).last_hidden_state, loaded.trace(ids, mask, None, architecture).hidden_states[-1]
    )


def stepped(supernet, optimizer, texts, number):
    """One update of the shared weights with the architectures of `texts`, as stage 3 makes it."""
    architectures = [Architecture.parse(text) for text in texts]
    ids, mask = batch()
    with gradients_in_place():
        for architecture in architectures:
            supernet.trace(ids, mask, architecture=architecture).hidden_states[-1].square().mean().backward()
    optimizer.step(number, supernet.partly_used(architectures))


def parts_of(supernet, optimizer):
    """Weights and moments by name, copied."""
    found = {}
    for name, parameter in supernet.named_parameters():
        state = optimizer.adamw.state.get(parameter, {})
        for kind, tensor in {
            "weight": parameter,
            **{k: state[k] for k in ("exp_avg", "exp_avg_sq") if k in state},
        }.items():
            found[name, kind] = tensor.detach().clone()
    return found


def test_shared_weights_that_an_update_did_not_use_stay_as_they_are():
    torch.manual_seed(0)
    supernet = Supernet(supernet_config(config(fit_size=30), 2), []).train()
    optimizer = Optimizer(supernet, TrainingArguments(learning_rate=0.01, weight_decay=0.5, warmup_ratio=0.0), 10)
    stepped(supernet, optimizer, [str(Architecture.uniform("4_1", 2))], 0)  # everything has moments now
    before = parts_of(supernet, optimizer)
    stepped(supernet, optimizer, [MIXED, MIXED.replace("1_3", "2_4")], 1)
    after = parts_of(supernet, optimizer)
    used = {0: (4, 12), 1: (2, 8)}  # stacks, and the wider of 24/3 and 24/4 in the second layer
    for layer, (stacks, width) in used.items():
        for stack in range(4):
            name = f"effbert.layers.{layer}.mlps.{stack}"
            widths = {0: 8, 1: 6} if layer else {}
            here = widths.get(stack, width)
            for part, dimension in ((".dense1.weight", 0), (".dense1.bias", 0), (".dense2.weight", 1)):
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    old, new = before[name + part, kind], after[name + part, kind]
                    kept = here if stack < stacks else 0
                    rest = old.shape[dimension] - kept
                    assert torch.equal(old.narrow(dimension, kept, rest), new.narrow(dimension, kept, rest)), (
                        name,
                        part,
                    )
                    if kept:
                        assert not torch.equal(old.narrow(dimension, 0, kept), new.narrow(dimension, 0, kept))
