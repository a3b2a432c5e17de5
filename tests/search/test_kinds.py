"""Whole searches on the other kinds of task and teacher, at the smallest sizes."""

import dataclasses
import io
import json
import random

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from effbert.answers import evaluate_saved
from effbert.config import PRESETS
from effbert.data.tokenizer import train_wordpiece
from effbert.search import run
from effbert.search.pareto import best_front
from effbert.search.progress import Reporter
from effbert.search.record import read_record
from effbert.search.run import run_search

WORDS = "the small model reads long words about trees and rivers in every quiet town near some old stone bridge".split()


def sentence(chance, length=12):
    return " ".join(chance.choice(WORDS) for _ in range(length))


def tiny(tmp_path, **changes):
    base = PRESETS["smoke"]()
    stage = dataclasses.replace(base.stage1, num_candidates=2, task_share=1.0)
    return dataclasses.replace(
        base,
        **{
            "output_dir": str(tmp_path / "run"),
            "tasks": (),
            "corpus_tokens": 1500,
            "max_train_rows": 48,
            "max_length": 48,
            "stage1": stage,
            "stage2": stage,
            "stage3": dataclasses.replace(stage, refit_every=1, rungs=(1.0,)),
            "final": dataclasses.replace(base.final, num_random=0),
            **changes,
        },
    )


def search(config):
    output = io.StringIO()
    return run_search(config, Reporter(Console(file=output, width=200))), output.getvalue()


def test_candidates_may_learn_from_another_text_than_the_rest(tmp_path, monkeypatch):
    """With a supernet of their own, and killed between the two, as if undisturbed."""
    chance, texts = random.Random(3), []
    for name, count in {"first": 60, "second": 20}.items():
        texts.append(tmp_path / f"{name}.txt")
        texts[-1].write_text("\n".join(sentence(chance, 30) + "." for _ in range(count)))
    config = tiny(tmp_path, corpus=(str(texts[1]),), candidate_corpus=(str(texts[0]),), agreement_candidates=2)
    config = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, general_share=1.0, rungs=(1.0,)))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "shared_supernet", killed)
        with pytest.raises(KeyboardInterrupt):
            search(config)
    folder = tmp_path / "run"
    assert (folder / "supernet-stage1").is_dir() and (folder / "supernet").is_dir()
    results, _ = search(config)
    whole, _ = search(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    assert results["winner"] == whole["winner"] and results["table"][1]["score"] == whole["table"][1]["score"]
    record = read_record(folder)
    assert {"supernet", "supernet-stage1", "stage3/supernet"} <= set(record.training)
    plain = dataclasses.replace(config, candidate_corpus=(), output_dir=str(tmp_path / "plain"))
    search(plain)
    same = load_file(folder / "supernet" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "plain" / "supernet" / "model.safetensors").items():
        assert torch.equal(tensor, same[name])  # of the same text
    own = load_file(folder / "supernet-stage1" / "model.safetensors")
    assert not torch.equal(own["effbert.layers.0.mlps.0.dense1.weight"], same["effbert.layers.0.mlps.0.dense1.weight"])
    seen = {name: read_record(tmp_path / name).stages["stage1"][1].attrs["tokens"] for name in ("run", "plain")}
    assert seen["run"] > seen["plain"]  # a longer text, the same rows
    with pytest.raises(ValueError, match="the candidates' corpus changed since this run began"):
        texts[0].write_text(texts[0].read_text() + "one more.\n")
        search(config)
    assert config.other_corpus == config.candidate_corpus
    assert dataclasses.replace(config, candidate_corpus=config.corpus).other_corpus == ()
    with pytest.raises(FileNotFoundError, match=r"no corpus at \./nowhere\.txt"):
        search(dataclasses.replace(config, candidate_corpus=("./nowhere.txt",), output_dir=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="leave one of them out"):
        dataclasses.replace(config, start_from=(str(folder / "supernet"),))


def write_squad(folder, rows=30):
    chance = random.Random(3)
    for split in ("train", "dev"):
        paragraphs = []
        for number in range(rows):
            context = sentence(chance, 20)
            word = context.split()[chance.randrange(20)]
            answer = {"text": word, "answer_start": context.index(word)}
            impossible = number % 3 == 0
            question = {
                "id": f"{split}{number}",
                "question": sentence(chance, 5),
                "is_impossible": impossible,
                "answers": [] if impossible else [answer],
            }
            paragraphs.append({"context": context, "qas": [question]})
        content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}-v2.0.json").write_text(json.dumps(content))


def test_a_search_on_spans_beside_a_classification_task(tmp_path):
    write_squad(tmp_path)
    windows = {"doc_stride": 6, "max_query_length": 4}
    config = tiny(tmp_path, task="squad2.0", tasks=("builtin-next",), data_dir=str(tmp_path), **windows)
    results, output = search(config)
    assert results["metric"] == "f1" and 0 <= results["table"][1]["score"] <= 1
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run" / "best")
    assert model.effbert.pooler is None and model.num_parameters() == results["table"][1]["parameters"]
    assert "task builtin-next" in output
    for place in ("best", "teacher/tasks/squad2.0"):
        config = json.loads((tmp_path / "run" / place / "config.json").read_text())
        assert {name: config[name] for name in windows} == windows
    scored = evaluate_saved(tmp_path / "run" / "best", "squad2.0", str(tmp_path))["validation"]
    assert scored["f1"] == results["table"][1]["score"]


def test_a_search_on_a_regression_task_of_ones_own(tmp_path):
    chance = random.Random(5)
    for name in ("train", "dev"):
        rows = [(sentence(chance), sentence(chance), chance.random() * 5) for _ in range(48)]
        lines = ["first,second,similarity", *(f"{a},{b},{score:.2f}" for a, b, score in rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    config = tiny(
        tmp_path,
        task="mine",
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "dev.csv"),
        text_columns=("first", "second"),
        label_column="similarity",
        task_kind="regression",
    )
    results, _ = search(config)
    assert results["metric"] == "pearson" and set(results["results"][0]["scores"]) == {"pearson", "spearman"}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    assert loaded.config.num_labels == 1


@pytest.mark.parametrize("family", ["Roberta", "Electra"])
def test_a_search_under_a_given_teacher_of_another_family(tmp_path, family):
    chance = random.Random(1)
    tokenizer = train_wordpiece([sentence(chance) for _ in range(50)], 200, max_length=60)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 32}
    special = {"Roberta": {"type_vocab_size": 1, "max_position_embeddings": 61}, "Electra": {"embedding_size": 16}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **special[family]
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(sentence(chance, 30) + "." for _ in range(60)))
    results, _ = search(tiny(tmp_path, teacher=str(tmp_path / "teacher"), corpus=(str(tmp_path / "text.txt"),)))
    assert [line["row"] for line in results["table"]][:4] == ["teacher", "winner", "published", "plain BERT"]
    student = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "best")
    assert student.vocab_size == len(tokenizer)
    assert student.position_offset == (1 if family == "Roberta" else 0)


def test_a_search_for_several_objectives_behind_a_filter_and_a_latency_limit(tmp_path):
    base = tiny(tmp_path)
    screened = dataclasses.replace(base.stage1, num_candidates=4, cohort=4, filter="w-pca", rungs=(1.0,))
    config = dataclasses.replace(
        base, stage1=screened, stage2=screened, minimize=("flops", "latency"), max_latency_ms=1e4,
        agreement_candidates=0, stage3=dataclasses.replace(base.stage3, num_candidates=6),
    )  # fmt: skip
    results, _ = search(config)
    stages = read_record(tmp_path / "run").stages
    for name, discarded in {"stage1": 2, "stage2": 1}.items():  # in stage 2 the winner of stage 1 stays beside half
        gone = [found for found in stages[name] if found.attrs.get("discarded") == "among the worst by the filter"]
        assert [found.state for found in gone] == ["pruned"] * discarded
        assert all({"latency_ms", "filter_score"} <= found.attrs.keys() for found in stages[name])
    agreed = json.loads((tmp_path / "run" / "agreement.json").read_text())
    filters = [entry["stage"] for entry in agreed if entry["what"].startswith("filter w-pca")]
    assert filters == ["stage1", "stage2"]
    best = best_front(stages["stage3"], config.minimize)
    rows = [row["architecture"] for row in results["table"] if row["row"] == "winner" or row["row"].startswith("front")]
    assert rows == [found.architecture for found in best[: 1 + config.final.num_front]]
