"""The authors' checkpoints become folders that transformers loads, with the recorded outputs."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from commands import killed_before
from effbert.__main__ import main
from effbert.architecture import Architecture
from effbert.config import PretrainConfig
from effbert.data import glue
from effbert.data.tasks import plain_name
from effbert.model import EffBertConfig
from effbert.models import model_fields
from effbert.released import MULTI_TASK, authors_name, import_checkpoint, read_state
from effbert.start import check_start, model_config, start_weights
from effbert.supernet import Supernet, derive_config


def student(parity, task="mnli"):
    """The recorded student with the head of a task, under the authors' names."""
    kept = {k: v for k, v in parity.student_state.items() if not k.startswith(("cls_pooler", "classifier"))}
    if task == "mnli":
        return dict(parity.student_state)
    return {**kept, **{k: v for k, v in parity._heads("student", task).items()}}


def saved(tmp_path, state, module=False, bare=False):
    state = {f"module.{name}" if module else name: tensor for name, tensor in state.items()}
    path = tmp_path / "best_model.bin"
    torch.save(state if bare else {"state_dict": state, "epoch": 3}, path)
    return path


def authors_names(model):
    """The weights of a student of ours under the authors' names."""
    return {authors_name(name): tensor for name, tensor in model.state_dict().items()}


def logits(parity, folder, kind="SequenceClassification"):
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    with torch.no_grad():
        return model, model(*parity.inputs)


def close(mine, recorded):
    torch.testing.assert_close(mine, recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["released_head", "released_tail", "handmade_widthmix", "random1", "supernet_equiv"])
def test_an_imported_student_gives_the_recorded_outputs(parity, tmp_path, name, capsys):
    path = saved(tmp_path, student(parity), module=name == "released_tail")
    text, folder = str(parity.architectures[name]), tmp_path / "out"
    assert main(["import", str(path), "--architecture", text, "--output_dir", str(folder), "--task", "mnli"]) == 0
    assert "EffBertForSequenceClassification" in capsys.readouterr().out
    model, output = logits(parity, folder)
    close(output.logits, parity.outputs[f"{name}/logits"])
    close(model.effbert(*parity.inputs).last_hidden_state, parity.outputs[f"{name}/last_hidden"])
    assert model.config.neighbour_padding == "released" and model.config.fit_size == 96
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_scores_and_arguments_beside_the_weights_are_no_hindrance(parity, tmp_path, core):
    """core: the module that NumPy 2, and 1, name in a pickle."""
    values = {"acc": np.float64(0.5), "all": np.arange(4.0).reshape(2, 2), "best": np.bool_(True), "of": np.str_("rte")}
    values |= {"kind": np.dtype("f4"), "rows": np.array([1, None], dtype=object)}
    arguments = argparse.Namespace(lr=np.float32(1e-4), seed=np.int64(3), device=torch.device("cpu"), vars={"a": [1]})
    state, path = student(parity), tmp_path / "best_model.bin"
    content = {"state_dict": state, "metrics": values, "epoch": 3, "args": arguments}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # bare pickles, whose names can be changed
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", core.encode() + b"."))
    found = read_state(path)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    torch.save(content, path)
    whole = set(torch.serialization.get_safe_globals())
    assert read_state(path).keys() == state.keys() and set(torch.serialization.get_safe_globals()) == whole
    model = import_checkpoint(path, parity.architectures["released_head"], task="mnli")
    with torch.no_grad():
        close(model(*parity.inputs).logits, parity.outputs["released_head/logits"])


class Runs:
    """Runs a command when a pickle of it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_what_could_run_code_is_named_and_not_read(parity, tmp_path, capsys):
    path, mark = tmp_path / "best_model.bin", tmp_path / "mark"
    given = ["import", str(path), "--architecture", "efficientbert", "--output_dir", str(tmp_path / "out")]
    for value, name in (
        (Path("data"), "pathlib.PosixPath"),
        (argparse.Namespace(place=Path("data")), "pathlib.PosixPath"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (Runs(f"touch {mark}"), "posix.system"),
    ):
        torch.save({"state_dict": student(parity), "args": value}, path)
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error == (
            f"effbert: checkpoint {path}: holds {name}, which is not read since it could run code: "
            "save its state dict alone\n"
        )
    assert not mark.exists()
    for content in (b"not a checkpoint", b""):
        path.write_bytes(content)
        assert main(given) == 2
        error = capsys.readouterr().err
        assert "no file of tensors that torch.load reads" in error and "weights_only" not in error


def test_a_named_model_has_its_own_sizes(tmp_path, capsys):
    from effbert.model import EffBertModel

    architecture = str(Architecture.uniform("1_1", 2))
    sizes = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 96, "max_position_embeddings": 9}
    config = EffBertConfig(architecture=architecture, embedding_size=None, num_attention_heads=4, **sizes)
    path = saved(tmp_path, authors_names(EffBertModel(config, add_pooling_layer=False)))
    for text in ("bert-2x24", "bert-2x24x96", architecture):
        model = import_checkpoint(path, text, num_attention_heads=4)
        assert (model.config.hidden_size, model.config.architecture) == (24, architecture)
    for name, said in (
        ("bert-2x48", "hidden_size 24, bert-2x48 has 48; intermediate_size 96, bert-2x48 has 192: name the model"),
        ("bert-2x24x24", "intermediate_size 96, bert-2x24x24 has 24: name the model that it is, or spell its layers"),
    ):
        assert main(["import", str(path), "--architecture", name, "--output_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_killed_import_leaves_no_folder_and_the_same_command_makes_it(parity, tmp_path):
    path, folder = saved(tmp_path, student(parity)), tmp_path / "made" / "out"
    text = str(parity.architectures["released_head"])
    arguments = ["import", str(path), "--architecture", text, "--output_dir", str(folder), "--task", "mnli"]
    killed_before("out", arguments)
    assert not folder.exists() and len(list(folder.parent.iterdir())) == 1
    assert main(arguments) == 0
    close(logits(parity, folder)[1].logits, parity.outputs["released_head/logits"])
    assert list(folder.parent.iterdir()) == [folder]


def test_the_supernet_without_a_head(parity, tmp_path):
    state = {k: v for k, v in student(parity).items() if not k.startswith(("cls_pooler", "classifier"))}
    whole = Architecture.uniform("4_1", 3)
    model = import_checkpoint(saved(tmp_path, state, bare=True), whole)
    assert type(model).__name__ == "EffBertModel" and model.pooler is None
    with torch.no_grad():
        close(model(*parity.inputs).last_hidden_state, parity.outputs["supernet/last_hidden"])


def test_an_encoder_without_pooler_is_said_to_have_none(parity, tmp_path, capsys):
    state = {k: v for k, v in student(parity).items() if not k.startswith("classifier")}
    for name, said in (("pooled", False), ("bare", True)):
        path = saved(tmp_path, state)
        given = ["import", str(path), "--architecture", str(parity.architectures["random0"])]
        assert main([*given, "--output_dir", str(tmp_path / name)]) == 0
        assert ("it has no pooler: load it with add_pooling_layer=False" in capsys.readouterr().out) == said
        state = {k: v for k, v in state.items() if not k.startswith("cls_pooler")}


@pytest.mark.parametrize("task", MULTI_TASK)
def test_each_head_of_a_multi_task_checkpoint(parity, tmp_path, task):
    state, recorded = multi_task(parity)
    model = import_checkpoint(saved(tmp_path, state), parity.architectures["released_head"], task=task)
    with torch.no_grad():
        found = model(*parity.inputs).logits
    close(found.squeeze(-1), recorded[task])
    assert model.config.num_labels == found.shape[1]


def multi_task(parity):
    """The recorded supernet with its eight heads, and what these say, by task."""
    heads = {k.removeprefix("multitask/"): v for k, v in parity.outputs.items() if k.startswith("multitask/")}
    recorded = {task: heads.pop(f"OUT_logits_task{number}") for number, task in enumerate(MULTI_TASK)}
    state = student(parity, "squad1.1") | {k: v for k, v in heads.items() if not k.startswith("OUT")}
    return {k: v for k, v in state.items() if not k.startswith("classifier.")}, recorded


def test_a_whole_supernet_keeps_all_weights_and_heads_and_is_what_students_begin_with(parity, tmp_path, capsys):
    state, recorded = multi_task(parity)
    path, folder = saved(tmp_path, state), tmp_path / "net"
    assert main(["import", str(path), "--architecture", "supernet", "--output_dir", str(folder)]) == 0
    assert "Supernet" in capsys.readouterr().out
    supernet = Supernet.from_pretrained(folder).eval()
    architecture = parity.architectures["released_head"]
    with torch.no_grad():
        for task, logits in recorded.items():
            found = supernet.trace(*parity.inputs, architecture, glue.TASKS[plain_name(task)].spec.name).logits
            close(found.squeeze(-1), logits)
    assert supernet.labels["mnli"] == ["contradiction", "entailment", "neutral"]
    slices = start_weights(derive_config(supernet.config, architecture), str(folder))
    own = import_checkpoint(path, architecture, task="rte").effbert.state_dict()
    assert all(torch.equal(slices[name], tensor) for name, tensor in own.items()) and len(own) == len(slices)


def test_a_supernet_without_heads_or_pooler_and_what_is_none(parity, tmp_path):
    bare = {k: v for k, v in student(parity).items() if not k.startswith(("cls_pooler", "classifier"))}
    supernet = import_checkpoint(saved(tmp_path, bare), "supernet")
    assert len(supernet.heads) == 0 and supernet.effbert.pooler is not None
    with torch.no_grad():
        close(supernet.trace(*parity.inputs).hidden_states[-1], parity.outputs["supernet/last_hidden"])
    with pytest.raises(ValueError, match="it is a student, so give its architecture"):
        import_checkpoint(saved(tmp_path, student(parity)), "supernet")
    with pytest.raises(ValueError, match="a supernet keeps all its heads: leave out --task"):
        import_checkpoint(saved(tmp_path, bare), "supernet", task="rte")
    more = multi_task(parity)[0]
    more["classifiers.8.weight"] = more["classifiers.0.weight"]
    with pytest.raises(ValueError, match=r"surplus: classifiers\.8\.weight \[3, 60\]$"):
        import_checkpoint(saved(tmp_path, more), "supernet")
    less = multi_task(parity)[0]
    del less["classifiers.2.bias"]
    for architecture, task in (("supernet", None), (parity.architectures["random0"], "qnli")):
        with pytest.raises(ValueError, match=r"weights missing: classifiers\.2\.bias \[2\]$"):
            import_checkpoint(saved(tmp_path, less), architecture, task=task)


def test_a_student_for_spans(parity, tmp_path):
    path = saved(tmp_path, student(parity, "squad1.1"))
    model = import_checkpoint(path, parity.architectures["released_head"], task="squad1.1")
    assert (model.config.doc_stride, model.config.max_query_length) == (32, 62)  # as it learnt
    supernet = parity.supernet("squad1.1")
    with torch.no_grad():
        output = model(*parity.inputs)
        expected = supernet.trace(*parity.inputs, parity.architectures["released_head"], "squad1.1").logits
    close(torch.stack((output.start_logits, output.end_logits), -1), expected)


def test_a_table_without_neighbours_is_the_768_wide_kind(tmp_path):
    from effbert.model import EffBertModel

    architecture = Architecture.parse("linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)")
    config = EffBertConfig(
        architecture=str(Architecture.uniform("4_1", 1)), vocab_size=20, embedding_size=None, hidden_size=12,
        intermediate_size=48, max_position_embeddings=9, num_attention_heads=2, combine="pad_released",
    )  # fmt: skip
    whole = EffBertModel(config, add_pooling_layer=False)
    model = import_checkpoint(saved(tmp_path, authors_names(whole)), architecture, num_attention_heads=2)
    assert (model.config.combine, model.config.embedding_size, model.config.intermediate_size) == (
        "pad_released", None, 48,
    )  # fmt: skip
    torch.testing.assert_close(model.layers[0].mlps[0].dense1.weight, whole.layers[0].mlps[0].dense1.weight[:24])


def test_an_imported_768_wide_supernet_is_what_its_named_student_begins_with(tmp_path):
    """With its own padding operations; how masked neighbours are embedded is nothing to a table without them."""
    sizes = {"vocab_size": 20, "max_position_embeddings": 9, "num_attention_heads": 12}
    own = {name: value for name, value in model_fields("efficientbert-tinybert6").items() if name != "architecture"}
    layers = Architecture.uniform("4_1", 6)
    config = EffBertConfig(architecture=str(layers), **own | sizes | {"combine": "pad_released"})
    with torch.device("meta"):
        supernet = Supernet(config)
    (tmp_path / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": [type(supernet).__name__], "neighbour_padding": "released"})
    )
    given = PretrainConfig("", teacher="", model=("efficientbert-tinybert6",), start_from=(str(tmp_path),))
    teacher = transformers.BertConfig(num_attention_heads=12)
    wanted = model_config(given, given.model[0], str(tmp_path), 0, teacher, {**sizes, "fit_size": 768})
    assert wanted.combine == "pad_released" and wanted.neighbour_padding == "zero"
    check_start(wanted, str(tmp_path))
    assert model_config(given, given.model[0], "", 0, teacher, {**sizes, "fit_size": 768}).combine == "pad"


def test_a_vocabulary_gives_it_a_tokenizer(parity, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words + [f"w{n}" for n in range(200 - len(words))]) + "\n")
    path, folder = saved(tmp_path, student(parity)), tmp_path / "out"
    given = ["import", str(path), "--architecture", str(parity.architectures["random0"]), "--output_dir", str(folder)]
    assert main([*given, "--vocab", str(tmp_path / "vocab.txt")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world")["input_ids"] == [2, 5, 6, 3]
    assert logits(parity, folder)[0].config.id2label[0] == "LABEL_0"


def wrong(parity, tmp_path, state=None, *more, architecture="random0"):
    path = saved(tmp_path, student(parity) if state is None else state)
    text = str(parity.architectures.get(architecture, architecture))
    return main(["import", str(path), "--architecture", text, "--output_dir", str(tmp_path / "out"), *more])


def wider_mlps(state):
    """Layer 2 has MLPs of twice the inner width: their first half is not what an architecture uses of them."""
    for name in [name for name in state if name.startswith("encoder.1.all_ffn") and "dense" in name]:
        dimension = {"dense1.weight": 0, "dense1.bias": 0, "dense2.weight": 1}.get(".".join(name.split(".")[-2:]))
        if dimension is not None:
            state[name] = torch.cat((state[name], state[name]), dimension)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("encoder.1.attention.key.bias"), "weights missing: encoder.1.attention.key.bias [60]\n"),
        (lambda s: s.update({"encoder.0.gate.weight": torch.ones(2)}), "surplus: encoder.0.gate.weight [2]\n"),
        (
            lambda s: s.update({"encoder.0.attention.key.bias": torch.ones(7)}),
            "encoder.0.attention.key.bias is [7], not [60]\n",
        ),
        (lambda s: s.pop("embeddings.token_embeddings.weight"), "lacks embeddings.token_embeddings.weight"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.2")], "2 layers, the architecture has 3"),
        (lambda s: [s.pop(k) for k in list(s) if "all_ffn.2" in k or "all_ffn.3" in k], "2 MLPs in layer 1"),
        (lambda s: s.pop("encoder.1.all_ffn.1.dense1.weight"), "missing: encoder.1.all_ffn.1.dense1.weight [60, 60]"),
        (lambda s: s.update({"encoder.1.all_ffn.3.gate": torch.ones(2)}), "surplus: encoder.1.all_ffn.3.gate [2]"),
        (lambda s: s.update({"encoder.scale": torch.ones(2)}), "surplus: encoder.scale [2]"),
        (lambda s: s.update({"encoder.0.all_ffn": torch.ones(2)}), "surplus: encoder.0.all_ffn [2]"),
        (lambda s: s.update({"encoder.0.all_ffn.odd.bias": torch.ones(2)}), "surplus: encoder.0.all_ffn.odd.bias [2]"),
        (lambda s: s.update({"encoder.0.all_ffn.4.bias": torch.ones(2)}), "surplus: encoder.0.all_ffn.4.bias [2]"),
        (lambda s: s.update({"classifier.weight": torch.ones(())}), "lacks classifier.weight"),
        (lambda s: s.pop("cls_pooler.dense.bias"), "missing: cls_pooler.dense.bias [60]"),
        (lambda s: s.update({"layers.0.norm.scale": torch.ones(2)}), "surplus: layers.0.norm.scale [2]"),
        (wider_mlps, "encoder.1.all_ffn.0.dense1.bias is [120], not [60], encoder.1.all_ffn.0.dense1.weight is [120,"),
        (wider_mlps, "(12 in all)\n"),
        (
            lambda s: s["encoder.1.attention.key.bias"].fill_(torch.nan),
            "not finite: encoder.1.attention.key.bias",
        ),
        (
            lambda s: s["classifier.bias"][:1].fill_(-torch.inf),
            "weights that are not finite: classifier.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(parity, tmp_path, capsys, change, said):
    state = {name: tensor.clone() for name, tensor in student(parity).items()}
    change(state)
    assert wrong(parity, tmp_path, state) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_wrong_input_is_one_line(parity, tmp_path, capsys):
    multi = {k: v for k, v in student(parity).items() if not k.startswith("classifier")}
    bare = dict(multi)
    multi |= {"classifiers.0.weight": torch.ones(3, 60), "classifiers.0.bias": torch.ones(3)}
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "same.txt").write_text("a\n" * 200)
    for state, more, said in (
        (None, ("--task", "sst-2"), "a head for classification with 3 outputs, task sst-2 needs classification with 2"),
        (None, ("--task", "imdb"), "--task imdb: the released heads are of"),
        (None, ("--num_attention_heads", "7"), "does not divide into 7 attention heads"),
        (None, ("--vocab", str(tmp_path / "vocab.txt")), "2 tokens, the checkpoint has 200"),
        (None, ("--vocab", "nowhere.txt"), "--vocab nowhere.txt: no such file"),
        (None, ("--vocab", str(tmp_path / "same.txt")), "same.txt: 199 of its 200 tokens are there twice"),
        (None, ("--vocab", str(tmp_path / "best_model.bin")), "best_model.bin: not UTF-8 text"),
        (bare, ("--task", "mnli"), "it has no head, and none for task mnli"),
        (multi, (), "none is named: give --task"),
        (multi, ("--task", "wnli"), "'wnli' is none of them"),
        ({"a": 1}, (), "holds no weights"),
    ):
        assert wrong(parity, tmp_path, state, *more) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "best_model.bin").write_bytes(b"not a checkpoint")
    given = ["--architecture", "efficientbert", "--output_dir", str(tmp_path / "out")]
    assert main(["import", str(tmp_path / "best_model.bin"), *given]) == 2
    assert "no file of tensors" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.bin"), *given]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert wrong(parity, tmp_path) == 2
    assert "out exists: give a folder that does not" in capsys.readouterr().err
