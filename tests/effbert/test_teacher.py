"""Teachers of several families are read without changing or materialising anything; misfits are refused clearly."""

import json

import pytest
import torch
import transformers

from effbert.kernels import eager
from effbert.teacher import (
    Teacher,
    check_family,
    check_shape,
    content_hash,
    head_of,
    layer_map,
    load_model,
    longest_text,
    read_config,
    student_vocabulary,
    with_new_head,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 42,
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "Electra": {"embedding_size": 16},
}


def build(family, head="ForSequenceClassification", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    return getattr(transformers, f"{family}{head}")(config).eval()


def batch(pad):
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return torch.where(mask.bool(), ids, pad), mask, torch.zeros_like(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_scores_and_logits_are_those_of_the_model_itself(family):
    model = build(family, num_labels=3)
    ids, mask, types = batch(model.config.pad_token_id)
    trace = Teacher(build(family, num_labels=3)).trace(ids, mask, types)
    model.set_attn_implementation("eager")
    expected = model(ids, mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(trace.logits, expected.logits)
    assert len(trace.hidden_states) == 5 and len(trace.queries) == len(trace.keys) == 4
    for mine, theirs in zip(trace.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs)
    for query, key, probabilities in zip(trace.queries, trace.keys, expected.attentions, strict=True):
        assert query.shape == (2, 3, 9, 8)
        scores = query @ key.transpose(-1, -2) / 8**0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        torch.testing.assert_close(torch.softmax(scores, -1), probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_not_materialised_and_nothing_is_kept(family):
    teacher = Teacher(build(family))
    assert teacher.config._attn_implementation == "sdpa"
    trace = teacher.trace(*batch(teacher.config.pad_token_id))
    assert not teacher._caught
    assert not any(t.requires_grad for t in (*trace.hidden_states, *trace.queries, trace.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_products_may_be_rounded_attention_is_that_of_plain_products(family, monkeypatch):
    monkeypatch.setattr(eager, "_TAKEN", True)
    whole = Teacher(build(family)).trace(*batch(1))
    torch.set_float32_matmul_precision("medium")
    try:
        teacher = Teacher(build(family))
        assert teacher.config._attn_implementation == "sdpa"  # it may leave the CPU before it is asked
        trace = teacher.trace(*batch(1))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert teacher.config._attn_implementation == "eager" and not teacher._caught
    for mine, exact in zip((*trace.hidden_states, *trace.queries), (*whole.hidden_states, *whole.queries), strict=True):
        torch.testing.assert_close(mine, exact, rtol=0.02, atol=0.02)


def test_a_bare_encoder_and_a_question_answering_model_are_teachers_too():
    assert Teacher(build("Bert", "Model")).trace(*batch(0)).logits is None
    assert Teacher(build("Bert", "ForQuestionAnswering")).trace(*batch(0)).logits.shape == (2, 9, 2)


def test_columns_are_put_in_the_order_of_the_tasks_labels():
    plain = Teacher(build("Bert", num_labels=3)).trace(*batch(0)).logits
    mapped = Teacher(build("Bert", num_labels=3), [2, 0, 1]).trace(*batch(0)).logits
    torch.testing.assert_close(mapped, plain[:, [2, 0, 1]])
    assert Teacher(build("Bert", num_labels=3), [0, 1, 2]).columns is None


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering", "Model"])
def test_a_trace_without_the_head_differs_by_the_logits_alone(head):
    teacher = Teacher(build("Bert", head))
    whole, bare = teacher.trace(*batch(0)), teacher.trace(*batch(0), head=False)
    assert bare.logits is None
    for name in ("hidden_states", "queries", "keys"):
        for mine, theirs in zip(getattr(bare, name), getattr(whole, name), strict=True):
            assert torch.equal(mine, theirs)


def test_a_model_of_another_kind_is_refused():
    config = transformers.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=3)
    with pytest.raises(ValueError, match="BERT, RoBERTa and ELECTRA"):
        Teacher(transformers.GPT2Model(config))


@pytest.mark.parametrize("family", ["DistilBert", "Albert", "GPT2", "Deberta", "DebertaV2", "T5", "Longformer"])
def test_another_family_is_refused_from_its_config_alone(family):
    with pytest.raises(ValueError, match=r"cannot be the teacher.*BERT, RoBERTa and ELECTRA") as refusal:
        check_family(getattr(transformers, f"{family}Config")())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_check_lets_bert_like_encoders_pass(family):
    check_family(build(family).config)


def test_layers_and_heads_that_do_not_fit_say_what_would():
    assert layer_map(12, 6) == [1, 3, 5, 7, 9, 11]
    assert layer_map(6, 6) == list(range(6))
    with pytest.raises(ValueError, match=r"12 layers.*--student.num_hidden_layers should be one of 1, 2, 3, 4, 6, 12"):
        layer_map(12, 5)
    with pytest.raises(ValueError, match=r"--student.num_attention_heads 12"):
        check_shape(12, 12, 6, 8)


def test_a_folder_without_weights_or_config_is_refused_before_loading(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)
    build("Bert").config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{trunc")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path)


def test_a_pickled_checkpoint_is_never_executed(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    build("Bert").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match=r"pickled weights.*save it with safetensors"):
        load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("saved", "changes", "head", "message"),
    [
        ("Model", {}, "classification", "lack classifier.bias, classifier.weight, which"),
        ("ForSequenceClassification", {}, "spans", "lack qa_outputs.bias"),
        ("ForMaskedLM", {}, "classification", "lack .*pooler"),
        ("Model", {"num_hidden_layers": 5}, None, r"lack encoder\.layer\.4"),
        ("ForSequenceClassification", {"num_hidden_layers": 2}, None, r"hold .*encoder\.layer\.2.* does not know"),
        ("Model", {"intermediate_size": 40}, None, "another size than its config.json says"),
        ("ForSequenceClassification", {"id2label": {0: "a", 1: "b", 2: "c"}}, "classification", "size .*: classifier"),
    ],
)
def test_weights_that_do_not_belong_are_refused(tmp_path, saved, changes, head, message):
    build("Bert", saved).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(tmp_path, head)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_may_lack_its_pooler_and_may_have_any_head(tmp_path, family):
    for head in ("ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification"):
        build(family, head).save_pretrained(tmp_path / head)
        pad = 1 if family == "Roberta" else 0
        expected = Teacher(build(family, head)).trace(*batch(pad), head=False).hidden_states[-1]
        assert torch.equal(Teacher(load_model(tmp_path / head)).trace(*batch(pad)).hidden_states[-1], expected)


def test_weights_are_loaded_in_fp32_whatever_they_were_saved_in(tmp_path):
    build("Bert").half().save_pretrained(tmp_path)
    loaded = [load_model(tmp_path, "classification"), with_new_head(tmp_path, "classification", ("a", "b"))]
    assert {parameter.dtype for model in loaded for parameter in model.parameters()} == {torch.float32}
    assert {model.config._attn_implementation for model in loaded} == {"sdpa"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "labels"), [("classification", ("no", "yes")), ("regression", ("score",)), ("spans", ("start", "end"))]
)
def test_a_new_head_replaces_any_other_and_keeps_the_encoder(tmp_path, family, head, labels):
    old = build(family, num_labels=2, problem_type="multi_label_classification")
    old.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model = with_new_head(tmp_path, head, labels)
    assert model.config.num_labels == len(labels)
    assert model.config.problem_type == ("regression" if head == "regression" else None)
    assert model.config.label2id == {name: index for index, name in enumerate(labels)}
    before, prefix = old.state_dict(), model.base_model_prefix
    for name, weight in model.state_dict().items():
        if name.startswith(prefix):
            assert torch.equal(weight, before[name])
        elif name in before and "weight" in name:
            assert not torch.equal(weight, before[name])
    torch.manual_seed(5)
    again = with_new_head(tmp_path, head, labels).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_a_folder_in_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build("Bert", "Model").save_pretrained(tmp_path / "bert")
    assert load_model("~/bert").config.hidden_size == 24
    assert content_hash("~/bert") == content_hash(tmp_path / "bert")


def test_the_content_hash_follows_the_weights(tmp_path):
    model = build("Bert", "Model")
    model.save_pretrained(tmp_path)
    before = content_hash(tmp_path)
    model.save_pretrained(tmp_path)
    assert content_hash(tmp_path) == before
    model.encoder.layer[0].output.dense.bias.data[0] += 1
    model.save_pretrained(tmp_path)
    assert content_hash(tmp_path) != before


def test_head_and_vocabulary_are_read_from_the_config(tmp_path):
    for family, head, expected in (
        ("Bert", "ForSequenceClassification", "classification"),
        ("Bert", "ForQuestionAnswering", "spans"),
        ("Bert", "Model", None),
    ):
        build(family, head).save_pretrained(tmp_path / head)
        assert head_of(read_config(tmp_path / head)) == expected
    roberta = student_vocabulary(build("Roberta").config)
    assert (roberta["pad_token_id"], roberta["position_offset"], roberta["type_vocab_size"]) == (1, 2, 1)
    assert student_vocabulary(build("Electra").config)["position_offset"] == 0


def test_the_longest_text_is_told_of_any_family_whose_config_says_it():
    longest = {"DistilBert": 512, "Bart": 1024, "MPNet": 510, "Longformer": 510, "ModernBert": 8192}
    assert {name: longest_text(getattr(transformers, f"{name}Config")()) for name in longest} == longest
    for name in ("T5", "Funnel", "XLNet"):
        with pytest.raises(ValueError, match=rf"a {name.lower()} model cannot be read: .*max_position_embeddings"):
            longest_text(getattr(transformers, f"{name}Config")())


def test_a_roberta_student_runs_at_the_longest_text_of_its_teacher():
    from effbert.model import EffBertConfig, EffBertModel

    vocabulary = student_vocabulary(build("Roberta").config)
    model = EffBertModel(
        EffBertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=24, **vocabulary)
    ).eval()
    assert model(torch.full((1, 40), 7)).last_hidden_state.shape == (1, 40, 24)
