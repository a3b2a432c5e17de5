"""The final distillation: the winner and what it is compared with, all under one budget, scored on held-out rows.

Every row starts from weights that have seen the supernet's warm-up tokens: slices of the warm supernet where the row is
an architecture of the space, and a warm-up of its own for the plain BERT, whose MLP is no slice. (Of a supernet that
was given, --start_from, the tokens are its own; the plain BERT then has those of this run.) Each finished row is a JSON
file in <run>/final, so a resumed run redoes none.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture, bert_flops, count_flops, count_parameters, mlp_parameters
from effbert.card import SCORES, scores_text
from effbert.config import published
from effbert.data.tokenizer import save_tokenizer
from effbert.engine import Phase, forget
from effbert.evaluate import evaluate_rows
from effbert.files import atomic_dir, read_kept, write_atomic
from effbert.model import EffBertConfig, EffBertHeadModel, new_student
from effbert.search.latency import latency
from effbert.search.progress import Reporter
from effbert.search.record import LOSSES
from effbert.search.space import ArchitectureSpace
from effbert.student import Student, distil, warm_up
from effbert.supernet import Supernet, derive_config
from effbert.workspace import Workspace, best_step, model_inputs, note_windows, show

BEST, TEACHER_ROW = "best", "teacher.json"


@dataclass(frozen=True)
class Row:
    """A line of the final table. plain_width: 0 for an architecture of the space; else the inner width of the one gelu
    MLP a layer that makes a plain BERT (with the students' embedding, so that the MLPs alone differ)."""

    name: str
    architecture: Architecture
    plain_width: int = 0


def rows(
    workspace: Workspace, winner: Architecture, space: ArchitectureSpace, others: Sequence[Architecture] = ()
) -> list[Row]:
    """Winner, others of its Pareto front, published architecture at this size, plain BERT with as many parameters,
    random architectures, drawn alike whatever the samplers."""
    config = workspace.config
    layers = config.student.num_hidden_layers
    plain_width = equal_plain_width(winner, workspace.student_config())
    lines = [
        Row("winner", winner),
        *(Row(f"front {index}", other) for index, other in enumerate(others, start=1)),
        Row("published", published(layers)),
        Row("plain BERT", Architecture.uniform("1_1", layers), plain_width),
    ]
    for index in range(config.final.num_random):
        architecture = ArchitectureSpace.sample(space, random.generator(config.seed, "final", "random", index))
        lines.append(Row(f"random {index + 1}", architecture))
    return lines


def equal_plain_width(architecture: Architecture, config: EffBertConfig) -> int:
    """The inner width at which one MLP a layer has as many parameters as `architecture` has in its MLPs."""
    target = sum(mlp_parameters(structure, config) for structure in architecture.structures)
    hidden, layers = config.hidden_size, len(architecture.layers)
    return max(1, round((target / layers - 3 * hidden) / (2 * hidden + 1)))


def final_rows(
    workspace: Workspace, supernet: Supernet, lines: Sequence[Row], repeat: int, reporter: Reporter
) -> list[dict]:
    """Distil rows fully with seed `config.seed + repeat`, together and data-parallel, and score them on the held-out
    rows; or read what became of them. A row that diverged has no scores, but what its field "diverged" says."""
    folder, world = workspace.folder / "final", workspace.world
    folder.mkdir(exist_ok=True)
    files = {row.name: folder / f"{row.name.replace(' ', '-')}-{repeat}.json" for row in lines}
    phases = {row.name: _phase(workspace, row, repeat, files[row.name]) for row in lines}
    missing = [row for row in lines if not is_finished(files[row.name], row)]
    if missing:
        on_step = reporter.steps(f"final, {len(missing)} at once")
        begun = {
            row.name: initial_model(workspace, supernet, row, phases[row.name].sub("warm-up"), on_step)
            for row in missing
        }
        students = {name: Student(start.model, phases[name]) for name, start in begun.items() if not start.diverged}
        learning = replace(workspace, tasks=workspace.held_out)  # from all rows that are meant for it
        distilled = distil(learning, list(students.values()), workspace.config.final, on_step, world)
        outcomes = dict(zip(students, distilled, strict=True))
        for row in missing:
            start, outcome = begun[row.name], outcomes.get(row.name)
            seconds = start.seconds + (outcome.seconds if outcome else 0.0)
            diverged = outcome.diverged if outcome else start.diverged
            more = best_step(outcome) | {LOSSES: outcome.losses} if outcome else {}
            file = files[row.name]
            world.on_first(_keep, workspace, row, repeat, start.model, seconds, diverged, more, file, reporter)
    forget([phase.sub(part) for phase in phases.values() for part in ("warm-up", "general", "task")])
    return [read_row(files[row.name]) for row in lines]


def is_finished(file: Path, row: Row) -> bool:
    """Whether the file holds this row, and not one of another winner, of stages that began anew."""
    if not file.exists():
        return False
    found = read_row(file)
    return (found["architecture"], found["plain_width"]) == (str(row.architecture), row.plain_width)


def read_row(file: Path) -> dict:
    """What became of a row; ValueError where its file is damaged."""
    return read_kept(file, "distils this row anew", "architecture", "plain_width")


def _phase(workspace: Workspace, row: Row, repeat: int, file: Path) -> Phase:
    seed = workspace.config.seed + repeat
    return Phase(("final", row.name, repeat), seed, file.with_suffix(".pt"), str(row.architecture))


def _keep(
    workspace: Workspace,
    row: Row,
    repeat: int,
    model: EffBertHeadModel,
    seconds: float,
    diverged: str,
    more: dict,
    file: Path,
    reporter: Reporter,
) -> None:
    """Score a row and write its file, for the first winner that has scores best/ too; a row that diverged has none."""
    scores, jackknife = (None, []) if diverged else held_out(workspace, model)
    result = {
        "row": row.name,
        "repeat": repeat,
        "architecture": str(row.architecture),
        "plain_width": row.plain_width,
        "scores": scores,
        "jackknife": jackknife,
        "diverged": diverged,
        **costs(model, row.architecture, workspace.config.max_length),
        "seconds": seconds,
        **more,
    }
    if row.name == "winner":
        keep_winner(workspace, model, repeat, scores)
    write_atomic(file, json.dumps(result, indent=1))
    said = f"{show(scores)} held out, {result['parameters']:,} parameters" if scores else diverged
    reporter.say(f"final {row.name} (seed {workspace.config.seed + repeat}): {said}")


def keep_winner(workspace: Workspace, model: EffBertHeadModel, repeat: int, scores: dict | None) -> None:
    """best/ is the winner of the first repeat that did not diverge, and never that of stages which began anew."""
    if repeat == 0:
        shutil.rmtree(workspace.folder / BEST, ignore_errors=True)
    if scores and not (workspace.folder / BEST).exists():
        save_best(workspace, model, scores)


@dataclass(frozen=True)
class Start:
    """A student that has seen the warm-up tokens, with a head that depends on the seed alone. seconds: of a warm-up of
    its own. diverged: why that ended early, or ""."""

    model: EffBertHeadModel
    seconds: float = 0.0
    diverged: str = ""


def initial_model(workspace: Workspace, supernet: Supernet, row: Row, warm: Phase, on_step) -> Start:
    """What a row begins with."""
    config, spec = workspace.config, workspace.main_task.spec
    if row.plain_width:
        plain = derive_config(supernet.config, row.architecture, intermediate_size=row.plain_width)
        torch.manual_seed(random.key(warm.seed, "final", row.name, "init"))
        model = new_student(plain, spec.kind, spec.labels).to(workspace.device)
        (result,) = warm_up(workspace, [Student(model, warm)], 1.0, config.supernet, on_step, workspace.world)
        start = Start(model, result.seconds, f"{result.diverged} of its warm-up" if result.diverged else "")
    else:
        start = Start(supernet.extract(row.architecture, spec.name).to(workspace.device))
    fresh_head(start.model, random.key(warm.seed, "final", "head"))
    return start


@torch.no_grad()
def fresh_head(model: EffBertHeadModel, key: int) -> None:
    """New weights for pooler and head, drawn from `key`."""
    torch.manual_seed(key)
    for linear in (model.effbert.pooler, model.head_layer):
        if linear is not None:
            drawn = torch.randn(linear.weight.shape) * model.config.initializer_range
            linear.weight.copy_(drawn)
            linear.bias.zero_()


def held_out(workspace: Workspace, model) -> tuple[dict[str, float], list[float]]:
    """Metrics of the main task on its official validation rows, for a student or a teacher with a `trace`; and the
    first of them as `jackknife` gives it."""
    first = workspace.main_task.spec.metrics[0]
    scores = evaluate_rows(
        lambda batch: model.trace(*model_inputs(batch)).logits,
        workspace.held_out[workspace.main_task.spec.name],
        pad_token_id=workspace.pad_token_id,
        device=workspace.device,
    )
    scores.pop("roc_auc", None)
    return scores, scores.pop("jackknife")[first]


def costs(model: EffBertHeadModel, architecture: Architecture, length: int) -> dict:
    """Parameters and FLOPs of the deployed student, with pooler and head, and its CPU latency at `length`."""
    config = model.config
    parameters, flops = count_parameters(architecture, config), count_flops(architecture, config, length)
    pooled, head_tokens = (1, 1) if model.pooled else (0, length)
    return {
        "parameters": parameters.total + pooled * parameters.pooler + parameters.head(config.num_labels),
        "flops": flops.total + pooled * flops.pooler + flops.head(config.num_labels, head_tokens),
        **cpu_latency(model, config.vocab_size, length),
    }


def cpu_latency(model, vocab_size: int, length: int) -> dict[str, float]:
    """`latency` on the CPU, wherever the model is."""
    device = next(model.parameters()).device
    measured = latency(model.to("cpu"), vocab_size, length)
    model.to(device)
    return measured


def teacher_row(workspace: Workspace) -> dict:
    """The teacher's line of the table: scores on the held-out rows and what it costs (FLOPs of the encoder). Made once,
    kept in <run>/teacher.json."""
    file = workspace.folder / TEACHER_ROW
    if file.exists():
        return read_kept(file, "scores the teacher anew", "row", "scores")
    teacher = workspace.teachers[workspace.main_task.spec.name]
    config, length = teacher.config, workspace.config.max_length
    scores, jackknife = held_out(workspace, teacher)
    flops = bert_flops(length, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    row = {
        "row": "teacher",
        "repeat": 0,
        "architecture": "",
        "scores": scores,
        "jackknife": jackknife,
        "parameters": sum(parameter.numel() for parameter in teacher.model.parameters()),
        "flops": flops.total,
        **cpu_latency(teacher.model, config.vocab_size, length),
    }
    write_atomic(file, json.dumps(row, indent=1))
    return row


def save_best(workspace: Workspace, model: EffBertHeadModel, scores: dict[str, float]) -> None:
    """The deployed winner in <run>/best: config, safetensors, tokenizer, scores; without the training-only
    projection."""
    with atomic_dir(workspace.folder / BEST) as temporary:
        deployed(workspace, model).save_pretrained(temporary)
        save_tokenizer(workspace.student_tokenizer, temporary)
        (temporary / SCORES).write_text(scores_of(workspace, scores))


def scores_of(workspace: Workspace, scores: dict[str, float]) -> str:
    """Scores on the held-out rows as a saved student's folder holds them."""
    spec = workspace.main_task.spec
    return scores_text(spec, len(workspace.held_out[spec.name].raw.validation), scores)


def deployed(workspace: Workspace, model: EffBertHeadModel) -> EffBertHeadModel:
    """A copy of a student of the main task without the training-only projection."""
    spec = workspace.main_task.spec
    config = derive_config(model.config, Architecture.parse(model.config.architecture), fit_size=None)
    found = new_student(config, spec.kind, spec.labels)
    found.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "fit_dense" not in name})
    note_windows(found, workspace.config, spec.kind)
    return found
