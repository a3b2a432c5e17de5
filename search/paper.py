"""The whole way, from an encoder to a table: a search, and its winner and rivals distilled on every task.

The plan is a list of steps: runs with folders of their own, and what is made of their models at last. plan.json in
<output_dir> tells what is done and what is left. A step whose result is there is done, so the same command goes on with
the first that has none.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.table import Table

from effbert.answers import Reading, Unfinished, evaluate_saved, predict_glue, predict_squad
from effbert.architecture import Architecture, Dimensions, count_parameters
from effbert.config import (
    GLUE_TASKS,
    OWN_ROWS,
    PRESETS,
    Budget,
    DistillConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TeacherConfig,
    published,
    refuse_best,
)
from effbert.data import glue, squad
from effbert.data.encode import WINDOWS
from effbert.data.tasks import load_validation, task_key
from effbert.data.tokenizer import load_tokenizer
from effbert.export import ExportConfig, export
from effbert.files import atomic_dir, read_kept, write_atomic
from effbert.models import PLUS, architecture_of, check_heads, model_fields, sized_down
from effbert.optim import TrainingArguments
from effbert.parallel import ALONE, World
from effbert.search.progress import Reporter
from effbert.search.record import PLAN, WINNER, left_out, saved_plan, state_of
from effbert.search.report import OFFICIAL, chosen_by, markdown, plan_rows, print_table
from effbert.search.report_html import write_report
from effbert.search.run import Turn, claimed, run_search, surroundings
from effbert.search.runs import MODEL, RESULTS, model_names, run_distillation, run_pretraining, run_teacher
from effbert.start import read_student
from effbert.teacher import content_hash, longest_text, read_config
from effbert.workspace import check_corpora, check_teacher, data_dir_of, load_tasks, set_switches, show

TABLE = "table.md"
WRITTEN_ANEW = "writes it anew"  # what a plan does without a file of its own
PER_TASK = {  # what a task may have of its own: its type, and the least that it can be
    "rows": (int, 0),
    "seeds": (int, 1),
    "epochs": (int, 1),
    "learning_rate": (float, 0),
    "eval_steps": (int, 0),
    "max_length": (int, 8),
}


SIZED_LATER = ("published", "plain")  # the rivals that are no names of models
SHARED = "stage3/supernet"  # in the search's folder
SPECIAL_TOKENS = 3  # that BERT's way of pairing adds, which a search without a teacher takes for its own tokenizer


@dataclass(frozen=True)
class PaperConfig(SearchConfig):
    """A search, then its winner and rivals distilled on text and on every task, and a table of them all.

    Attributes:
        final_tasks: Tasks that the models are distilled on; empty for the search's own.
        rivals: Models beside the winner: "published", the published architecture at these sizes; "plain", the teacher
            sized down to the winner's parameters; a named model; or an architecture of as many layers as --student.
            Those that fit the search's supernet begin with slices of it; efficientbert-plus learns tasks at once, from
            slices and heads of stage 3's supernet.
        pretraining: General distillation of winner and rivals but efficientbert-plus; what is not begun with slices
            sees the supernet's epochs first.
        distillation: Task distillation.
        predictions: Also write what those who score take: glue.zip, the winner's predictions for the GLUE tasks'
            official test files, and its answers to SQuAD's validation questions.
        per_task: TASK.NAME=VALUE, where a task differs: rows, seeds, epochs, learning_rate, max_length, eval_steps (of
            its teacher too).
    """

    final_tasks: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ("published", "plain")
    pretraining: TrainingArguments = field(default_factory=TrainingArguments)
    distillation: TrainingArguments = field(
        default_factory=lambda: TrainingArguments(learning_rate=5e-5, num_train_epochs=10)
    )
    predictions: bool = False
    per_task: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        refuse_best(pretraining=self.pretraining)
        Budget(task_phase=self.distillation)  # says what is wrong with it
        known = [task_key(task) for task in self.tasks_at_last]
        for task, name, value in map(split_setting, self.per_task):
            if task_key(task) not in known:
                raise ValueError(f"per_task {task}.{name}={value}: {task} is none of the tasks")
            if name == "eval_steps" and not self.distillation.load_best_model_at_end:
                raise ValueError(
                    f"per_task {task}.eval_steps={value}: nothing is chosen by it: give "
                    "--distillation.load_best_model_at_end too, or leave it out"
                )
        for what, names in (("final_tasks", known), ("rivals", ["winner", *self.rivals])):
            if len(set(names)) < len(names):
                raise ValueError(f"{what} is {getattr(self, what)}: name each once, and the winner not at all")
        scored = [name for name in known if name in glue.TASKS or name in squad.VERSIONS]
        if self.predictions and not scored:
            raise ValueError("predictions are for tasks of GLUE and SQuAD, and the plan has none")
        for name in self.rivals:
            if name not in SIZED_LATER:
                architecture_of(name)  # says what is wrong with it
            if name == PLUS and start_of(self, name) == "fresh":
                raise ValueError(f"rivals: {name} is slices of stage 3's supernet, which --student gives other sizes")
            if "(" in name and depth_of(self, name) != self.student.num_hidden_layers:
                raise ValueError(f"rivals: {name} has not {self.student.num_hidden_layers} layers, as --student")
        if not self.teacher:
            check_depths(self, self.teacher_model.num_hidden_layers)

    @property
    def tasks_at_last(self) -> tuple[str, ...]:
        """Tasks that the models are distilled on."""
        return self.final_tasks or (self.task, *self.tasks)

    def of_task(self, task: str) -> dict:
        """What --per_task says of a task."""
        own = (found for found in map(split_setting, self.per_task) if task_key(found[0]) == task_key(task))
        return {name: value for _, name, value in own}


def split_setting(text: str) -> tuple[str, str, int | float]:
    """ "cola.epochs=50" as task, name and value; ValueError where it is no such thing."""
    left, sign, right = text.partition("=")
    task, dot, name = left.rpartition(".")
    if not (sign and dot and task) or name not in PER_TASK:
        raise ValueError(f"per_task {text!r}: it should be TASK.NAME=VALUE, with a name of {', '.join(PER_TASK)}")
    kind, least = PER_TASK[name]
    try:
        value = kind(right)
    except ValueError:
        raise ValueError(f"per_task {text!r}: {right!r} is no {kind.__name__}") from None
    if not value >= least:
        raise ValueError(f"per_task {text!r}: it must be at least {least}")
    return task, name, value


@dataclass(frozen=True)
class Step:
    """One step of the plan. result: the file or folder that is there once it is done, or beside it a note that there
    will be none. start: does it, and returns nothing that is not on disk."""

    name: str
    result: Path
    start: Callable[[], object]

    @property
    def done(self) -> bool:
        """Whether nothing is left of it."""
        return state_of(self.result) != "left"


def run_paper(config: PaperConfig, reporter: Reporter | None = None, world: World = ALONE) -> dict:
    """Run or resume the whole plan; returns what <output_dir>/results.json holds."""
    folder = Path(config.output_dir)
    set_switches(config)
    with reporter or Reporter(shown=world.is_first) as reporter, claimed(config, world, reporter) as claim:
        steps = plan(config, world, lambda: Quiet(reporter), nullcontext if claim is None else claim.workers.turn)
        try:
            world.on_first(begin, config, steps, reporter.say)
        except Exception:
            if claim is not None:
                claim.abandon()
            raise
        for step in steps:
            if not world.on_first(lambda step=step: step.done):  # a slower process would find what is just done
                reporter.say(f"{sum(step.done for step in steps)} of {len(steps)} steps are done; now {step.name}")
                step.start()
                world.on_first(write_plan, folder, steps)
                world.wait()
        results = read_kept(folder / RESULTS, WRITTEN_ANEW, "tasks")
        if world.is_first:
            page = write_report(folder, storage=config.storage)  # before the table: it reads all that the plan keeps
            title = f"scores on {OFFICIAL}{chosen_by(config.distillation.load_best_model_at_end)}"
            print_table(reporter.console, title, plan_rows(results["tasks"]))
            reporter.say(f"the table is in {folder / TABLE}, a report in {page}")
        world.wait()
        return results


class Quiet(Reporter):
    """A reporter for one step that writes to the plan's, which is already on the terminal."""

    def __init__(self, outer: Reporter):
        super().__init__(outer.console)
        self.outer = outer

    def __enter__(self) -> Reporter:
        return self.outer

    def __exit__(self, *_) -> None:
        pass


def plan(config: PaperConfig, world: World, reporter: Callable[[], Reporter], turn: Turn = nullcontext) -> list[Step]:
    """The steps in their order; what a step needs of those before is read when it starts. turn: what one worker alone
    does is done in."""
    folder = Path(config.output_dir)

    def search() -> None:
        found = run_search(searching(config), reporter(), world, final=False)
        world.on_first(write_atomic, folder / WINNER, json.dumps(found, indent=1))

    def pretrain(name: str) -> None:
        run = pretraining(config, name)
        run_pretraining(run, reporter(), world, said_as(config, members_of(config, name), run.model))

    def teacher(task: str) -> None:
        run_teacher(teaching(config, task), reporter(), world)

    def distill(task: str, depth: int) -> None:
        if starts_of(config, depth):
            run = distillation(config, task, depth)
            run_distillation(run, reporter(), world, said_as(config, starts_of(config, depth), run.model))
        else:
            note = f"no model of {depth} layers is left of general distillation\n"
            world.on_first(leave_out, distilled(config, task, depth) / RESULTS, note)

    def alone(make: Make, path: Path) -> None:
        with turn(path.name), reporter() as outer:
            if state_of(path) == "left":
                make(config, path, outer.say)
            if state_of(path) == "left":
                outer.say(f"{path.name} is left out: the winner diverged")
                leave_out(path, "the winner diverged\n")

    steps = [Step("search", folder / WINNER, search)]
    for name in groups(config):
        steps.append(Step(name, folder / name / RESULTS, lambda name=name: pretrain(name)))
    for task in config.tasks_at_last:
        if task_key(task) not in map(task_key, (config.task, *config.tasks)):
            name = of_teacher(task)
            steps.append(Step(name, folder / name / RESULTS, lambda task=task: teacher(task)))
    for task in config.tasks_at_last:
        for depth in depths_of(config):
            place = distilled(config, task, depth)
            steps.append(Step(place.name, place / RESULTS, partial(distill, task, depth)))
    for name, make in last_files(config).items():
        steps.append(Step(name, folder / name, lambda make=make, name=name: world.on_first(alone, make, folder / name)))
    return steps


def leave_out(result: Path, note: str) -> None:
    """Say beside a step's result that there will be none, and why."""
    result.parent.mkdir(exist_ok=True)
    write_atomic(left_out(result), note)


Make = Callable[[PaperConfig, Path, Callable[[str], None]], None]


def last_files(config: PaperConfig) -> dict[str, Make]:
    """What is made of the students once all are there, and what makes it; the last argument tells how far it is."""
    files: dict[str, Make] = {RESULTS: tabulate, "export": deploy}
    known = known_tasks(config)
    if known:
        files["evaluate.json"] = evaluate
    if config.predictions and zip_tasks(config):
        files["glue.zip"] = predict
    for task in (task_key(task) for task in known if config.predictions and task_key(task) in squad.VERSIONS):
        files[f"{task}.json"] = partial(answer, task)
    return files


def tabulate(config: PaperConfig, file: Path, say: Callable[[str], None]) -> None:
    """The plan's results, and their table."""
    tasks = table_of(config)
    write_atomic(file.with_name(TABLE), markdown(plan_rows(tasks)))
    chosen = config.distillation.load_best_model_at_end
    results = {"winner": winner_of(file.parent), "chosen_by_these_rows": chosen, "tasks": tasks, **surroundings()}
    write_atomic(file, json.dumps(results, indent=1))


def deploy(config: PaperConfig, folder: Path, say: Callable[[str], None]) -> None:
    """The winner's student of each task as a folder that needs no effbert."""
    found = {task_key(task): students(config, task).get("winner") for task in config.tasks_at_last}
    if any(found.values()):
        with atomic_dir(folder) as temporary:
            for name, winner in found.items():
                if winner is None:
                    say(f"{folder.name} has no {name}: the winner diverged there")
                else:
                    export(winner, ExportConfig(output_dir=str(temporary / name)))


def evaluate(config: PaperConfig, file: Path, say: Callable[[str], None]) -> None:
    """Official metrics of teacher and students on the whole validation splits of every known task, both of MNLI's where
    they are there. What is done of it is kept."""
    found, done = {}, Unfinished(file)
    for task in known_tasks(config):
        found[task] = {}
        for name, place in {"teacher": teacher_of(config, task), **students(config, task)}.items():
            reading = reading_of(config, task) if name == "teacher" else Reading(device=config.device)
            once = say if name == "teacher" else lambda line: None  # a split that is not there is so for all models

            def scores(place=place, task=task, reading=reading, once=once) -> str:
                return json.dumps(evaluate_saved(place, task, data_dir_of(config, task), reading, say=once))

            short = short_name(config, name)
            text, _ = done.text(f"{task_key(task)}-{short}.json", f"{content_hash(place)} {reading}", scores)
            found[task][name] = json.loads(text)
            for split, metrics in found[task][name].items():
                say(f"{task} {split}, {short}: {show(metrics)}")
    write_atomic(file, json.dumps(found, indent=1))
    done.remove()


def reading_of(config: PaperConfig, task: str) -> Reading:
    """How a task's teacher reads, which learnt with the plan's length and windows; students tell these themselves."""
    labels = config.teacher_labels if task_key(task) == task_key(config.task) else ()
    length = config.of_task(task).get("max_length", config.max_length)
    windows = {name: getattr(config, name) for name in WINDOWS if task_key(task) in squad.VERSIONS}
    return Reading(length, labels=labels, device=config.device, **windows)


def predict(config: PaperConfig, file: Path, say: Callable[[str], None]) -> None:
    """The winner's predictions for every GLUE task of the plan, each student's on texts as long as it learnt with;
    MNLI's answers the diagnostic set too."""
    found = {task: students(config, "mnli" if task == "ax" else task).get("winner") for task in zip_tasks(config)}
    models = {task: place for task, place in found.items() if place is not None}
    for task in found.keys() - models.keys():
        say(f"{file.name} lacks {task}: the winner diverged there")
    if models:
        predict_glue(models, file, config.data_dir or None, Reading(device=config.device), say)


def answer(task: str, config: PaperConfig, file: Path, say: Callable[[str], None]) -> None:
    """The winner's answers to the questions of SQuAD's validation split."""
    winner = students(config, task).get("winner")
    if winner is not None:
        predict_squad(winner, task, file, config.data_dir or None, Reading(device=config.device), say=say)


def students(config: PaperConfig, task: str) -> dict[str, str]:
    """The folders of the models that were distilled on a task, by name; not of those that diverged."""
    found = {}
    for depth in depths_of(config):
        names, folder = list(starts_of(config, depth)), distilled(config, task, depth)
        places = zip(names, model_names(len(names)), strict=True)
        found |= {name: str(folder / place) for name, place in places if (folder / place).exists()}
    return {name: found[name] for name in names_of(config) if name in found}


def known_tasks(config: PaperConfig) -> list[str]:
    """The tasks at last whose rows are not your own files."""
    own = (task_key(config.task),) if config.train_file else ()
    return [task for task in config.tasks_at_last if task_key(task) not in own]


def zip_tasks(config: PaperConfig) -> list[str]:
    """The GLUE tasks of the plan, and the diagnostic set where MNLI is among them."""
    tasks = [task_key(task) for task in known_tasks(config) if task_key(task) in glue.TASKS]
    return [*tasks, "ax"] if "mnli" in tasks else tasks


def begin(config: PaperConfig, steps: list[Step], say: Callable[[str], None]) -> None:
    """Write the plan into its folder, and say what will be missing at its end. ValueError or FileNotFoundError where a
    step to come would refuse what it is given: before anything is computed, and not after days."""
    given = read_config(config.teacher) if config.teacher else None
    check_teacher(given, config, None)
    for start in config.start_from:
        if read_student(start).architectures != ["Supernet"]:
            raise ValueError(f"--start_from {start} is no supernet, which a search begins with")
    heads = (given or config.teacher_model).num_attention_heads
    longest = longest_text(given) if given else max(64, config.max_length)
    check_depths(config, (given or config.teacher_model).num_hidden_layers)
    check_spans(config)
    check_corpora(config)
    for name in config.rivals:
        if "(" not in name and name not in SIZED_LATER:
            check_heads(f"rivals: {name}", model_fields(name)["hidden_size"], heads)
    left = {step.name for step in steps if not step.done}
    if "search" not in left:
        winner_of(Path(config.output_dir))  # says where it is damaged
    for task in zip_tasks(config) if "glue.zip" in left else ():
        for split in glue.source_of(task).results:
            glue.load_split(task, split, config.data_dir or None)
    for task in known_tasks(config) if "evaluate.json" in left else ():
        _, _, notes = load_validation(task, data_dir_of(config, task))
        for note in notes:
            say(note)
    for task in config.tasks_at_last:
        length = config.of_task(task).get("max_length", 0)
        if length > longest:
            raise ValueError(f"per_task {task}.max_length={length}: the teacher reads {longest} tokens at most")
        if of_teacher(task) in left:
            load_tasks(teaching(config, task))
    write_plan(Path(config.output_dir), steps)


def check_spans(config: PaperConfig) -> None:
    """ValueError where SQuAD's windows do not fit the length of its texts."""
    for task in known_tasks(config):
        if task_key(task) in squad.VERSIONS:
            length = config.of_task(task).get("max_length", config.max_length)
            special = SPECIAL_TOKENS
            if config.teacher:
                special = load_tokenizer(config.teacher).num_special_tokens_to_add(pair=True)
            try:
                squad.check_windows(length, special, config.doc_stride, config.max_query_length)
            except ValueError as error:
                raise ValueError(f"task {task}: {error}") from error


def check_depths(config: PaperConfig, layers: int) -> None:
    """ValueError where a rival's layers cannot learn from those of a teacher with so many."""
    for name in config.rivals:
        depth = depth_of(config, name)
        if layers % depth:
            raise ValueError(f"rivals: {name} has {depth} layers, of which the teacher's {layers} are no multiple")


def lines_of(folder: Path, steps: list[Step]) -> list[dict]:
    """Each step, where it is, and whether it is done."""
    return [{"step": step.name, "result": str(step.result.relative_to(folder)), "done": step.done} for step in steps]


def write_plan(folder: Path, steps: list[Step]) -> None:
    """plan.json: what `lines_of` says."""
    write_atomic(folder / PLAN, json.dumps(lines_of(folder, steps), indent=1))


def show_plan(config: PaperConfig) -> Table:
    """What is done and what is left: of the plan in the folder, whatever else is in `config`, or before it has begun of
    that which `config` makes."""
    folder = Path(config.output_dir)
    if (folder / PLAN).is_file():
        lines = saved_plan(folder)
    else:
        lines = lines_of(folder, plan(config, ALONE, Reporter))
    begun = "" if (folder / PLAN).is_file() else ", which has not begun"
    view = Table(title=f"plan of {folder}{begun}")
    view.add_column("step")
    view.add_column("state")
    for line in lines:
        view.add_row(line["step"], state_of(folder / line["result"]))
    return view


def part(config: PaperConfig, kind: type, folder: Path, **changes):
    """The fields of the plan's config that a step's has too, with `changes`."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if hasattr(config, f.name)}
    return kind(**{**own, "output_dir": str(folder), **changes})


def searching(config: PaperConfig) -> SearchConfig:
    """The plan's search, whose teachers are scored as often as --per_task says."""
    teachers = config.teacher_model
    if teachers.finetuning.load_best_model_at_end:
        own = [f"{task}={value}" for task, name, value in map(split_setting, config.per_task) if name == "eval_steps"]
        steps = (*teachers.finetuning_eval_steps, *own)
        teachers = dataclasses.replace(teachers, finetuning_eval_steps=steps)
    own_rows = {"data_dir": ""} if config.train_file and not config.tasks else {}
    return part(config, SearchConfig, Path(config.output_dir) / "search", teacher_model=teachers, **own_rows)


def groups(config: PaperConfig) -> list[str]:
    """Pretraining runs: of the models that begin alike and have as many layers."""
    pretrained = [name for name in names_of(config) if start_of(config, name) != "shared"]
    return list(dict.fromkeys(group_of(config, name) for name in pretrained))


def group_of(config: PaperConfig, name: str) -> str:
    """The pretraining run that a model is part of."""
    return f"text-{start_of(config, name)}{of_depth(config, depth_of(config, name))}"


def of_depth(config: PaperConfig, depth: int) -> str:
    """The end of a run's name whose models have so many layers: nothing for as many as the winner has."""
    return "" if depth == config.student.num_hidden_layers else f"-{depth}"


def names_of(config: PaperConfig) -> list[str]:
    """All models, in the order of the table."""
    return ["winner", *config.rivals]


def short_name(config: PaperConfig, name: str) -> str:
    """What log lines and files call a model: as the table does, and "rival N", counted from 1, for an architecture that
    is spelt out."""
    return f"rival {config.rivals.index(name) + 1}" if "(" in name else name


def said_as(config: PaperConfig, names: Iterable[str], models: Sequence[str]) -> list[str]:
    """What a step's log lines call its models. models: what effbert distill calls them, which tells the size of the
    plain BERT."""
    pairs = zip(names, models, strict=True)
    return [f"plain ({model})" if name == "plain" else short_name(config, name) for name, model in pairs]


def depth_of(config: PaperConfig, name: str) -> int:
    """How many layers a model has."""
    if name in ("winner", *SIZED_LATER):
        return config.student.num_hidden_layers
    return len(architecture_of(name).layers)


def depths_of(config: PaperConfig) -> list[int]:
    """The numbers of layers that models have; those of one learn tasks together."""
    return list(dict.fromkeys(depth_of(config, name) for name in names_of(config)))


def start_of(config: PaperConfig, name: str) -> str:
    """Where a model begins: "slices" of the search's supernet, "shared", of stage 3's, or "fresh"."""
    if name in ("winner", "published") or "(" in name:
        return "slices"
    fields, given = {} if name == "plain" else model_fields(name), config.student
    of_supernet = (
        name.startswith("efficientbert")
        and fields["hidden_size"] == fields["intermediate_size"] <= given.hidden_size == given.intermediate_size
        and fields.get("embedding_size", Dimensions.embedding_size) == given.embedding_size
        and depth_of(config, name) % given.num_hidden_layers == 0
    )
    return ("shared" if name == PLUS else "slices") if of_supernet else "fresh"


def members_of(config: PaperConfig, group: str) -> list[str]:
    """The models of a pretraining run."""
    return [name for name in names_of(config) if group_of(config, name) == group]


def winner_of(folder: Path) -> str:
    """The architecture that the search found."""
    return read_kept(folder / WINNER, WRITTEN_ANEW, "winner")["winner"]


def model_of(config: PaperConfig, name: str) -> str:
    """What effbert distill calls a model of the plan."""
    if name == "published":
        return str(published(config.student.num_hidden_layers))
    if name not in ("winner", "plain"):
        return name
    winner = winner_of(Path(config.output_dir))
    if name == "winner":
        return winner
    teacher, student = read_config(base_of(config)), config.student
    dims = Dimensions(
        vocab_size=teacher.vocab_size, embedding_size=student.embedding_size, hidden_size=student.hidden_size,
        intermediate_size=student.intermediate_size, max_position_embeddings=teacher.max_position_embeddings,
        type_vocab_size=teacher.type_vocab_size, fit_size=None,
    )  # fmt: skip
    return sized_down(teacher, student.num_hidden_layers, count_parameters(Architecture.parse(winner), dims).total)


def base_of(config: PaperConfig) -> str:
    """The encoder that general distillation learns from: the given one, or that which the search made."""
    return config.teacher or str(Path(config.output_dir) / "search" / "teacher" / "base")


def pretraining(config: PaperConfig, group: str) -> PretrainConfig:
    """General distillation of a group of models."""
    folder = Path(config.output_dir)
    members = members_of(config, group)
    models = tuple(model_of(config, name) for name in members)
    changes = {"model": models, "training": config.pretraining}
    changes |= {"params": 0, "start_from": ()}
    if start_of(config, members[0]) == "slices":
        changes["start_from"] = (str(folder / "search" / "supernet"),)
    else:
        epochs = config.supernet.num_train_epochs + config.pretraining.num_train_epochs
        changes["training"] = dataclasses.replace(config.pretraining, num_train_epochs=epochs)
    return part(config, PretrainConfig, folder / group, teacher=base_of(config), **changes)


def teaching(config: PaperConfig, task: str) -> TeacherConfig:
    """Fine-tuning the teacher of a task that the search does not have."""
    folder, own = Path(config.output_dir) / of_teacher(task), config.of_task(task)
    finetuning = config.teacher_model.finetuning_on(task)
    eval_steps = own.get("eval_steps") if finetuning.load_best_model_at_end else None
    return part(
        config,
        TeacherConfig,
        folder,
        **of_one_task(config, task, own),
        teacher=base_of(config),
        finetuning=changed(finetuning, eval_steps=eval_steps),
    )


def changed(arguments: TrainingArguments, **changes: float | None) -> TrainingArguments:
    """A phase with those changes that are one."""
    return dataclasses.replace(arguments, **{name: value for name, value in changes.items() if value is not None})


def distilled(config: PaperConfig, task: str, depth: int) -> Path:
    """The folder of the models of so many layers that learn a task together."""
    return Path(config.output_dir) / f"distil-{task_key(task)}{of_depth(config, depth)}"


def distillation(config: PaperConfig, task: str, depth: int) -> DistillConfig:
    """The models of so many layers on one task that general distillation has left, from what it made of them."""
    own, starts = config.of_task(task), starts_of(config, depth)
    task_phase = changed(
        config.distillation,
        num_train_epochs=own.get("epochs"),
        learning_rate=own.get("learning_rate"),
        eval_steps=own.get("eval_steps"),
    )
    return part(
        config,
        DistillConfig,
        distilled(config, task, depth),
        **of_one_task(config, task, own),
        teacher=teacher_of(config, task),
        model=tuple(model_of(config, name) for name in starts),
        start_from=tuple(starts.values()),
        params=0,
        seeds=own.get("seeds", config.seeds),
        budget=Budget(general_phase=dataclasses.replace(config.pretraining, num_train_epochs=0), task_phase=task_phase),
    )


def starts_of(config: PaperConfig, depth: int) -> dict[str, str]:
    """The folders that models of so many layers learn tasks from, in the table's order: those that general distillation
    made, of which a model that diverged has none, and stage 3's supernet. ValueError where all diverged."""
    folder, found = Path(config.output_dir), {}
    for group in groups(config):
        members = members_of(config, group)
        check_members(config, group)
        places = (folder / group / place for place in model_names(len(members)))
        found |= {name: str(place) for name, place in zip(members, places, strict=True) if place.exists()}
    found |= {name: str(folder / "search" / SHARED) for name in config.rivals if start_of(config, name) == "shared"}
    if not found:
        raise ValueError(
            f"{folder}: no model is left of general distillation: lower --pretraining.learning_rate, in another "
            "--output_dir"
        )
    return {name: found[name] for name in names_of(config) if name in found and depth_of(config, name) == depth}


def check_members(config: PaperConfig, group: str) -> None:
    """ValueError where a pretraining run that is done holds other models than its part of the plan has."""
    file = Path(config.output_dir) / group / RESULTS
    if file.exists():
        there = read_kept(file, WRITTEN_ANEW, "models")["models"].values()
        wanted = [str(architecture_of(model_of(config, name))) for name in members_of(config, group)]
        if [model["architecture"] for model in there] != wanted:
            raise ValueError(f"{file.parent} holds other models than this plan's: use another --output_dir")


def of_teacher(task: str) -> str:
    """The step that makes a task's teacher."""
    return f"teacher-{task_key(task)}"


def of_one_task(config: PaperConfig, task: str, own: dict) -> dict:
    """The fields that make a run one on `task`: your own files are the search's main task alone."""
    main = task_key(task) == task_key(config.task)
    files = {} if main else {name: getattr(TaskConfig, name) for name in ("train_file", *OWN_ROWS, "teacher_labels")}
    if main and config.train_file:
        files = {"data_dir": ""}
    return {
        "task": task,
        "max_train_rows": own.get("rows", config.max_train_rows),
        "max_length": own.get("max_length", config.max_length),
        **files,
    }


def teacher_of(config: PaperConfig, task: str) -> str:
    """The folder of a task's teacher: made by the search, or by a step of its own, or the given one."""
    folder = Path(config.output_dir)
    made, tuned = folder / of_teacher(task) / MODEL, folder / "search" / "teacher" / "tasks"
    of_search = [path for path in tuned.glob("*") if task_key(path.name) == task_key(task)]
    for place in (made, *of_search):
        if place.exists():
            return str(place)
    if config.teacher and task_key(task) == task_key(config.task):  # whose own head is for this task
        return config.teacher
    raise ValueError(f"task {task} has no teacher: neither {made} nor one in {tuned}")


def table_of(config: PaperConfig) -> list[dict]:
    """For each task its metric, the teacher's row and that of each model, in the order of the plan."""
    found = []
    for task in config.tasks_at_last:
        there, seen = {}, []
        for depth in depths_of(config):
            file = distilled(config, task, depth) / RESULTS
            if file.exists():
                seen.append(read_kept(file, WRITTEN_ANEW, "models"))
                there |= zip(starts_of(config, depth), seen[-1]["models"].values(), strict=True)
        models = {name: there.get(name, {"score": None, "spread": None, "seeds": []}) for name in names_of(config)}
        found.append({name: seen[0][name] for name in ("task", "metric", "teacher")} | {"models": models})
    return found


def paper(name: str) -> PaperConfig:
    """A preset of a search with what belongs to it afterwards: the published fine-tuning, or less of it."""
    search = {f.name: getattr(PRESETS[name](), f.name) for f in dataclasses.fields(SearchConfig)}
    general = search["supernet"]
    if name in ("paper", "paper-fast"):
        final = search["final"]
        return PaperConfig(
            **search,
            final_tasks=(*GLUE_TASKS, "wnli", "squad", "squad2.0"),
            pretraining=final.general_phase,
            distillation=final.task_phase,
            predictions=True,
            per_task=(*PER_PUBLISHED_TASK, *(PUBLISHED_EVAL_STEPS if name == "paper" else ())),
        )
    return PaperConfig(**search, pretraining=general, distillation=search["final"].task_phase)


PER_PUBLISHED_TASK = ("cola.epochs=50", "squad.learning_rate=1e-4", "squad2.0.learning_rate=1e-4")
PUBLISHED_EVAL_STEPS = ("qqp.eval_steps=250", "squad.eval_steps=500", "squad2.0.eval_steps=500")

PAPERS: dict[str, Callable[[], PaperConfig]] = {name: lambda name=name: paper(name) for name in PRESETS}
