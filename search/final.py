"""The final distillation: the winner and what it is compared with, all under one budget, scored on held-out rows.

Every row starts from weights that have seen the supernet's warm-up tokens: slices of the warm supernet where the row is
an architecture of the space, and a warm-up of its own for the plain BERT, whose MLP is no slice. Each finished row is a
JSON file in <run>/final, so a resumed run redoes none.
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch

from effbert import random
from effbert.architecture import (
    PUBLISHED,
    Architecture,
    bert_flops,
    count_flops,
    count_parameters,
    mlp_parameters,
)
from effbert.engine import Phase, forget, train
from effbert.evaluate import evaluate
from effbert.files import atomic_dir, write_atomic
from effbert.model import EffBertConfig, EffBertForQuestionAnswering, EffBertForSequenceClassification
from effbert.search.progress import Reporter
from effbert.search.space import Space
from effbert.search.stages import distil
from effbert.step import general_loss
from effbert.supernet import Supernet, derive_config
from effbert.workspace import Workspace, model_inputs, show

LATENCY_RUNS = 20


@dataclass(frozen=True)
class Row:
    """A line of the final table: an architecture, and the MLP width that stands for ratio 1."""

    name: str
    architecture: Architecture
    intermediate_size: int


def rows(workspace: Workspace, winner: Architecture, space: Space) -> list[Row]:
    """Winner, published architecture at this size (where it has as many layers), plain BERT, random architectures."""
    config = workspace.config
    width, layers = config.student.intermediate_size, config.student.num_hidden_layers
    lines = [Row("winner", winner, width)]
    published = Architecture.parse(PUBLISHED)
    if len(published.layers) == layers:
        lines.append(Row("published", published, width))
    plain_width = equal_plain_width(winner, workspace.student_config())
    lines.append(Row("plain BERT", Architecture.uniform("1_1", layers), plain_width))
    for index in range(config.final.num_random):
        architecture = space.sample(random.generator(config.seed, "final", "random", index))
        lines.append(Row(f"random {index + 1}", architecture, width))
    return lines


def equal_plain_width(architecture: Architecture, config: EffBertConfig) -> int:
    """The inner width at which one gelu MLP a layer has as many parameters as `architecture` has in its MLPs."""
    target = sum(mlp_parameters(structure, config) for structure in architecture.structures)
    hidden, layers = config.hidden_size, len(architecture.layers)
    per_unit = layers * (2 * hidden + 1)
    return max(1, round((target - layers * 3 * hidden) / per_unit))


def final_row(workspace: Workspace, supernet: Supernet, row: Row, repeat: int, reporter: Reporter) -> dict:
    """Distil one row fully with seed `config.seed + repeat` and score it on the held-out rows, or read its result."""
    config = workspace.config
    folder = workspace.folder / "final"
    folder.mkdir(exist_ok=True)
    name = row.name.replace(" ", "-")
    result_file = folder / f"{name}-{repeat}.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    started = time.monotonic()
    seed = config.seed + repeat
    phase = Phase(("final", row.name, repeat), seed, folder / f"{name}-{repeat}.pt", str(row.architecture))
    phases = [phase.sub(part) for part in ("warm-up", "general", "task")]
    model = initial_model(workspace, supernet, row, seed, phases[0])
    settings = config.final
    reason, _ = distil(
        workspace,
        model,
        phases[1:],
        settings.general_share,
        settings.general_phase,
        1.0,
        settings.task_phase,
        seed,
        score_epochs=False,
    )
    if reason is not None:
        raise ValueError(f"final distillation of {row.name}: {reason}: lower the learning rates of --final")
    scores = held_out_scores(workspace, model)
    result = {
        "row": row.name,
        "repeat": repeat,
        "architecture": str(row.architecture),
        "intermediate_size": row.intermediate_size,
        "scores": scores,
        **costs(model, row.architecture, config.max_length),
        "seconds": time.monotonic() - started,
    }
    if row.name == "winner" and repeat == 0:
        save_best(workspace, model)
    write_atomic(result_file, json.dumps(result, indent=1))
    forget(phases)
    reporter.say(f"final {row.name} (seed {seed}): {show(scores)} held out, {result['parameters']:,} parameters")
    return result


def initial_model(workspace: Workspace, supernet: Supernet, row: Row, seed: int, warm_up: Phase):
    """A student that has seen the warm-up tokens, with a head that depends on the seed alone."""
    config, task = workspace.config, workspace.main_task
    if row.intermediate_size == config.student.intermediate_size:
        model = supernet.extract(row.architecture, task.spec.name)
    else:
        like = derive_config(supernet.config, row.architecture, intermediate_size=row.intermediate_size)
        labels = task.spec.labels or [f"LABEL_{index}" for index in range(task.spec.num_labels)]
        like.id2label, like.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        torch.manual_seed(random.key(seed, "final", row.name, "init"))
        spans = task.spec.kind == "spans"
        model = (EffBertForQuestionAnswering if spans else EffBertForSequenceClassification)(like)
        model = model.to(workspace.device)
        result = train(
            model,
            lambda epoch: workspace.general_plan(1.0, config.supernet.per_device_train_batch_size, epoch),
            general_loss(
                workspace,
                lambda batch, number: model.trace(*model_inputs(batch), head=False),
                model.effbert.fit_dense,
            ),
            config.supernet,
            warm_up,
            device=workspace.device,
        )
        if not result.finished:
            raise ValueError(f"the warm-up of {row.name} diverged: lower --supernet.learning_rate")
    torch.manual_seed(random.key(seed, "final", "head"))
    with torch.no_grad():
        for linear in (model.effbert.pooler, model.classifier):
            if linear is not None:
                linear.weight.normal_(std=model.config.initializer_range)
                linear.bias.zero_()
    return model.to(workspace.device)


def held_out_scores(workspace: Workspace, model) -> dict[str, float]:
    """Metrics of the main task on its official validation rows, for a student or a teacher with a `trace`."""
    task = workspace.held_out[workspace.main_task.spec.name]
    return evaluate(
        lambda batch: model.trace(*model_inputs(batch)).logits,
        task,
        pad_token_id=workspace.pad_token_id,
        device=workspace.device,
    )


def costs(model, architecture: Architecture, length: int) -> dict:
    """Parameters and FLOPs of the deployed student, with pooler and head, and its CPU latency at `length`."""
    config = model.config
    parameters, flops = count_parameters(architecture, config), count_flops(architecture, config, length)
    pooled = model.effbert.pooler is not None
    head_tokens = 1 if pooled else length
    return {
        "parameters": parameters.total + pooled * parameters.pooler + parameters.head(config.num_labels),
        "flops": flops.total + pooled * flops.pooler + flops.head(config.num_labels, head_tokens),
        **latency(model, config, length),
    }


def latency(model, config, length: int) -> dict[str, float]:
    """Median and quartile distance, in ms, of `LATENCY_RUNS` forward passes of one sequence in fp32 on the CPU."""
    device = next(model.parameters()).device
    model.eval().to("cpu")
    ids = torch.arange(length)[None] % config.vocab_size
    times = []
    with torch.inference_mode():
        for run in range(LATENCY_RUNS + 3):
            begun = time.perf_counter()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            if run >= 3:
                times.append(1e3 * (time.perf_counter() - begun))
    model.to(device)
    quartiles = statistics.quantiles(times, n=4)
    return {"latency_ms": statistics.median(times), "latency_spread_ms": quartiles[2] - quartiles[0]}


def teacher_row(workspace: Workspace) -> dict:
    """The teacher's line of the table: scores on the held-out rows and what it costs."""
    teacher = workspace.teachers[workspace.main_task.spec.name]
    config, length = teacher.config, workspace.config.max_length
    flops = bert_flops(length, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    return {
        "row": "teacher",
        "repeat": 0,
        "architecture": "",
        "scores": held_out_scores(workspace, teacher),
        "parameters": sum(parameter.numel() for parameter in teacher.model.parameters()),
        "flops": flops.total + flops.pooler,
        **latency(teacher.model, config, length),
    }


def save_best(workspace: Workspace, model) -> None:
    """The deployed winner in <run>/best: config, safetensors, tokenizer; without the training-only projection."""
    projection, model.effbert.fit_dense = model.effbert.fit_dense, None
    fit_size, model.config.fit_size = model.config.fit_size, None
    try:
        with atomic_dir(workspace.folder / "best") as temporary:
            model.save_pretrained(temporary)
            workspace.tokenizer.save_pretrained(temporary)
    finally:
        model.effbert.fit_dense, model.config.fit_size = projection, fit_size
