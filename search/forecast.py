"""What a search will cost, said before it starts: tokens, hours and memory of every part.

The one idea: time is tokens times seconds a token, of four kinds: a teacher's pass, a candidate's step, a step of the
whole supernet, and scoring. `measure` times these on a few real batches here; `assume` derives them from counted FLOPs
and an assumed rate. Tokens are those of the batches that will be drawn, padding included. Left out: loading data,
extracting candidates, the sampler, and what teachers take: training the run's own, fine-tuning for a task.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from effbert.architecture import Architecture, bert_flops, count_flops
from effbert.config import Budget, SearchStage, published
from effbert.data.batches import subset
from effbert.kernels import gradients_in_place
from effbert.mlm import new_bert
from effbert.model import new_student
from effbert.optim import Optimizer, TrainingArguments
from effbert.search.budget import cut, ladder
from effbert.search.population import BYTES_A_PARAMETER, room_for
from effbert.search.shared import mixed_tasks
from effbert.step import general_lesson
from effbert.supernet import FULL_STRUCTURE, Supernet, derive_config, supernet_config
from effbert.teacher import Teacher, load_model
from effbert.workspace import Workspace, model_inputs

WARM_UP_STEPS, TIMED_STEPS = 1, 3
BACKWARD = 3  # a step costs so many forward passes: forward, and a backward of twice its products


@dataclass(frozen=True)
class Rates:
    """Seconds a token: a teacher's forward pass, a candidate's training step without it, the whole supernet's, and a
    candidate's forward pass. source: where they are from."""

    teacher: float
    candidate: float
    supernet: float
    scoring: float
    source: str


@dataclass(frozen=True)
class Part:
    """A part of the search. tokens: of students in training, padding included; seconds: all of it, scoring too."""

    name: str
    candidates: int
    tokens: int
    seconds: float


def forecast(workspace: Workspace, rates: Rates) -> list[Part]:
    """Every part in its order; the final distillation last."""
    config = workspace.config
    together = room_for(workspace.device, largest_candidate(workspace), config.population)
    warm = config.supernet.num_train_epochs * general_tokens(workspace, 1.0, config.supernet)
    parts = [Part("supernet", 1, warm, warm * (rates.teacher + rates.supernet))]
    parts += [candidates(workspace, name, getattr(config, name), rates, together) for name in ("stage1", "stage2")]
    parts += [shared_weights(workspace, rates)]
    if config.agreement_candidates:
        alone = dataclasses.replace(
            config.stage1, num_candidates=config.agreement_candidates, cohort=config.agreement_candidates, rungs=(1.0,)
        )
        parts += [candidates(workspace, "alone", alone, rates, together)]
    rows = 3 + config.final.num_random
    tokens = student_tokens(workspace, config.final) * config.seeds
    seconds = tokens * (rows * rates.candidate + rates.teacher)
    seconds += config.seeds * warm * (rates.teacher + rates.candidate)  # the plain BERT warms up by itself
    return [*parts, Part("final", rows * config.seeds, rows * tokens, seconds)]


def candidates(workspace: Workspace, name: str, settings: SearchStage, rates: Rates, together: int) -> Part:
    """Trained candidates: every rung of every cohort; the teacher reads once for as many as train together."""
    cohorts, rest = divmod(settings.num_candidates, settings.cohort)
    tokens, seconds = 0, 0.0
    for size, times in ((settings.cohort, cohorts), (rest, 1)):
        for rung in ladder(settings, size) if size and times else ():
            each = student_tokens(workspace, cut(settings, rung.share))
            groups = -(-rung.places // together)
            scored = (settings.task_phase.num_train_epochs if rung.share == 1 else 1) * ranking_tokens(workspace)
            tokens += times * rung.places * each
            seconds += times * (
                rung.places * (each * rates.candidate + scored * rates.scoring) + groups * each * rates.teacher
            )
    return Part(name, settings.num_candidates, tokens, seconds)


def shared_weights(workspace: Workspace, rates: Rates) -> Part:
    """Stage 3: one supernet, one candidate's slices a step or three, over all tasks; then every candidate is scored."""
    settings = workspace.config.stage3
    tokens = settings.general_phase.num_train_epochs * general_tokens(
        workspace, settings.general_share, settings.general_phase
    )
    mixed = mixed_tasks(workspace, settings, 0)
    counts = Counter(task for task, _ in mixed.places)
    each = sum(counts[task] * plan.tokens.padded / len(plan) for task, plan in mixed.plans.items())
    tokens += round(settings.task_phase.num_train_epochs * each)
    students = 3 if workspace.config.weight_sharing == "sandwich" else 1
    scoring = settings.num_candidates * ranking_tokens(workspace) * rates.scoring
    return Part(
        "stage3", settings.num_candidates, tokens, tokens * (rates.teacher + students * rates.candidate) + scoring
    )


def student_tokens(workspace: Workspace, budget: Budget) -> int:
    """Tokens of one student's general and task distillation."""
    arguments = budget.task_phase
    rows = subset(workspace.main_task.train, budget.task_share)
    task = workspace.plan(rows, arguments.per_device_train_batch_size, "task", 0).tokens.padded
    general = general_tokens(workspace, budget.general_share, budget.general_phase)
    return budget.general_phase.num_train_epochs * general + arguments.num_train_epochs * task


def general_tokens(workspace: Workspace, share: float, arguments: TrainingArguments) -> int:
    """Tokens of one pass over a share of the corpus."""
    return workspace.general_plan(share, arguments.per_device_train_batch_size, 0).tokens.padded


def ranking_tokens(workspace: Workspace) -> int:
    """Tokens of the rows that rank candidates."""
    return workspace.plan(workspace.main_task.validation, 128, "ranking", 0).tokens.padded


def largest_candidate(workspace: Workspace) -> int:
    """Parameters of a candidate at the band's upper end."""
    return workspace.config.band(workspace.student_config())[1]


def assume(workspace: Workspace, flops_per_second: float) -> Rates:
    """Rates from counted FLOPs at max_length: products of linears and attention, nothing else."""
    length, config = workspace.config.max_length, workspace.student_config()
    layers, teacher = workspace.config.student.num_hidden_layers, workspace.teacher_config
    sizes = teacher.hidden_size, teacher.intermediate_size, teacher.num_hidden_layers
    student = count_flops(published(layers), config, length).total / length
    everything = count_flops(Architecture.uniform(FULL_STRUCTURE, layers), config, length).total / length
    return Rates(
        bert_flops(length, *sizes).total / length / flops_per_second,
        BACKWARD * student / flops_per_second,
        BACKWARD * everything / flops_per_second,
        student / flops_per_second,
        f"assumed: {flops_per_second:.3g} FLOP/s",
    )


def measure(workspace: Workspace) -> Rates:
    """Rates of a few steps on the first batches of the corpus, with fresh weights of the sizes that will train."""
    config, device = workspace.config, workspace.device
    given = load_model(config.teacher) if config.teacher else new_bert(workspace.teacher_config, config.seed)
    workspace.general_teacher = Teacher(given).to(device)
    lesson, layers = general_lesson(workspace), config.student.num_hidden_layers
    spec = workspace.main_task.spec
    torch.manual_seed(0)
    student = new_student(derive_config(workspace.student_config(), published(layers)), spec.kind, spec.labels).to(
        device
    )
    supernet = Supernet(supernet_config(workspace.student_config(), layers), [spec]).to(device)
    arguments = config.stage1.general_phase
    plan = workspace.general_plan(1.0, arguments.per_device_train_batch_size, 0)
    batches = [plan[index % len(plan)].to(device) for index in range(WARM_UP_STEPS + TIMED_STEPS)]

    def teach(index):
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            return lesson.teacher_of(batches[index])

    traces = [teach(index) for index in range(len(batches))]

    def step(model, trace_of):
        optimizer = Optimizer(model.train(), arguments, len(batches))
        loss_of = lesson.shared_loss(trace_of, model.effbert.fit_dense)

        def run(index):
            with gradients_in_place(), torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = loss_of(batches[index], index, traces[index])
            loss.backward()
            optimizer.step(index)

        return run

    def trace_of(model, **options):
        return lambda batch, number, targets: model.trace(*model_inputs(batch), targets=targets, **options)

    @torch.no_grad()
    def scoring(index):
        student.trace(*model_inputs(batches[index]))

    return Rates(
        _seconds_a_token(teach, batches, device),
        _seconds_a_token(step(student, trace_of(student, head=False)), batches, device),
        _seconds_a_token(step(supernet, trace_of(supernet)), batches, device),
        _seconds_a_token(scoring, batches, device),
        f"measured: {TIMED_STEPS} steps of {batches[0].input_ids.shape[0]} texts on {device}",
    )


def _seconds_a_token(run: Callable[[int], object], batches, device: torch.device) -> float:
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for index in range(WARM_UP_STEPS):
        run(index)
    wait()
    begun = time.perf_counter()
    for index in range(WARM_UP_STEPS, len(batches)):
        run(index)
    wait()
    return (time.perf_counter() - begun) / sum(batch.input_ids.numel() for batch in batches[WARM_UP_STEPS:])


def lines(workspace: Workspace, parts: Iterable[Part], rates: Rates) -> list[str]:
    """The forecast as text; hours of the final distillation stand apart from those of the search."""
    largest, parts = largest_candidate(workspace), list(parts)
    together = room_for(workspace.device, largest, workspace.config.population)
    said = [f"{rates.source}; up to {together} candidates at once, {BYTES_A_PARAMETER * largest / 2**20:,.0f} MiB each"]
    for part in parts:
        cost = f"{part.tokens / 1e6:12,.2f} M tokens {part.seconds / 3600:10.3f} h"
        said.append(f"{part.name:9}{part.candidates:7,} candidates {cost}")
    search = sum(part.seconds for part in parts if part.name != "final")
    return [*said, f"search {search / 3600:.3f} h, final distillation {parts[-1].seconds / 3600:.3f} h"]
