"""Runs of one thing, each in a folder of its own: a teacher, general distillation, the distillation of one model.

Each is a part of a search done alone, by the same functions; what it made is in <output_dir>/model, what came of it in
results.json, and the same command again goes on where it stopped or says what there is. Started by torchrun or
accelerate, all processes share every batch.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from effbert import random
from effbert.config import (
    DistillConfig,
    PretrainConfig,
    RunConfig,
    StudentArguments,
    TeacherConfig,
    as_dict,
)
from effbert.engine import Phase, forget
from effbert.files import remove_partial, write_atomic
from effbert.model import EffBertConfig, EffBertModel, new_student, parse_architecture
from effbert.parallel import ALONE, World
from effbert.search.final import costs, deployed, fresh_head, held_out_scores
from effbert.search.progress import Reporter
from effbert.search.study import RunFolder
from effbert.start import check_start, load_start, model_config
from effbert.student import Student, distil, distil_generally
from effbert.supernet import Supernet, supernet_config
from effbert.teacher import Teacher, load_model, read_config, student_vocabulary
from effbert.workspace import (
    Workspace,
    answers,
    fine_tune,
    keep,
    must_finish,
    open_teachers,
    open_workspace,
    show,
    teacher_scores,
)

RESULTS, MODEL = "results.json", "model"


def run_teacher(config: TeacherConfig, reporter: Reporter | None = None, world: World = ALONE) -> dict:
    """Fine-tune an encoder on a task: a transformers model in <output_dir>/model. Returns results.json."""
    with opened(config, reporter, world) as (workspace, say, steps):
        task, target = workspace.main_task, workspace.folder / MODEL
        phase = Phase(("teacher", "task", task.spec.name), config.seed, workspace.folder / "training.pt")
        if not target.exists():
            model, result = fine_tune(workspace, config.teacher, task, config.finetuning, phase, say, steps, world)
            must_finish(result, f"fine-tuning the teacher on {task.spec.name}", "--finetuning.learning_rate")
            world.on_first(lambda: keep(model, target, result, tokenizer=workspace.tokenizer))
        forget([phase])

        def conclude() -> dict:
            model = load_model(target, task.spec.kind).to(workspace.device)
            return {"task": task.spec.name, "scores": teacher_scores(workspace, model, task), **trained(target)}

        return finish(workspace, conclude, say)


def run_pretraining(config: PretrainConfig, reporter: Reporter | None = None, world: World = ALONE) -> dict:
    """General distillation of a supernet, or of one model with --model, into <output_dir>/model, with its projection.
    Returns results.json."""
    config, fields = resolved(config)
    with opened(config, reporter, world) as (workspace, say, steps):
        target = workspace.folder / MODEL
        phase = Phase(("general",), config.seed, workspace.folder / "training.pt", fields.architecture)
        if not target.exists():
            torch.manual_seed(random.key(config.seed, "init"))
            whole = config.model == "supernet"
            model = Supernet(fields) if whole else EffBertModel(fields, add_pooling_layer=False)
            if config.start:
                load_start(model, config.start)
            model.to(workspace.device)
            open_general_teacher(workspace, say)
            say(f"general distillation of {config.model}, {model.num_parameters():,} parameters")
            result = distil_generally(workspace, model, config.training, phase, steps("general distillation"), world)
            must_finish(result, "general distillation", "--training.learning_rate")
            say(f"loss {result.loss:.4f} after {result.tokens:,} tokens")
            world.on_first(lambda: keep(model, target, result, tokenizer=workspace.tokenizer))
        forget([phase])
        return finish(workspace, lambda: {"architecture": fields.architecture, **trained(target)}, say)


def run_distillation(config: DistillConfig, reporter: Reporter | None = None, world: World = ALONE) -> dict:
    """Distil one model, for each seed anew, and score it: the first one's student, ready to deploy, in
    <output_dir>/model. Returns results.json."""
    config, fields = resolved(config)
    with opened(config, reporter, world, check_head) as (workspace, say, steps):
        spec = workspace.main_task.spec
        files = [workspace.folder / f"seed-{number}.json" for number in range(config.seeds)]
        for number, file in enumerate(files):
            phase = Phase(("distil",), config.seed + number, file.with_suffix(".pt"), fields.architecture)
            if not file.exists():
                if not workspace.teachers:
                    open_teachers(workspace, say, steps)
                one_seed(workspace, fields, phase, file, say, steps)
            forget([phase.sub(part) for part in ("general", "task")])
        return finish(workspace, lambda: of_seeds(spec.metrics[0], files), say)


def check_head(workspace: Workspace) -> None:
    """ValueError where the teacher does not answer the task."""
    spec = workspace.main_task.spec
    if not answers(workspace.teacher_config, spec):
        given = f"teacher {workspace.config.teacher}"
        raise ValueError(f"{given} has no head for {spec.name} ({spec.kind}): make one with effbert teacher")


def one_seed(workspace: Workspace, fields: EffBertConfig, phase: Phase, file: Path, say, steps) -> None:
    """Distil, score and keep one student."""
    config, spec, world = workspace.config, workspace.main_task.spec, workspace.world
    torch.manual_seed(random.key(phase.seed, "init"))
    student = new_student(fields, spec.kind, spec.labels)
    if config.start:
        load_start(student, config.start)
    fresh_head(student, random.key(phase.seed, "head"))
    student.to(workspace.device)
    say(f"seed {phase.seed}: {student.num_parameters():,} parameters with the projection")
    (result,) = distil(workspace, [Student(student, phase)], config.budget, steps("distillation"), world)
    if result.diverged:
        raise ValueError(f"{result.diverged}: lower the learning rates of --budget")

    def kept() -> None:
        own = {"seed": phase.seed, "scores": held_out_scores(workspace, student), "seconds": result.seconds}
        own |= costs(student, parse_architecture(fields.architecture), config.max_length)
        say(f"seed {phase.seed}: {show(own['scores'])} on the official validation rows")
        if phase.seed == config.seed:
            small = deployed(student, spec)
            keep(small, workspace.folder / MODEL, tokenizer=workspace.tokenizer)
        write_atomic(file, json.dumps(own | {"tokens": result.tokens}, indent=1))

    world.on_first(kept)


def of_seeds(metric: str, files: list[Path]) -> dict:
    """What the seeds came to: each, and mean and spread of the task's first metric."""
    seeds = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    values = [seed["scores"][metric] for seed in seeds]
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"metric": metric, "score": mean, "spread": spread, "seeds": seeds}


@contextmanager
def opened(
    config: RunConfig,
    reporter: Reporter | None,
    world: World,
    check: Callable[[Workspace], None] = lambda workspace: None,
) -> Iterator[tuple[Workspace, Callable[[str], None], Callable]]:
    """The workspace of a run, and where it speaks; on one machine a second such run of a folder waits for the first.
    Input that will not do leaves a new folder empty."""
    if not config.teacher:
        raise ValueError("--teacher is missing: the folder or name of a BERT-like encoder")
    with reporter or Reporter(shown=world.is_first) as reporter:
        processes = {"processes": world.size} if world.size > 1 else {}
        settings = {"run": type(config).__name__, **as_dict(config), **processes}
        claim = RunFolder(config.output_dir, settings, reporter.say) if world.is_first else None
        try:
            with claim.workers.turn("this run") if claim else _nothing():
                try:
                    if claim and not claim.workers.others():
                        remove_partial(claim.path)
                    folder = Path(config.output_dir)
                    workspace = world.first_then_all(lambda: open_workspace(config, folder, reporter.say, world))
                    check(workspace)
                except Exception:
                    if claim:
                        claim.abandon()
                    raise
                yield workspace, reporter.say, reporter.steps
        finally:
            if claim:
                claim.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def resolved(config):
    """A run's config with --student as large as what --model names, so that a teacher it cannot learn from is refused
    at once; and the model's own config."""
    if not config.teacher:
        raise ValueError("--teacher is missing: the folder or name of a BERT-like encoder")
    teacher = read_config(config.teacher)
    vocabulary = student_vocabulary(teacher)
    if getattr(config, "model", "") == "supernet":
        sizes = {name: getattr(config.student, name) for name in _SHARED}
        layers = config.student.num_hidden_layers
        fields = supernet_config(EffBertConfig(**sizes, **vocabulary), layers)
    else:
        fields = model_config(config, config.model, config.params, teacher, vocabulary)
    if config.start:
        check_start(fields, config.start)
    student = dataclasses.replace(
        config.student,
        num_hidden_layers=fields.num_hidden_layers,
        **{name: getattr(fields, name) for name in _SHARED},
    )
    return dataclasses.replace(config, student=student), fields


_SHARED = tuple(field.name for field in dataclasses.fields(StudentArguments) if field.name != "num_hidden_layers")


def open_general_teacher(workspace: Workspace, say: Callable[[str], None]) -> None:
    """The teacher of general distillation alone."""
    workspace.general_teacher = Teacher(load_model(workspace.config.teacher)).to(workspace.device)
    say(f"teacher: {workspace.config.teacher}")


def trained(folder: Path) -> dict:
    """What training a kept model took."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def finish(workspace: Workspace, conclude: Callable[[], dict], say: Callable[[str], None]) -> dict:
    """Write results.json once, and say where everything is."""
    path = workspace.folder / RESULTS
    if not path.exists():
        workspace.world.on_first(lambda: write_atomic(path, json.dumps(conclude(), indent=1)))
    workspace.world.wait()
    results = json.loads(path.read_text(encoding="utf-8"))
    if "scores" in results:
        say(f"{show(results['scores'])} on the official validation rows")
    if "score" in results:
        spread = "" if results["spread"] is None else f" ± {results['spread']:.4f}"
        say(f"{results['metric']} {results['score']:.4f}{spread} over {len(results['seeds'])} seeds")
    say(f"the model is in {workspace.folder / MODEL}, what it took in {path}")
    return results
