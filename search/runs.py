"""Runs of one thing, each in a folder of its own: a teacher, general distillation, the distillation of one model.

Each is a part of a search done alone, by the same functions; what it made is in <output_dir>/model, what came of it in
results.json, and the same command again goes on where it stopped or says what there is. Started by torchrun or
accelerate, all processes share every batch.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from effbert import random
from effbert.card import SCORES
from effbert.config import (
    DistillConfig,
    PretrainConfig,
    RunConfig,
    StudentArguments,
    TeacherConfig,
    TextConfig,
    as_dict,
)
from effbert.engine import Phase, forget
from effbert.files import read_kept, remove_partial, write_atomic
from effbert.model import EffBertConfig, EffBertModel, new_student, parse_architecture
from effbert.models import PLUS
from effbert.parallel import ALONE, World
from effbert.search.final import costs, deployed, fresh_head, held_out, scores_of, teacher_row
from effbert.search.population import KEPT_TEACHER, kept_teacher
from effbert.search.progress import Reporter
from effbert.search.report import OFFICIAL, chosen_by, mean_and_spread, score_text
from effbert.search.study import GIVEN_PATHS, RunFolder
from effbert.start import (
    check_start,
    fresh_projection,
    load_head,
    load_start,
    model_config,
    read_student,
    start_weights,
)
from effbert.student import Distillation, Student, distil, distil_generally
from effbert.supernet import Supernet, supernet_config
from effbert.teacher import Teacher, load_model, read_config, student_vocabulary
from effbert.workspace import (
    Workspace,
    answers,
    best_step,
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


def run_pretraining(
    config: PretrainConfig, reporter: Reporter | None = None, world: World = ALONE, called: Sequence[str] = ()
) -> dict:
    """General distillation of a supernet, or of models, each kept with its projection unless it diverged. Returns
    results.json, which says who did. called: names of the models in what is said, as `said_names` takes them."""
    config, plans = resolved(config)
    notes = check_starts(config, plans)
    with opened(config, reporter, world) as (workspace, say, steps):
        for note in notes:
            say(note)
        names = said_names(config.model, called)
        targets = [workspace.folder / name for name in names]
        files = [target.with_name(f"training-{target.name}.pt") for target in targets]
        phases = [
            Phase(("general",), config.seed, file, fields.architecture)
            for file, fields in zip(files, plans, strict=True)
        ]
        diverged: dict[Path, str] = {}
        if not (workspace.folder / RESULTS).exists() and not all(target.exists() for target in targets):
            workspace.general_teacher = Teacher(load_model(config.teacher)).to(workspace.device)
            models = [fresh(config, number, fields) for number, fields in enumerate(plans)]
            for name, model in zip(names.values(), models, strict=True):
                say(f"general distillation of {name}, {model.to(workspace.device).num_parameters():,} parameters")
            results = distil_generally(workspace, models, config.training, phases, steps("general distillation"), world)
            for name, model, target, result in zip(names.values(), models, targets, results, strict=True):
                diverged[target] = result.diverged
                say(f"{name}: {result.diverged or f'loss {result.loss:.4f}'} after {result.tokens:,} tokens")
                if not result.diverged:
                    world.on_first(partial(keep, model, target, result, tokenizer=workspace.student_tokenizer))
        forget(phases)

        def conclude() -> dict:
            found = {}
            for plan, target in zip(plans, targets, strict=True):
                came_to = {"diverged": diverged[target]} if diverged.get(target) else trained(target)
                found[target.name] = {"architecture": plan.architecture, **came_to}
            return {"models": found}

        return finish(workspace, conclude, say, names)


def fresh(config: PretrainConfig, number: int, fields: EffBertConfig) -> Supernet | EffBertModel:
    """A supernet or encoder before general distillation."""
    torch.manual_seed(random.key(config.seed, "init"))
    model = Supernet(fields) if config.model == ("supernet",) else EffBertModel(fields, add_pooling_layer=False)
    if config.start_from:
        load_start(model, start_of(config, number))
    return model


def run_distillation(
    config: DistillConfig, reporter: Reporter | None = None, world: World = ALONE, called: Sequence[str] = ()
) -> dict:
    """Distil models, for each seed anew, and score them: of each the first student that did not diverge is kept, ready
    to deploy. Returns results.json, which says who diverged. called: as in `run_pretraining`."""
    config, plans = resolved(config)
    notes = check_starts(config, plans)
    with opened(config, reporter, world, check_head) as (workspace, say, steps):
        for note in notes:
            say(note)
        folder, names = workspace.folder, said_names(config.model, called)
        for number in range(config.seeds):
            files = [folder / f"{name}-seed-{number}.json" for name in names]
            phases = [
                Phase(("distil",), config.seed + number, file.with_suffix(".pt"), fields.architecture)
                for file, fields in zip(files, plans, strict=True)
            ]
            if not all(file.exists() for file in files):
                if not workspace.teachers:
                    open_teachers(workspace, say, steps)
                one_seed(workspace, plans, phases, dict(zip(files, names.values(), strict=True)), say, steps)
            forget([phase.sub(part) for phase in phases for part in ("general", "task")])

        def conclude() -> dict:
            if not workspace.teachers:
                open_teachers(workspace, say, steps)
            return of_models(workspace, plans)

        results = finish(workspace, conclude, say, names)
        world.on_first(shutil.rmtree, folder / KEPT_TEACHER, True)
        return results


def check_head(workspace: Workspace) -> None:
    """ValueError where the teacher does not answer the task."""
    spec = workspace.main_task.spec
    if not answers(workspace.teacher_config, spec):
        given = f"teacher {workspace.config.teacher}"
        raise ValueError(f"{given} has no head for {spec.name} ({spec.kind}): make one with effbert teacher")


def one_seed(
    workspace: Workspace,
    plans: Sequence[EffBertConfig],
    phases: Sequence[Phase],
    files: Mapping[Path, str],
    say: Callable[[str], None],
    steps: Callable,
) -> None:
    """Distil, score and keep the models of one seed, together. files: of each model, and what it is called."""
    config, spec, world = workspace.config, workspace.main_task.spec, workspace.world
    students = []
    for number, (fields, phase) in enumerate(zip(plans, phases, strict=True)):
        torch.manual_seed(random.key(phase.seed, "init"))
        model = new_student(fields, spec.kind, spec.labels)
        if config.start_from:
            load_start(model, start_of(config, number))
        shared = load_head(model, start_of(config, number), spec) if config.model[number] == PLUS else ""
        if shared:
            say(f"{PLUS}: with the head that the supernet has for {shared}")
        else:
            if config.model[number] == PLUS:
                say(f"{PLUS}: with a fresh head, since {start_of(config, number)} has no supernet's for {spec.name}")
            fresh_head(model, random.key(phase.seed, "head"))
        students.append(Student(model.to(workspace.device), phase))
    sizes = (
        f"{name} {student.model.num_parameters():,}" for name, student in zip(files.values(), students, strict=True)
    )
    say(f"seed {phases[0].seed}: {', '.join(sizes)} parameters")
    teacher_of = kept_teacher(workspace, config.budget, say) if world.size == 1 else None
    results = distil(workspace, students, config.budget, steps("distillation"), world, teacher_of)
    for student, (file, name), result in zip(students, files.items(), results, strict=True):
        world.on_first(keep_student, workspace, student, file, name, result, say)


def keep_student(workspace: Workspace, student: Student, file: Path, name: str, result: Distillation, say) -> None:
    """Score a student, keep it where it is the first that did not diverge, and write its file; without scores where it
    did. name: what it is called in what is said."""
    config, model, seed = workspace.config, student.model, student.phase.seed
    own = {
        "seed": seed,
        "scores": None if result.diverged else held_out(workspace, model)[0],
        "diverged": result.diverged,
        "seconds": result.seconds,
        "tokens": result.tokens,
        **best_step(result),
    }
    own |= costs(model, parse_architecture(model.config.architecture), config.max_length)
    said = result.diverged or f"{show(own['scores'])} on {OFFICIAL}"
    say(f"{name}, seed {seed}: {said}")
    target = workspace.folder / file.stem.rpartition("-seed-")[0]
    if not result.diverged and (seed == config.seed or not target.exists()):
        beside = {SCORES: scores_of(workspace, own["scores"])}
        keep(deployed(workspace, model), target, result, tokenizer=workspace.student_tokenizer, beside=beside)
    write_atomic(file, json.dumps(own, indent=1))


def of_models(workspace: Workspace, plans: Sequence[EffBertConfig]) -> dict:
    """What the teacher scores, and what each model came to: its seeds, mean and spread of the task's first metric over
    those that did not diverge."""
    config, metric, found = workspace.config, workspace.main_task.spec.metrics[0], {}
    for name, fields in zip(model_names(len(plans)), plans, strict=True):
        files = [workspace.folder / f"{name}-seed-{number}.json" for number in range(config.seeds)]
        seeds = [read_kept(file, "distils this model anew", "seed", "scores") for file in files]
        values = [seed["scores"][metric] for seed in seeds if seed["scores"]]
        found[name] = {
            "architecture": fields.architecture,
            "hidden_size": fields.hidden_size,
            **mean_and_spread(values),
            "diverged": len(seeds) - len(values),
            "seeds": seeds,
        }
    return {"task": workspace.main_task.spec.name, "metric": metric, "teacher": teacher_row(workspace), "models": found}


def refuse_diverged(results: dict) -> None:
    """ValueError where nothing is left of a distillation, general or on a task."""
    reasons = [_reason(model) for model in results["models"].values()]
    if all(reasons):
        raise ValueError(f"no model is left: {reasons[0]}; lower the learning rate, in another --output_dir")


def _reason(model: dict) -> str:
    """Why nothing came of a model, or ""."""
    if "seeds" in model:
        return model["seeds"][0]["diverged"] if model["score"] is None else ""
    return model.get("diverged", "")


def model_names(count: int) -> list[str]:
    """Folders of so many models, in the order of --model."""
    return [MODEL] if count == 1 else [f"{MODEL}-{number}" for number in range(1, count + 1)]


def said_names(models: Sequence[str], given: Sequence[str] = ()) -> dict[str, str]:
    """For each folder of a run's models what log lines call its model: as `given` says; else as --model does, or by the
    folder where that spells an architecture out, leaves the name to --start_from, or has it twice."""
    folders = model_names(len(models))
    named = [
        folder if "(" in model or not model or models.count(model) > 1 else model
        for folder, model in zip(folders, models, strict=True)
    ]
    return dict(zip(folders, given or named, strict=True))


def check_starts(config: TextConfig, plans: Sequence[EffBertConfig]) -> list[str]:
    """ValueError where what the models begin with will not do; else what there is to say of it."""
    notes = {}
    for number, fields in enumerate(plans if config.start_from else ()):
        folder = start_of(config, number)
        saved = read_student(folder)
        headless = saved.architectures == ["Supernet"] and not getattr(saved, "supernet_tasks", [])
        if config.model[number : number + 1] == (PLUS,) and headless:
            raise ValueError(
                f"--start_from {folder} has learnt no tasks: {PLUS} begins with a search's stage3/supernet"
            )
        start_weights(fields, folder)
        notes[fresh_projection(fields, folder)] = None
    return [note for note in notes if note]


def start_of(config: TextConfig, number: int) -> str:
    """The folder that a model begins with."""
    return config.start_from[number] if len(config.start_from) > 1 else config.start_from[0]


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
        claim = RunFolder(config.output_dir, settings, reporter.say, GIVEN_PATHS) if world.is_first else None
        try:
            with claim.workers.turn("this run") if claim else _nothing():
                try:
                    if claim and not claim.workers.others():
                        remove_partial(claim.path)
                    folder = Path(config.output_dir)
                    workspace = world.first_then_all(lambda: open_workspace(config, folder, reporter.say, world, check))
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
    """A run's config with --student as large as what --model names, so that a teacher that it cannot learn from is
    refused at once; and the config of each model."""
    if not config.teacher:
        raise ValueError("--teacher is missing: the folder or name of a BERT-like encoder")
    teacher = read_config(config.teacher)
    vocabulary = student_vocabulary(teacher)
    names = config.model or ("",) * len(config.start_from)
    if config.params and "teacher" not in names:
        raise ValueError("--params is for --model teacher: other models have the parameters that they have")
    if len(config.start_from) not in (0, 1, len(names)):
        raise ValueError(
            f"--start_from names {len(config.start_from)} folders for {len(names)} models: give one each, or one"
        )
    if names == ("supernet",):
        sizes = {name: getattr(config.student, name) for name in _SHARED}
        plans = [supernet_config(EffBertConfig(**sizes, **vocabulary), config.student.num_hidden_layers)]
    else:
        starts = (
            config.start_from * len(names) if len(config.start_from) == 1 else config.start_from or ("",) * len(names)
        )
        plans = [
            model_config(config, name, start, config.params, teacher, vocabulary)
            for name, start in zip(names, starts, strict=True)
        ]
    for number, (label, fields) in enumerate(zip(labels(config, names), plans, strict=True)):
        if fields.num_hidden_layers != plans[0].num_hidden_layers:
            raise ValueError(
                "models that learn together need as many layers: distil those of another depth by themselves"
            )
        if names[number] not in SIZED_BY_FLAGS and teacher.num_hidden_layers % fields.num_hidden_layers:
            raise ValueError(
                f"{label} has {fields.num_hidden_layers} layers and needs a teacher with a multiple of them: "
                f"{config.teacher} has {teacher.num_hidden_layers}"
            )
        check_widths(label, fields)
        if config.start_from:
            check_start(fields, start_of(config, number))
    student = dataclasses.replace(
        config.student,
        num_hidden_layers=plans[0].num_hidden_layers,
        **{name: getattr(plans[0], name) for name in _SHARED},
    )
    return dataclasses.replace(config, student=student, model=names), plans


SIZED_BY_FLAGS = ("supernet", "teacher")  # models whose depth --student.num_hidden_layers is


def labels(config: TextConfig, names: Sequence[str]) -> list[str]:
    """What messages call the models of a run; names: those of --model, "" for what --start_from holds."""
    return [
        "the architecture" if "(" in name else f"--model {name}" if name else start_of(config, number)
        for number, name in enumerate(names)
    ]


def check_widths(label: str, fields: EffBertConfig) -> None:
    """ValueError where an expression does not run at the widths that the model has."""
    combine = "truncate" if fields.combine == "truncate" else "pad"
    for number, layer in enumerate(parse_architecture(fields.architecture).layers, start=1):
        try:
            layer.output_width(fields.hidden_size, layer.structure.inner_width(fields.intermediate_size), combine)
        except ValueError as error:
            raise ValueError(f"{label}, layer {number}: {error}") from None


def check_sizes(config: PretrainConfig | DistillConfig) -> None:
    """ValueError where --student is given a size that no model of the run has. A supernet and an architecture's text
    take them; other models have their own, and the heads are the teacher's."""
    named, plans = resolved(config)
    for size in dataclasses.fields(StudentArguments):
        given, found = getattr(config.student, size.name), [getattr(plan, size.name) for plan in plans]
        if given not in (size.default, *found):
            pairs = zip(labels(named, named.model), found, strict=True)
            have = ", ".join(f"{label} has {value or 'none'}" for label, value in pairs)
            whose = ", as the teacher" if size.name == "num_attention_heads" else ""
            raise ValueError(f"--student.{size.name} {given} would do nothing: {have}{whose}; leave it out")


_SHARED = tuple(field.name for field in dataclasses.fields(StudentArguments) if field.name != "num_hidden_layers")


def trained(folder: Path) -> dict:
    """What training a kept model took."""
    return read_kept(folder / "training.json", "trains it anew", delete=folder)


def finish(
    workspace: Workspace,
    conclude: Callable[[], dict],
    say: Callable[[str], None],
    called: Mapping[str, str] | None = None,
) -> dict:
    """Write results.json once, and say where everything is. called: names of models in what is said, by folder."""
    path = workspace.folder / RESULTS
    # only the first process asks whether they are there: a slower one would find what it has just written
    workspace.world.on_first(lambda: path.exists() or write_atomic(path, json.dumps(conclude(), indent=1)))
    results = read_kept(path, "writes it anew")
    if "scores" in results:
        say(f"{show(results['scores'])} on {OFFICIAL}{chosen_by('best_step' in results)}")
    for name, model in results.get("models", {}).items():
        if "score" in model:
            scored = score_text(model["score"], model["spread"], model.get("diverged", 0))
            chosen = chosen_by(any("best_step" in seed for seed in model["seeds"]))
            say(f"{called[name]}: {results['metric']} {scored} over {len(model['seeds'])} seeds, on {OFFICIAL}{chosen}")
    kept = [workspace.folder / name for name in results.get("models", (MODEL,)) if (workspace.folder / name).exists()]
    say(f"done: {', '.join(map(str, [*kept, path]))}")
    return results
