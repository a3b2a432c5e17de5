"""The named models: their sizes are the published ones, and the narrow ones begin with slices of a wide supernet."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from effbert.__main__ import main
from effbert.architecture import Architecture, count_parameters
from effbert.data.tasks import TaskSpec
from effbert.kernels.expression import ExpressionError
from effbert.model import EffBertConfig, EffBertForQuestionAnswering, EffBertForSequenceClassification, EffBertModel
from effbert.models import MODELS, architecture_of, dimensions, model_fields, refuse_out_of_reach, sized_down
from effbert.supernet import Supernet, supernet_config

PARAMETERS = json.loads((Path(__file__).parents[1] / "fixtures" / "params.json").read_text())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("efficientbert", "auto_bert"),
        ("efficientbert-plus", "auto_bert"),
        ("efficientbert-tiny", "auto_bert_small"),
        ("efficientbert-plusplus", "auto_bert_12"),
        ("efficientbert-tinybert6", "auto_tiny_bert"),
    ],
)
def test_a_published_student_has_the_published_parameters(name, published):
    counted = count_parameters(architecture_of(name), dimensions(name))
    true = PARAMETERS["archs"]["released_FFN_EXPR"][published]
    assert counted.total_with_projection == true["total_with_fit_dense"]
    assert counted.total == true["total_without_fit_dense"]


def test_tinybert_has_its_parameters():
    dims = dimensions("tinybert4")
    counted = count_parameters(architecture_of("tinybert4"), dims)
    assert counted.total_with_projection == PARAMETERS["models"]["tiny_bert"]["single"]


def test_tinybert6_is_bert_of_six_layers():
    with torch.device("meta"):
        bert = BertModel(BertConfig(num_hidden_layers=6), add_pooling_layer=False)
    counted = count_parameters(architecture_of("tinybert6"), dimensions("tinybert6"))
    assert counted.total == bert.num_parameters()


@pytest.mark.parametrize("name", [*MODELS, "bert-2x24", "bert-2x24x30"])
def test_a_model_is_what_its_dimensions_say(name):
    fields = model_fields(name)
    small = EffBertConfig(**fields | {"vocab_size": 50, "max_position_embeddings": 16})
    dims = dimensions(name)
    assert (small.hidden_size, small.intermediate_size) == (dims.hidden_size, dims.intermediate_size)
    with torch.device("meta"):
        model = EffBertModel(small, add_pooling_layer=False)
    assert model.num_parameters() == count_parameters(architecture_of(name), small).total


def test_a_plain_bert_of_any_size():
    assert model_fields("bert-3x24")["intermediate_size"] == 96
    assert str(architecture_of("bert-3x24x7")) == str(Architecture.uniform("1_1", 3))


@pytest.mark.parametrize("name", ["efficientbart", "bert-0x24", "bert-2x24x0", "bert-2"])
def test_an_unknown_model_is_one_line(name):
    with pytest.raises(ValueError, match=name):
        model_fields(name)
    with pytest.raises(ExpressionError, match="is no expression"):
        architecture_of(name)


def test_a_teacher_sized_down_keeps_its_proportions():
    teacher = BertConfig()
    name = sized_down(teacher, 6, 15_000_000)
    dims = dimensions(name)
    assert dims.intermediate_size == 4 * dims.hidden_size and dims.hidden_size % teacher.num_attention_heads == 0
    count = count_parameters(architecture_of(name), dims).total
    assert abs(count - 15_000_000) < 500_000


@pytest.mark.parametrize("parameters", [1, 10**9])
def test_a_teacher_is_not_sized_down_to_what_it_cannot_have(parameters):
    with pytest.raises(ValueError, match=r"sized down to 6 layers has from 383,760 \(width 12\) to 66,364,416 \(width"):
        refuse_out_of_reach(BertConfig(), 6, parameters)
    refuse_out_of_reach(BertConfig(), 6, 66_364_416)


def test_a_narrow_supernet_is_the_first_channels_of_a_wide_one_each_layer_twice():
    wide = EffBertConfig(
        vocab_size=30, embedding_size=4, hidden_size=12, intermediate_size=12, num_attention_heads=2,
        max_position_embeddings=8, fit_size=20,
    )  # fmt: skip
    torch.manual_seed(0)
    supernet = Supernet(supernet_config(wide, 2), [TaskSpec("mine", "regression", (), ("pearson",), False)]).eval()
    narrow = supernet.narrowed(8, times=2)
    assert len(narrow.effbert.layers) == 4 and narrow.config.intermediate_size == 8
    source = supernet.effbert.layers[1].mlps[3]
    for layer in (2, 3):
        mine = narrow.effbert.layers[layer].mlps[3]
        torch.testing.assert_close(mine.dense2.weight, source.dense2.weight[:8, :8], rtol=0, atol=0)
    torch.testing.assert_close(narrow.effbert.fit_dense.weight, supernet.effbert.fit_dense.weight[:, :8])
    torch.testing.assert_close(narrow.effbert.embeddings.dense.weight, supernet.effbert.embeddings.dense.weight[:8])
    ids = torch.randint(1, 30, (2, 8))
    assert torch.isfinite(narrow.trace(ids, task="mine").logits).all()
    with pytest.raises(ValueError, match="no first 16 channels"):
        supernet.narrowed(16)


def test_mlps_narrower_than_their_layers_repeat_as_they_are_and_have_no_narrower_model():
    config = EffBertConfig(
        vocab_size=30, embedding_size=4, hidden_size=12, intermediate_size=6, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    supernet = Supernet(supernet_config(config, 1))
    twice = supernet.narrowed(12, times=2)
    assert twice.config.intermediate_size == 6
    for layer in twice.effbert.layers:
        for mine, own in zip(layer.parameters(), supernet.effbert.layers[0].parameters(), strict=True):
            assert torch.equal(mine, own)
    with pytest.raises(ValueError, match="a supernet of width 12, 6 inside its MLPs, has no first 8 channels"):
        supernet.narrowed(8)


@pytest.mark.parametrize(
    ("name", "head", "parameters"),
    [
        ("efficientbert", "6 layers, hidden_size 540", "15,737,724"),
        ("efficientbert-tiny", "6 layers, hidden_size 360", "9,375,144"),
        ("efficientbert-plusplus", "12 layers, hidden_size 360", "14,241,864"),
        ("tinybert4", "4 layers, hidden_size 312", "14,492,976"),
    ],
)
def test_arch_takes_a_name_with_its_sizes(name, head, parameters, capsys):
    for more in ((), ("--sizes_of", name)):
        assert main(["arch", name, *more]) == 0
        shown = capsys.readouterr().out
        assert head in shown and parameters in shown


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--num_labels", "-3", "--num_labels -3: must be at least 1"),
        ("--length", "0", "--length 0: must be at least 1"),
        ("--hidden_size", "-540", "hidden_size -540: must be at least 1"),
        ("--num_attention_heads", "7", "does not divide into 7 attention heads"),
    ],
)
def test_arch_prices_no_sizes_that_cannot_be(flag, value, said, capsys):
    assert main(["arch", "efficientbert", flag, value]) == 2
    assert said in capsys.readouterr().err


def test_arch_takes_other_sizes_for_a_named_architecture(capsys):
    assert main(["arch", "efficientbert", "--sizes_of", "efficientbert-tiny"]) == 0
    assert "9,375,144" in capsys.readouterr().out
    assert main(["arch", "efficientbert-tiny", "--length", "64", "--hidden_size", "240"]) == 0
    assert "6 layers, hidden_size 240, length 64" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["arch", "--help"])
    assert "--sizes_of MODEL" in capsys.readouterr().out
    assert main(["arch", "efficientbert", "--sizes_of", "small"]) == 2
    assert "unknown model 'small'" in capsys.readouterr().err
    assert main(["arch", "efficientbert", "--sizes_of", "linear1_1(gelu(linear1_1(x,wb1)),wb2)"]) == 2
    assert "an architecture has no sizes: give a model's name or folder" in capsys.readouterr().err
    for preset in (("--preset", "demo"), ("--preset=efficientbert",)):
        assert main(["arch", "efficientbert", *preset]) == 2
        assert "--preset is a search's: --sizes_of MODEL takes the sizes of a model" in capsys.readouterr().err


SAVED = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 20, "num_labels": 5}
STUDENT = {**SAVED, "architecture": f"{Architecture.uniform('2_1', 2)}", "embedding_size": 8}


@pytest.mark.parametrize(
    ("kind", "config", "last"),
    [
        (EffBertForSequenceClassification, EffBertConfig(**STUDENT), "deployed: encoder, pooler, head"),
        (EffBertForQuestionAnswering, EffBertConfig(**{**STUDENT, "num_labels": 2}), "deployed: encoder, head"),
        (BertForSequenceClassification, BertConfig(**SAVED, num_hidden_layers=3), "deployed: encoder, pooler, head"),
        (BertForQuestionAnswering, BertConfig(**{**SAVED, "num_labels": 2}), "deployed: encoder, head"),
    ],
)
def test_arch_counts_a_saved_model(kind, config, last, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = kind(config)
    model.save_pretrained(tmp_path / "saved")
    for name in ("saved", "./saved", str(tmp_path / "saved")):
        capsys.readouterr()
        assert main(["arch", name]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if last in line)
        assert f" {model.num_parameters():,} " in line


def test_arch_counts_a_saved_encoder_and_takes_the_sizes_of_a_folder(tmp_path, capsys):
    config = EffBertConfig(**STUDENT, max_position_embeddings=40, position_offset=2, fit_size=30)
    model = EffBertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    assert main(["arch", str(tmp_path / "saved")]) == 0
    shown = capsys.readouterr().out
    assert "2 layers, hidden_size 24, length 38" in shown and "head" not in shown and "pooler" not in shown
    assert f" {model.num_parameters():,} " in next(line for line in shown.splitlines() if "with fit_dense" in line)
    assert main(["arch", str(Architecture.uniform("1_1", 3)), "--sizes_of", str(tmp_path / "saved")]) == 0
    assert "3 layers, hidden_size 24" in capsys.readouterr().out


def test_a_folder_that_arch_cannot_count_is_one_line(tmp_path, capsys):
    RobertaModel(RobertaConfig(**SAVED, num_hidden_layers=1)).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for name, said in (
        ("none", "none: no such folder"),
        ("empty", "empty: no config.json in this folder"),
        ("other", "is of type roberta: students of effbert and BERT can be counted"),
    ):
        assert main(["arch", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
