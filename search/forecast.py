"""What a search will cost, said before it starts: tokens, hours, memory and, where the GPU tells, kWh of every part.

The one idea: time is tokens times seconds a token, of five kinds: a teacher's pass and a step of its training, a
candidate's step, a step of the whole supernet, and scoring. `measure` times these on a few real batches here; `assume`
derives them from counted FLOPs and assumed rates. Tokens are those of the batches that will be drawn, padding included,
or follow from sizes that are only declared (effbert.bench.forecast). Left out: loading data, extracting candidates, the
sampler, compiling kernels on a GPU (about an hour for 1,000 candidates, see there), and what is saved where a CPU keeps
the teacher's outputs.
"""

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from effbert import graphs, threads
from effbert.architecture import Architecture, Dimensions, bert_flops, count_flops
from effbert.config import Budget, SearchConfig, SearchStage, published
from effbert.data.batches import Batch, BatchPlan, subset
from effbert.data.encode import EncodedTask
from effbert.engine import Phase, Trainee, train_together
from effbert.errors import first_line
from effbert.kernels import few_compilations
from effbert.mlm import new_bert
from effbert.model import new_student
from effbert.optim import TrainingArguments
from effbert.search.budget import cut, ladder
from effbert.search.population import BYTES_A_PARAMETER, room_for
from effbert.search.record import FIRST_SUPERNET
from effbert.search.shared import mixed_tasks
from effbert.step import general_lesson
from effbert.student import bytes_of_step
from effbert.supernet import FULL_STRUCTURE, Supernet, derive_config, supernet_config
from effbert.teacher import Teacher, load_model
from effbert.trace import Trace
from effbert.workspace import Workspace, answers, model_inputs

TIMED_STEPS = 3
POWER_SECONDS = 2.0  # of steps while the power is read: a GPU tells the mean of up to the last second
BACKWARD = 3  # a step costs so many forward passes: forward, and a backward of twice its products


@dataclass(frozen=True)
class Power:
    """What a GPU draws in W, None where it does not tell. source: where that is from, or why there is none. at_most: it
    is an upper bound."""

    watts: float | None
    source: str
    at_most: bool = False

    def kwh(self, seconds: float) -> float:
        """Energy of so many seconds."""
        return self.watts * seconds / 3.6e6


@dataclass(frozen=True)
class Rates:
    """Seconds a token: a teacher's forward pass, a step of its own training, a candidate's training step without the
    teacher beside others, the whole supernet's, and a candidate's forward pass. source: where they are from. power: of
    the GPU, None where nothing is known of one. alone: of a training step with nothing beside it, None for the same."""

    teacher: float
    tuning: float
    candidate: float
    supernet: float
    scoring: float
    source: str
    power: Power | None = None
    alone: float | None = None

    @property
    def by_itself(self) -> float:
        """Of a training step of a student that trains by itself."""
        return self.candidate if self.alone is None else self.alone


@dataclass(frozen=True)
class Part:
    """A part of the search. candidates: models that are trained or scored. tokens: of models in training, padding
    included; seconds: all of it, scoring too."""

    name: str
    candidates: int
    tokens: int
    seconds: float


class DataSizes(Protocol):
    """How many tokens, padding included, one pass over some data has."""

    main: str  # the main task
    tuned: Sequence[str]  # the tasks whose teachers the run fine-tunes

    def general(self, share: float, batch_size: int, of_candidates: bool = False) -> int:
        """A share of the corpus, or of the one that candidates learn from."""

    def of_candidates(self, share: float, batch_size: int) -> int:
        """A share of the main task's rows that candidates train on."""

    def ranking(self, share: float) -> int:
        """A share of the rows that rank candidates."""

    def task(self, name: str, share: float, batch_size: int) -> int:
        """A share of a task's rows that teachers and final rows train on."""

    def batches(self, name: str, share: float, batch_size: int) -> int:
        """How many batches these make."""

    def held_out(self, name: str) -> int:
        """A task's official validation rows."""

    def mixed(self, settings: SearchStage) -> float:
        """Stage 3's pass over all tasks."""


class Drawn:
    """Of the batches that will be drawn from a workspace's data."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.main = workspace, workspace.main_task.spec.name
        given = workspace.config.teacher and answers(workspace.teacher_config, workspace.main_task.spec)
        self.tuned = [name for name in workspace.tasks if not (given and name == self.main)]

    def general(self, share: float, batch_size: int, of_candidates: bool = False) -> int:
        """A share of the corpus, or of the one that candidates learn from."""
        corpus = self.workspace.candidate_corpus if of_candidates else self.workspace.corpus
        read = dataclasses.replace(self.workspace, corpus=corpus)
        return read.general_plan(share, batch_size, 0).tokens.padded

    def of_candidates(self, share: float, batch_size: int) -> int:
        """A share of the main task's rows that candidates train on."""
        return self._plan(self.workspace.main_task.train, share, batch_size).tokens.padded

    def ranking(self, share: float) -> int:
        """A share of the rows that rank candidates."""
        return self._scored(self.workspace.main_task.ranked_on(share))

    def task(self, name: str, share: float, batch_size: int) -> int:
        """A share of a task's rows that teachers and final rows train on."""
        return self._plan(self.workspace.held_out[name].train, share, batch_size).tokens.padded

    def batches(self, name: str, share: float, batch_size: int) -> int:
        """How many batches these make."""
        return len(self._plan(self.workspace.held_out[name].train, share, batch_size))

    def held_out(self, name: str) -> int:
        """A task's official validation rows."""
        return self._scored(self.workspace.held_out[name])

    def _plan(self, rows, share: float, batch_size: int) -> BatchPlan:
        return self.workspace.plan(subset(rows, share), batch_size, "task", 0)

    def _scored(self, task: EncodedTask) -> int:
        return self.workspace.plan(task.validation, 128, "ranking", 0).tokens.padded

    def mixed(self, settings: SearchStage) -> float:
        """Stage 3's pass over all tasks."""
        mixed = mixed_tasks(self.workspace, settings, 0)
        counts = Counter(task for task, _ in mixed.places)
        return sum(counts[task] * plan.tokens.padded / len(plan) for task, plan in mixed.plans.items())


def forecast(config: SearchConfig, data: DataSizes, rates: Rates, together: int) -> list[Part]:
    """Every part in its order, the final distillation last. together: candidates that train at once."""
    parts = [teachers(config, data, rates)] if data.tuned or not config.teacher else []
    if config.other_corpus:
        first = _passes(config.supernet, partial(data.general, 1.0, of_candidates=True))
        parts.append(Part(FIRST_SUPERNET, 1, first, first * (rates.teacher + rates.supernet)))
    warm = _passes(config.supernet, partial(data.general, 1.0))
    if not config.start_from:
        parts.append(Part("supernet", 1, warm, warm * (rates.teacher + rates.supernet)))
    for name in ("stage1", "stage2"):
        parts.append(candidates(name, getattr(config, name), data, rates, together, staying=int(name == "stage2")))
    parts.append(shared_weights(config, data, rates))
    if config.agreement_candidates:
        alone = dataclasses.replace(
            config.stage1, num_candidates=config.agreement_candidates, cohort=config.agreement_candidates, rungs=(1.0,),
            filter="none",
        )  # fmt: skip
        parts.append(candidates("alone", alone, data, rates, together))
    rows = 3 + config.final.num_random + (config.final.num_front if config.minimize else 0)  # at most
    tokens = student_tokens(data, config.final) * config.seeds
    seconds = tokens * (rows * rates.candidate + rates.teacher)
    scored = times_scored(config.final.task_phase, partial(data.batches, data.main, config.final.task_share))
    seconds += config.seeds * rows * scored * data.held_out(data.main) * rates.scoring
    seconds += config.seeds * warm * (rates.teacher + rates.by_itself)  # the plain BERT's warm-up
    return [*parts, Part("final", rows * config.seeds, rows * tokens + config.seeds * warm, seconds)]


def teachers(config: SearchConfig, data: DataSizes, rates: Rates) -> Part:
    """The run's own teacher on text where none is given, then fine-tuning, a teacher a task."""
    settings, scored = config.teacher_model, 0
    tokens = 0 if config.teacher else _passes(settings.pretraining, partial(data.general, 1.0))
    for name in data.tuned:
        arguments = settings.finetuning_on(name)
        tokens += _passes(arguments, partial(data.task, name, 1.0))
        scored += times_scored(arguments, partial(data.batches, name, 1.0)) * data.held_out(name)
    return Part("teachers", len(data.tuned), tokens, tokens * rates.tuning + scored * rates.teacher)


def candidates(
    name: str, settings: SearchStage, data: DataSizes, rates: Rates, together: int, staying: int = 0
) -> Part:
    """Trained candidates: every rung of every cohort; the teacher reads once for as many as train together. staying: of
    the first cohort, those that no filter discards."""
    sizes = Counter(
        (min(settings.cohort, settings.num_candidates - first), staying * (first == 0))
        for first in range(0, settings.num_candidates, settings.cohort)
    )
    tokens, seconds = 0, 0.0
    for (size, safe), times in sizes.items():
        trained = safe + (settings.kept(size - safe) if size > safe else 0)
        for rung in ladder(settings, trained):
            each = student_tokens(data, cut(settings, rung.share), of_candidates=True)
            groups = -(-rung.places // together)
            every = rung.share == 1 and settings.scored_epochs == "all"
            times_ranked = settings.task_phase.num_train_epochs if every else 1
            scored = times_ranked * data.ranking(settings.ranking_share)
            tokens += times * rung.places * each
            seconds += times * (
                rung.places * (each * rates.candidate + scored * rates.scoring) + groups * each * rates.teacher
            )
    return Part(name, settings.num_candidates, tokens, seconds)


def shared_weights(config: SearchConfig, data: DataSizes, rates: Rates) -> Part:
    """Stage 3: one supernet, one candidate's slices a step or three, over all tasks; then every candidate is scored."""
    settings = config.stage3
    tokens = _passes(settings.general_phase, partial(data.general, settings.general_share))
    tokens += round(settings.task_phase.num_train_epochs * data.mixed(settings))
    students = 3 if config.weight_sharing == "sandwich" else 1
    scoring = settings.num_candidates * data.ranking(settings.ranking_share) * rates.scoring
    return Part(
        "stage3", settings.num_candidates, tokens, tokens * (rates.teacher + students * rates.by_itself) + scoring
    )


def times_scored(task: TrainingArguments, batches_of: Callable[[int], int]) -> int:
    """How often a phase scores what it trains to find its best step. batches_of: rows of one -> batches of an epoch."""
    if not task.load_best_model_at_end:
        return 0
    of_epoch = -(-batches_of(task.per_device_train_batch_size) // task.gradient_accumulation_steps)
    return task.num_train_epochs * (1 + ((of_epoch - 1) // task.eval_steps if task.eval_steps else 0))


def student_tokens(data: DataSizes, budget: Budget, of_candidates: bool = False) -> int:
    """Tokens of one student's general and task distillation: of a candidate, or of a final row."""
    rows = data.of_candidates if of_candidates else partial(data.task, data.main)
    general = _passes(budget.general_phase, partial(data.general, budget.general_share, of_candidates=of_candidates))
    return general + _passes(budget.task_phase, partial(rows, budget.task_share))


def _passes(arguments: TrainingArguments, tokens_of: Callable[[int], int]) -> int:
    """Tokens of all epochs of a phase; tokens_of: batch size -> those of one."""
    return arguments.num_train_epochs * tokens_of(arguments.per_device_train_batch_size)


def largest_candidate(config: SearchConfig, dims: Dimensions) -> int:
    """Parameters of a candidate at the band's upper end."""
    return config.band(dims)[1]


def largest_cohort(config: SearchConfig) -> int:
    """How many candidates are evaluated at once, at most."""
    return max(config.stage1.cohort, config.stage2.cohort)


def of_workspace(workspace: Workspace, rates: Rates) -> list[Part]:
    """The forecast for this data and this device."""
    return forecast(workspace.config, Drawn(workspace), rates, _together(workspace))


def _together(workspace: Workspace) -> int:
    largest = largest_candidate(workspace.config, workspace.student_config())
    return room_for(workspace.device, largest, workspace.config.population)


def assume(
    config: SearchConfig, dims: Dimensions, teacher, teaching: float, training: float, tuning: float | None = None
) -> Rates:
    """Rates from counted FLOPs at max_length: products of linears and attention, nothing else.

    dims: the students'; teacher: a config with BERT's names. teaching, training, tuning: FLOP/s of the teacher's
    forward pass, of everything the students do, and of the teacher's own training, None for as much.
    """
    length, layers = config.max_length, config.student.num_hidden_layers
    sizes = teacher.hidden_size, teacher.intermediate_size, teacher.num_hidden_layers
    student = count_flops(published(layers), dims, length).total / length
    everything = count_flops(Architecture.uniform(FULL_STRUCTURE, layers), dims, length).total / length
    said = f"{teaching:.3g}" if teaching == training else f"{teaching:.3g} (teacher), {training:.3g} (students)"
    reading = bert_flops(length, *sizes).total / length
    return Rates(
        reading / teaching,
        BACKWARD * reading / (tuning or training),
        BACKWARD * student / training,
        BACKWARD * everything / training,
        student / training,
        f"assumed: {said} FLOP/s",
    )


def measure(workspace: Workspace) -> Rates:
    """Rates of a few steps on the first batches of the corpus, with fresh weights of the sizes that will train, as many
    candidates side by side as the device takes; on an NVIDIA GPU the power too, of their steps with the teacher's
    passes."""
    config, device = workspace.config, workspace.device
    given = load_model(config.teacher) if config.teacher else new_bert(workspace.teacher_config, config.seed)
    given = given.to(device).requires_grad_(True)
    layers = config.student.num_hidden_layers
    spec = workspace.main_task.spec
    torch.manual_seed(0)
    student_config = derive_config(workspace.student_config(), published(layers))
    students = [new_student(student_config, spec.kind, spec.labels).to(device) for _ in range(_side_by_side(workspace))]
    supernet = Supernet(supernet_config(workspace.student_config(), layers), [spec]).to(device)
    arguments = config.stage1.general_phase
    batches = _first_batches(workspace, arguments)
    tuning = 0.0
    if Drawn(workspace).tuned or not config.teacher:
        phase = config.teacher_model.finetuning
        tuning = _training(_tuned(given), _first_batches(workspace, phase), phase, device)
    workspace.general_teacher = Teacher(given)
    lesson = general_lesson(workspace)

    def teach(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            return lesson.teacher_of(batch)

    traces = [teach(batch) for batch in batches]
    scored = students[0].eval()

    @torch.no_grad()
    def scoring(batch):
        scored.trace(*model_inputs(batch))

    reading, answering = _seconds_a_token(teach, batches, device), _seconds_a_token(scoring, batches, device)
    with few_compilations():  # as candidates do
        candidate = _training(_trainees(workspace, students, arguments, traces), batches, arguments, device)
    alone = None
    if len(students) > 1:
        alone = _training(_trainees(workspace, students[:1], arguments, traces), batches, arguments, device)
    step = batches[0].input_ids.numel() * (reading + len(students) * candidate)

    def train(steps: int, on_step: Callable[[object], None]) -> None:
        plan, once = [batches[index % len(batches)] for index in range(steps)], _plain(arguments, 1)
        learners = _trainees(workspace, students, arguments)
        with few_compilations():
            train_together(learners, lambda epoch: plan, once, share=lesson.teacher_of, device=device, on_step=on_step)

    power = measure_power(train, step, device)
    return Rates(
        reading,
        tuning,
        candidate,
        _training(_trainees(workspace, [supernet], arguments, traces), batches, arguments, device),
        answering,
        f"measured: {TIMED_STEPS} steps of {batches[0].input_ids.shape[0]} texts on {device}, "
        f"candidates {len(students)} at a time",
        power,
        alone,
    )


def _side_by_side(workspace: Workspace) -> int:
    """How many candidates the device works on at the same time, at most."""
    at_once = graphs.STREAMS if workspace.device.type == "cuda" else min(torch.get_num_threads(), threads.MOST)
    return min(at_once, _together(workspace), largest_cohort(workspace.config))


def _first_batches(workspace: Workspace, arguments: TrainingArguments) -> list[Batch]:
    """TIMED_STEPS of the corpus, on the device."""
    plan = workspace.general_plan(1.0, arguments.per_device_train_batch_size, 0)
    return [plan[index % len(plan)].to(workspace.device) for index in range(TIMED_STEPS)]


def _trainees(
    workspace: Workspace, models: Sequence, arguments: TrainingArguments, traces: Sequence[Trace] = ()
) -> list[Trainee]:
    """Models that learn from what they share of a batch, or from the teacher's traces of the batches in turn."""
    lesson = general_lesson(workspace)

    def loss_of(encoder):
        loss = lesson.shared_loss(
            lambda batch, number, targets: encoder.trace(*model_inputs(batch), targets=targets), encoder.fit_dense
        )
        if not traces:
            return loss
        return lambda batch, number, _: loss(batch, number, traces[number % len(traces)])

    return [
        Trainee(
            model,
            loss_of(model.effbert),
            Phase(("dry run", place), workspace.config.seed),
            alike=True,
            step_bytes=bytes_of_step(workspace, model, arguments),
        )
        for place, model in enumerate(models)
    ]


def _tuned(model) -> list[Trainee]:
    """A BERT whose encoder trains, with the mean square of its outputs for a loss."""
    encoder = getattr(model, model.base_model_prefix, model)

    def loss_of(batch: Batch, number: int, _) -> torch.Tensor:
        input_ids, attention_mask, _ = model_inputs(batch)
        return encoder(input_ids, attention_mask).last_hidden_state.float().square().mean()

    return [Trainee(encoder, loss_of, Phase(("dry run", "teacher"), 0))]


def _plain(arguments: TrainingArguments, epochs: int) -> TrainingArguments:
    """The same for so many epochs with an update for every batch, where nothing is scored."""
    return dataclasses.replace(
        arguments,
        num_train_epochs=epochs,
        gradient_accumulation_steps=1,
        load_best_model_at_end=False,
        eval_steps=0,
    )


def _training(
    trainees: Sequence[Trainee], batches: Sequence[Batch], arguments: TrainingArguments, device: torch.device
) -> float:
    """Seconds of a step of models that train together, for each model and token: of the last time round the batches.
    Before it kernels are compiled and, on a GPU, steps recorded. ValueError where they do not come so far."""
    ends, steps, epochs = [], [], 3 if device.type == "cuda" else 2

    def on_step(_) -> None:
        steps.append(None)
        if len(steps) % len(batches) == 0:
            _wait(device)
            ends.append(time.perf_counter())

    results = train_together(
        trainees, lambda epoch: batches, _plain(arguments, epochs), device=device, on_step=on_step
    )  # fmt: skip
    short = [result.diverged for result in results if result.steps < epochs * len(batches)]
    if short or len(steps) != epochs * len(batches):
        reason = short[0] if short else f"memory does not hold {len(trainees)} at once: give --population"
        raise ValueError(f"a dry run's {len(steps)} steps tell nothing ({reason}); --flops_per_second needs none")
    return (ends[-1] - ends[-2]) / len(trainees) / sum(batch.input_ids.numel() for batch in batches)


def _seconds_a_token(run: Callable[[Batch], object], batches: Sequence[Batch], device: torch.device) -> float:
    """Of the second time round; the first compiles kernels."""
    for _ in range(2):
        _wait(device)
        begun = time.perf_counter()
        for batch in batches:
            run(batch)
        _wait(device)
    return (time.perf_counter() - begun) / sum(batch.input_ids.numel() for batch in batches)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_power(
    train: Callable[[int, Callable[[object], None]], None], step_seconds: float, device: torch.device
) -> Power | None:
    """What the device draws in training: the mean of what is read in the second half of POWER_SECONDS. None where it is
    no NVIDIA GPU. train: takes so many steps, of about `step_seconds` each, and calls a function after each."""
    read = power_reader(device)
    if read is None:
        return None
    readings, errors = [], []

    def on_step(_) -> None:
        try:
            readings.append(read())  # while the device still works on it
        except Exception as error:  # NVML's own have no base that is there without it
            errors.append(error)
        _wait(device)

    train(max(1, math.ceil(POWER_SECONDS / step_seconds)), on_step)
    if errors:
        return Power(None, f"the GPU's power draw cannot be read: {first_line(errors[0])}")
    return Power(statistics.mean(readings[len(readings) // 2 :]), "measured in training")


def power_reader(device: torch.device) -> Callable[[], float] | None:
    """Reads the W that an NVIDIA GPU draws (needs nvidia-ml-py); None for another device."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return lambda: torch.cuda.power_draw(device) / 1000


def lines(parts: Sequence[Part], rates: Rates, config: SearchConfig, together: int, largest: int) -> list[str]:
    """The forecast as text; the time of the final distillation stands apart from that of the search. together:
    candidates that memory holds in training, or --population. largest: parameters of the largest candidate."""
    most = min(together, largest_cohort(config))
    each = f"{BYTES_A_PARAMETER * largest / 2**20:,.0f} MiB each"
    limit = f"--population {config.population}" if config.population else f"memory holds {together} candidates at once"
    said = [f"{rates.source}; {most} candidates train at once, {each}; {limit}"]
    said += _of_power(rates.power)
    width = 1 + max(len(part.name) for part in parts)
    for part in parts:
        cost = f"{part.tokens / 1e6:12,.2f} M tokens {duration(part.seconds):>12}"
        said.append(
            f"{part.name:{width}}{part.candidates:7,} models {cost}{_energy(rates.power, part.seconds, ' ', 10)}"
        )
    both = ("search", 3600 * search_hours(parts)), ("final distillation", parts[-1].seconds)
    sums = (f"{name} {duration(seconds)}{_energy(rates.power, seconds, ' and ')}" for name, seconds in both)
    return [*said, ", ".join(sums)]


def duration(seconds: float) -> str:
    """Hours; minutes or seconds where these are few."""
    if seconds >= 360:
        return f"{seconds / 3600:.3f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _of_power(power: Power | None) -> list[str]:
    if power is None:
        return []
    if power.watts is None:
        return [f"no kWh: {power.source}"]
    return [f"kWh: of the GPU alone, at {power.watts:.0f} W, {power.source}"]


def _energy(power: Power | None, seconds: float, before: str, width: int = 0) -> str:
    if power is None or power.watts is None:
        return ""
    return f"{before}{'at most ' if power.at_most else ''}{power.kwh(seconds):{width}.3f} kWh"


def search_hours(parts: Sequence[Part]) -> float:
    """Hours of all parts but the final distillation."""
    return sum(part.seconds for part in parts if part.name != "final") / 3600


def lines_of_workspace(workspace: Workspace, rates: Rates) -> list[str]:
    """The forecast for this data and this device, as text."""
    largest = largest_candidate(workspace.config, workspace.student_config())
    return lines(of_workspace(workspace, rates), rates, workspace.config, _together(workspace), largest)
