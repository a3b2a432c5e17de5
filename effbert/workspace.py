"""What all stages of a run share, made once and kept in its folder: tokenizer, corpus, tasks, teachers.

Each piece is made the first time and read back afterwards, so a resumed run goes on from where it stopped. What a run
was given is fingerprinted at its first start: a resume over other data or another teacher is refused.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from effbert import random
from effbert.architecture import attention_head_size
from effbert.config import OWN_ROWS, RunConfig, SearchConfig, TaskConfig, TeacherConfig, TextConfig
from effbert.data.batches import BatchPlan, subset
from effbert.data.cache import dataset_fingerprint, tokenizer_fingerprint
from effbert.data.corpus import SAMPLE_SETS, check_corpus, load_corpus, sentences_of
from effbert.data.encode import WINDOWS, EncodedTask, encode_split, encode_task
from effbert.data.tasks import BUILTIN, Task, TaskSpec, is_known, load_task, map_labels, plain_name
from effbert.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from effbert.engine import Phase, TrainingResult, forget, train
from effbert.evaluate import evaluate
from effbert.files import atomic_dir, read_kept, write_atomic
from effbert.mlm import MaskedPlan, masked_lm_loss, new_bert
from effbert.model import EffBertConfig
from effbert.optim import TrainingArguments
from effbert.pace import Standing
from effbert.parallel import ALONE, World
from effbert.start import check_tokens, start_weights
from effbert.supernet import supernet_config
from effbert.teacher import (
    Teacher,
    check_family,
    check_shape,
    check_texts,
    content_hash,
    head_of,
    load_model,
    logits_of,
    read_config,
    student_vocabulary,
    with_new_head,
)

Say = Callable[[str], None]
Steps = Callable[[str], Callable[[Standing], None] | None]  # what is trained -> `on_step` of effbert.engine.train


def no_steps(what: str) -> None:
    """Shows nothing of a training phase while it runs."""


@dataclass
class Workspace:
    """Tokenizer, data and teachers of a run; a run that learns from tasks alone has no corpus, one on text
    alone no tasks.

    corpus: sets of as many sequences each, which epochs take in turn. candidate_corpus: the same of the text that a
        search's stages 1 and 2 learn from, often the same.
    tasks: by name, the main task first: rows to train on, and as validation the rows that rank candidates, cut from the
        official training rows.
    held_out: the same tasks with the official validation split, for the final table, and for best steps where a phase
        asks for them; and with what teachers and final rows train on, which released ranking rows are part of.
    teacher_config: the encoder's transformers config, known before its weights. teachers: one a task.
    general_teacher: the one for general distillation, where a given teacher has the main task's head the same one.
    world: the processes that train supernets and final rows together.
    """

    config: RunConfig
    folder: Path
    device: torch.device
    tokenizer: object
    corpus: Sequence
    tasks: dict[str, EncodedTask]
    held_out: dict[str, EncodedTask]
    teacher_config: object
    candidate_corpus: Sequence = ()
    general_teacher: Teacher | None = None
    teachers: dict[str, Teacher] = field(default_factory=dict)
    world: World = ALONE

    @property
    def main_task(self) -> EncodedTask:
        """The task that ranks candidates."""
        return next(iter(self.tasks.values()))

    @property
    def pad_token_id(self) -> int:
        """Id that fills batches."""
        return self.tokenizer.pad_token_id

    @property
    def student_tokenizer(self):
        """The tokenizer as it is kept beside a student, which knows positions up to --max_length alone: those beyond
        are as they were drawn."""
        kept = copy.deepcopy(self.tokenizer)
        kept.model_max_length = self.config.max_length
        return kept

    def student_config(self, **changes) -> EffBertConfig:
        """The students' config: sizes of this run, vocabulary and width of the teacher."""
        student = self.config.student
        return EffBertConfig(
            **{
                "hidden_size": student.hidden_size,
                "num_attention_heads": student.num_attention_heads,
                "intermediate_size": student.intermediate_size,
                "embedding_size": student.embedding_size,
                "hidden_dropout_prob": student.hidden_dropout_prob,
                "attention_probs_dropout_prob": student.attention_probs_dropout_prob,
                "neighbour_padding": student.neighbour_padding,
                **student_vocabulary(self.teacher_config),
                **changes,
            }
        )

    def general_plan(
        self, share: float, batch_size: int, epoch: int, seed: int | None = None, world: World = ALONE
    ) -> BatchPlan:
        """Batches over the first `share` of the corpus, of which an epoch has a set of its own as far as there are
        sets, in an order that depends on the seed and the epoch alone; equally many each epoch."""
        sequences = self.corpus[epoch % len(self.corpus)]
        return self.plan(subset(sequences, share), batch_size, "general", epoch, seed, world)

    def plan(
        self, data, batch_size: int, name: str, epoch: int, seed: int | None = None, world: World = ALONE
    ) -> BatchPlan:
        """Shuffled batches of any encoded data; `seed` None is the run's. In a `world` of several processes batches are
        that many times batch_size rows large, and the plan gives this one's part of each."""
        return BatchPlan(
            data,
            batch_size,
            pad_token_id=self.pad_token_id,
            seed=self.config.seed if seed is None else seed,
            name=name,
            epoch=epoch,
            buckets=(self.config.max_length,) if self.config.pad_to_max_length else None,
            part=(world.rank, world.size),
        )


def open_workspace(
    config: RunConfig,
    folder: Path,
    say: Say,
    world: World = ALONE,
    check: Callable[[Workspace], object] = lambda workspace: None,
) -> Workspace:
    """Make or read back tokenizer and data, and check that they, the teacher and the student go together.

    check: raises where a workspace will not do, which it gets without a corpus, before that is read and encoded. Cheap
    beside what follows: `open_teachers` makes the teachers.
    """
    device = pick_device(config.device, world)
    set_switches(config)
    given = read_config(config.teacher) if config.teacher else None
    check_corpora(config)
    loaded = load_tasks(config) if isinstance(config, TaskConfig) else {}
    for name, task in loaded.items():
        for note in task.notes:
            say(f"task {name}: {note}")
    check_teacher(given, config, next((task.spec for task in loaded.values()), None))
    tokenizer = own_tokenizer(config, folder, say) if given is None else given_tokenizer(config, given)
    for start in config.start_from if isinstance(config, TextConfig) else ():
        check_tokens(start, tokenizer)
    raw = {name: split_task(task, config) for name, task in loaded.items()}
    both = {name: encoded_splits(*splits, config, tokenizer) for name, splits in raw.items()}
    tasks, held_out = ({name: found[place] for name, found in both.items()} for place in (0, 1))
    teacher_config = given or own_teacher_config(config, tokenizer)
    workspace = Workspace(config, folder, device, tokenizer, [], tasks, held_out, teacher_config, world=world)
    for start in config.start_from if isinstance(config, SearchConfig) else ():
        start_weights(supernet_config(workspace.student_config(), config.student.num_hidden_layers), start)
    check(workspace)
    if given is not None and isinstance(config, TextConfig) and config.reads_text:
        spec = next((task.spec for task in loaded.values() if answers(given, task.spec)), None)
        load_model(config.teacher, spec and spec.kind)  # raises where its weights will not do
    corpus = open_corpus(config, tokenizer, say) if isinstance(config, TextConfig) and config.reads_text else []
    candidate_corpus = corpus
    if isinstance(config, SearchConfig) and config.other_corpus:
        own = replace(config, corpus=config.other_corpus, candidate_corpus=())
        candidate_corpus = open_corpus(own, tokenizer, say)
    check_inputs(folder, fingerprints(config, tokenizer, corpus, loaded, candidate_corpus))
    for name, task in tasks.items():
        ranking = f"{_counted(task, 'validation')} to rank on, " if config.validation_share else ""
        every = "" if held_out[name].train is task.train else ", teachers and final rows on all"
        train, held = _counted(task, "train", "questions" if task.spec.kind == "spans" else "rows"), held_out[name]
        say(f"task {name}: {train} to train on, {ranking}{_counted(held, 'validation')} held out{every}")
    return replace(workspace, corpus=corpus, candidate_corpus=candidate_corpus)


def set_switches(config: RunConfig) -> None:
    """PyTorch's threads and its precision of products, as a run asks for them."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.set_float32_matmul_precision(config.float32_matmul_precision)


def _counted(task: EncodedTask, split: str, what: str = "") -> str:
    """How many rows a split has, followed by `what` they are; for spans questions, and how many windows these make."""
    count = " ".join([f"{len(getattr(task.raw, split)):,}", *([what] if what else [])])
    return f"{count} ({len(getattr(task, split)):,} windows)" if task.spec.kind == "spans" else count


def check_corpora(config: RunConfig) -> None:
    """FileNotFoundError or ValueError where a file of text is not there, before another one is read for hours."""
    if isinstance(config, TextConfig) and config.reads_text:
        check_corpus((*config.corpus, *(config.candidate_corpus if isinstance(config, SearchConfig) else ())))


def open_corpus(config: TextConfig, tokenizer, say: Say) -> list:
    """The encoded sequences of general distillation: of "released" samples a set an epoch, SAMPLE_SETS at most."""
    sets = 1 if config.corpus_samples == "packed" else max(1, min(config.text_epochs, SAMPLE_SETS))
    corpus = load_corpus(
        config.corpus,
        tokenizer,
        config.max_length,
        samples=config.corpus_samples,
        sets=sets,
        limit_tokens=config.corpus_tokens or None,
        num_proc=config.num_threads,
        say=say,
    )
    each = f"{sets} sets of " if sets > 1 else ""
    said = f"corpus: {each}{len(corpus[0]):,} sequences of at most {config.max_length} tokens"
    say(f"{said} from {', '.join(config.corpus)}")
    return corpus


def open_teachers(workspace: Workspace, say: Say, steps: Steps = no_steps) -> None:
    """Make or read back the teachers: one a task, and the one for general distillation.

    A given teacher's own head serves the main task alone, where it is of its kind: what else it may have been trained
    on is unknown. Every other task gets a head of its own, fine-tuned with the encoder.
    """
    config, main = workspace.config, workspace.main_task.spec
    base = config.teacher or str(pretrained_teacher(workspace, say, steps))
    if config.teacher and answers(workspace.teacher_config, main):
        columns = teacher_columns(workspace.teacher_config, config, main) if main.kind == "classification" else None
        say(f"teacher for {main.name}: {base} as it is")
        workspace.general_teacher = Teacher(load_model(base, main.kind), columns).to(workspace.device)
        workspace.teachers[main.name] = workspace.general_teacher
    else:
        workspace.general_teacher = Teacher(load_model(base)).to(workspace.device)
    for name in workspace.tasks:
        if name not in workspace.teachers:
            workspace.teachers[name] = tuned_teacher(workspace, base, name, say, steps)


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one. ValueError where this machine has no such one.

    A GPU with a number becomes CUDA's current one. Each process of a `world` of several has one of its own, that of its
    local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: it should be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} GPUs here; use --device cpu or auto"
        )
    if device.type == "cuda" and world.size > 1:
        device = _own_gpu(name, device, world)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _own_gpu(name: str, device: torch.device, world: World) -> torch.device:
    if device.index is not None:
        raise ValueError(f"--device {name}: each of {world.size} processes needs a GPU of its own: use --device cuda")
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {world.local_rank} of this machine has no GPU: PyTorch finds {torch.cuda.device_count()} here; "
            "start no more than that, or use --device cpu"
        )
    return torch.device("cuda", world.local_rank)


def load_tasks(config: TaskConfig) -> dict[str, Task]:
    """The main task and the further ones of stage 3, raw."""
    own = {}
    if config.train_file and config.data_dir and not config.tasks:
        raise ValueError(
            f"--data_dir {config.data_dir} and --train_file exclude each other: files of known tasks, or your own rows"
        )
    for name in OWN_ROWS:
        if not config.train_file and getattr(config, name) != getattr(TaskConfig, name):
            raise ValueError(f"--{name} is of your own task: give its --train_file too, or leave it out")
    if config.train_file and is_known(config.task):
        raise ValueError(f"--train_file is of your own task, {config.task} is a known one: give --task a name of yours")
    if config.train_file:
        own = {
            "train_file": config.train_file,
            "validation_file": config.validation_file or None,
            "text_columns": config.text_columns,
            "label_column": config.label_column,
            "kind": config.task_kind or None,
        }
    tasks = [load_task(config.task, None if own else data_dir_of(config, config.task), **own)]
    tasks += [load_task(name, data_dir_of(config, name)) for name in config.tasks]
    _check_names([task.spec.name for task in tasks])
    return {task.spec.name: task for task in tasks}


def data_dir_of(config: TaskConfig, task: str) -> str | None:
    """The folder of a known task's files; None where they come by name, or are built in."""
    return None if plain_name(task) in map(plain_name, BUILTIN) else config.data_dir or None


def encoded_splits(split: Task, whole: Task, config: TaskConfig, tokenizer) -> tuple[EncodedTask, EncodedTask]:
    """What `split_task` gives in ids, as long and in such windows as the run's config says; what both have once."""
    settings = tokenizer, config.max_length
    windows = {name: getattr(config, name) for name in WINDOWS}
    first = encode_task(split, *settings, **windows)
    if whole is split:
        return first, first
    if whole.train is not split.train:
        return first, encode_task(whole, *settings, **windows)
    validation = encode_split(whole.validation, whole.spec, *settings, **windows, name="validation")
    return first, EncodedTask(whole, first.train, validation)


def note_windows(model, config: TaskConfig, kind: str) -> None:
    """Keep in a model's config how the contexts that it learnt with were cut, for those who read with it later."""
    for name in WINDOWS if kind == "spans" else ():
        setattr(model.config, name, getattr(config, name))


def _check_names(names: list[str]) -> None:
    """Task names become folder names."""
    for index, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"--task {name!r}: a task's name should be letters, digits, '.', '_' or '-', "
                "and begin with neither '.' nor '-'"
            )
        if name.casefold() in map(str.casefold, names[:index]):
            raise ValueError(f"task {name} is given twice, by --task and --tasks: name it once")


def split_task(task: Task, config: TaskConfig) -> tuple[Task, Task]:
    """The task with training rows cut into train and ranking rows, and with the official validation rows held out and
    what teachers and final rows train on. Where no share is for ranking both are one: all rows train."""
    count = min(config.max_train_rows or len(task.train), len(task.train))
    if config.validation_share and config.ranking_rows == "released":
        return _released_split(task, count, config.validation_share)
    return _drawn_split(task, count, config.validation_share)


def _released_split(task: Task, count: int, share: float) -> tuple[Task, Task]:
    """As published: of the first `count` rows in the order of the file the last ones rank, the very last first, and
    teachers and final rows train on all."""
    last = count - max(1, round(count * share))
    if last < 1:
        raise ValueError(f"task {task.spec.name}: {count} training rows leave none to train on beside those that rank")
    train, rank = task.train.select(range(last)), task.train.select(range(count - 1, last - 1, -1))
    return Task(task.spec, train, rank), Task(task.spec, task.train.select(range(count)), task.validation)


def _drawn_split(task: Task, count: int, share: float) -> tuple[Task, Task]:
    """By a fixed draw, and nothing trains on the rows that rank.

    Rows about one text (the context of spans, else text_a) stay on one side. Groups are drawn until the ranking rows
    reach their share, which the last one may exceed. The rows of the built-in tasks do not say which document they come
    from, so there too only rows with the same first text are kept together.
    """
    rng = random.generator(0, "ranking split", task.spec.name)
    order = rng.permutation(len(task.train))[:count]
    if not share:
        task = Task(task.spec, task.train.select(order), task.validation, task.notes)
        return task, task
    texts = task.train["context" if task.spec.kind == "spans" else "text_a"][:]
    numbers: dict[str, int] = {}
    group = np.array([numbers.setdefault(texts[row], len(numbers)) for row in order])
    if len(numbers) < 2:
        raise ValueError(
            f"task {task.spec.name}: {len(order)} training rows about {len(numbers)} text cannot be cut into rows to "
            "train on and rows to rank on"
        )
    drawn = rng.permutation(len(numbers))
    sizes = np.bincount(group)[drawn].cumsum()
    cut = 1 + int(np.searchsorted(sizes, max(1, round(len(order) * share))))
    ranking = np.isin(group, drawn[: min(cut, len(numbers) - 1)])
    train, rank = task.train.select(order[~ranking]), task.train.select(order[ranking])
    return Task(task.spec, train, rank), Task(task.spec, train, task.validation)


def fingerprints(
    config: RunConfig, tokenizer, corpus: Sequence, tasks: dict[str, Task], candidate_corpus: Sequence
) -> dict[str, str]:
    """Hashes of what a run reads, by what to call it in a message."""
    found = {"the teacher": content_hash(config.teacher)} if config.teacher else {}
    found["the tokenizer"] = tokenizer_fingerprint(tokenizer)
    texts = {"the corpus": corpus}
    if candidate_corpus is not corpus:
        texts["the candidates' corpus"] = candidate_corpus
    for name, sets in texts.items():
        for first in sets[:1]:
            found[name] = Path(first.cache_files[0]["filename"]).parent.name  # named by the hash of its content
    for number, start in enumerate(config.start_from if isinstance(config, TextConfig) else (), start=1):
        found[f"what --start_from names at place {number}"] = content_hash(start)
    for name, task in tasks.items():
        splits = [dataset_fingerprint(split) for split in (task.train, task.validation)]
        found[f"the rows of task {name}"] = " ".join([*splits, *task.spec.labels])
    return found


def check_inputs(folder: Path, found: dict[str, str]) -> None:
    """Keep the fingerprints of a run at its first start; ValueError where a later start finds others, or they are
    damaged."""
    path = folder / "inputs.json"
    if not path.exists():
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    before = read_kept(path, "takes its input for what this run began with")
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    if changed:
        raise ValueError(f"{changed[0]} changed since this run began: use another --output_dir")


def check_teacher(given, config: RunConfig, spec: TaskSpec | None) -> None:
    """Fail early, before anything is computed, where a teacher (given, or the run's own) cannot serve the student."""
    if given is not None:
        check_family(given)
    if isinstance(config, TextConfig):
        student, teacher = config.student, given or config.teacher_model
        check_shape(
            teacher.num_hidden_layers, teacher.num_attention_heads, student.num_hidden_layers,
            student.num_attention_heads,
        )  # fmt: skip
        attention_head_size(student.hidden_size, student.num_attention_heads)
    if spec is None or isinstance(config, TeacherConfig):  # whose head is a new one
        return
    if config.teacher_labels:
        _check_label_count(given, config)
    if given is not None and spec.kind == "classification" and answers(given, spec):
        teacher_columns(given, config, spec)


def _check_label_count(given, config: TaskConfig) -> None:
    count = len(config.teacher_labels)
    if given is None or head_of(given) != "classification":
        raise ValueError("--teacher_labels names the classes of a --teacher with a classification head: there is none")
    if count != given.num_labels:
        raise ValueError(f"--teacher_labels has {count} names, and teacher {config.teacher} {given.num_labels} logits")


def answers(given, spec: TaskSpec) -> bool:
    """Whether the head of a given teacher is of the kind that a task needs."""
    kind = head_of(given)
    if kind == "classification" and given.num_labels == 1:
        kind = "regression"
    return kind == spec.kind


def teacher_columns(given, config: TaskConfig, spec: TaskSpec) -> list[int]:
    """Columns of a given teacher's logits in the task's label order, mapped by name."""
    names = dict(enumerate(config.teacher_labels)) if config.teacher_labels else given.id2label
    return map_labels(spec.labels, names, f"teacher {config.teacher}")


def given_tokenizer(config: RunConfig, given):
    """The given teacher's tokenizer, checked against it; it marks no segments where the teacher has one only."""
    tokenizer = load_tokenizer(config.teacher)
    check_texts(given, tokenizer, config.max_length)
    if given.type_vocab_size < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def own_tokenizer(config: SearchConfig, folder: Path, say: Say):
    """A WordPiece tokenizer trained on the run's corpus, kept in its folder."""
    target = folder / "tokenizer"
    if not target.exists():
        say(f"training a WordPiece vocabulary of {config.teacher_model.vocab_size:,} on {', '.join(config.corpus)}")
        tokenizer = train_wordpiece(sentences_of(config.corpus), config.teacher_model.vocab_size)
        with atomic_dir(target) as temporary:
            save_tokenizer(tokenizer, temporary)
    return load_tokenizer(target)


def own_teacher_config(config: SearchConfig, tokenizer):
    """The config of the BERT that this run trains where no teacher is given."""
    from transformers import BertConfig

    sizes = config.teacher_model
    return BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=max(64, config.max_length),
        hidden_dropout_prob=sizes.dropout_prob,
        attention_probs_dropout_prob=sizes.dropout_prob,
    )


def pretrained_teacher(workspace: Workspace, say: Say, steps: Steps) -> Path:
    """A small BERT trained by masked language modelling on the run's corpus."""
    target = workspace.folder / "teacher" / "base"
    target.parent.mkdir(parents=True, exist_ok=True)
    phase = Phase(("teacher", "mlm"), workspace.config.seed, target.parent / "mlm.pt")
    if not target.exists():
        pretrain(workspace, target, phase, say, steps)
    forget([phase])
    return target


def pretrain(workspace: Workspace, target: Path, phase: Phase, say: Say, steps: Steps) -> None:
    """Train a fresh BERT by masked language modelling into the folder `target`."""
    config, tokenizer = workspace.config, workspace.tokenizer
    arguments = config.teacher_model.pretraining
    size = arguments.per_device_train_batch_size
    model = new_bert(workspace.teacher_config, config.seed).to(workspace.device)
    say(f"teacher: masked language modelling, {model.num_parameters():,} parameters")
    result = train(
        model,
        lambda epoch: MaskedPlan(workspace.general_plan(1.0, size, epoch), tokenizer, config.seed, epoch),
        lambda batch, number: masked_lm_loss(model, batch),
        arguments,
        phase,
        device=workspace.device,
        on_step=steps("teacher"),
    )
    must_finish(result, "the teacher's masked language modelling", "--teacher_model.pretraining.learning_rate")
    say(f"teacher: loss {result.loss:.3f} after {result.tokens:,} tokens in {result.seconds:.0f} s")
    keep(model, target, result, tokenizer=tokenizer)


def tuned_teacher(workspace: Workspace, base: str, name: str, say: Say, steps: Steps) -> Teacher:
    """The teacher of one task: the encoder `base` fine-tuned with a head for it."""
    task, learnt, folder = workspace.tasks[name], workspace.held_out[name], workspace.folder / "teacher"
    target = folder / "tasks" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    phase = Phase(("teacher", "task", name), workspace.config.seed, folder / f"task-{name}.pt")
    if not target.exists():
        arguments = workspace.config.teacher_model.finetuning_on(name)
        model, result = fine_tune(workspace, base, learnt, arguments, phase, say, steps)
        must_finish(result, f"fine-tuning the teacher on {name}", "--teacher_model.finetuning.learning_rate")
        unseen, what = (task, "ranking") if learnt.train is task.train else (learnt, "held-out")
        scores = teacher_scores(workspace, model, unseen)
        say(f"teacher for {name}: {show(scores)} on the {what} rows after {result.seconds:.0f} s")
        keep(model, target, result, tokenizer=workspace.tokenizer)
    forget([phase])
    return Teacher(load_model(target, task.spec.kind)).to(workspace.device)


def fine_tune(
    workspace: Workspace,
    base: str,
    task: EncodedTask,
    arguments: TrainingArguments,
    phase: Phase,
    say: Say,
    steps: Steps,
    world: World = ALONE,
) -> tuple[torch.nn.Module, TrainingResult]:
    """The encoder `base` fine-tuned under a new head on a task's training rows, with its labels in their order, by all
    processes of a world together."""
    config, spec = workspace.config, task.spec
    labels = {"regression": ("score",), "spans": ("start", "end")}.get(spec.kind, spec.labels)
    torch.manual_seed(random.key(config.seed, "teacher", spec.name, "head"))
    model = with_new_head(base, spec.kind, labels).to(workspace.device)
    size = arguments.per_device_train_batch_size
    note_windows(model, config, spec.kind)
    model.config.learnt_length = config.max_length  # of students their tokenizer says it
    say(f"teacher for {spec.name}: fine-tuning {base}")
    result = train(
        model,
        lambda epoch: workspace.plan(task.train, size, f"teacher {spec.name}", epoch, world=world),
        lambda batch, number: labelled_loss(model, batch, spec.kind) * batch.shares.rows,
        arguments,
        phase,
        device=workspace.device,
        rank=lambda: rank(workspace, lambda batch: logits_of(model, *model_inputs(batch)), spec.name),
        on_step=steps(f"teacher for {spec.name}"),
        world=world,
    )
    return model, result


def teacher_scores(workspace: Workspace, model, task: EncodedTask) -> dict[str, float]:
    """Metrics of a transformers model on a task's validation rows."""
    return score(workspace, lambda batch: logits_of(model, *model_inputs(batch)), task)


def labelled_loss(model, batch, kind: str) -> torch.Tensor:
    """A transformers model's own loss against a batch's labels."""
    names = ("start_positions", "end_positions") if kind == "spans" else ("labels",)
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: getattr(batch, name) for name in (*inputs, *names)}).loss


def model_inputs(batch):
    """(input_ids, attention_mask, token_type_ids) of a batch."""
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def score(workspace: Workspace, logits_of, task: EncodedTask) -> dict[str, float]:
    """Metrics on the task's validation rows."""
    return evaluate(logits_of, task, pad_token_id=workspace.pad_token_id, device=workspace.device)


def rank(workspace: Workspace, logits_of, task: str) -> float:
    """The mean of a task's metrics on its official validation rows, by which the published best step is chosen."""
    held_out = workspace.held_out[task]
    found = score(workspace, logits_of, held_out)
    return sum(found[name] for name in held_out.spec.metrics) / len(held_out.spec.metrics)


def show(scores: dict[str, float]) -> str:
    """Scores as text."""
    return ", ".join(f"{name} {value if isinstance(value, int) else f'{value:.4f}'}" for name, value in scores.items())


def must_finish(result: TrainingResult, what: str, flag: str) -> None:
    """ValueError where a phase that everything rests on diverged; `flag` is the one that may help."""
    if not result.finished:
        raise ValueError(f"{what} diverged ({result.diverged}): lower {flag}")


def keep(
    model, target: Path, *results: TrainingResult, tokenizer=None, beside: Mapping[str, str] = MappingProxyType({})
) -> None:
    """A transformers model folder with what its training took (training.json), all or nothing.

    results: of whatever has its seconds and tokens, a `Distillation` too; none where nothing was trained. beside: texts
    of further files, by name."""
    best = [found for result in results for found in best_step(result).items()]
    cost = {"seconds": sum(result.seconds for result in results), "tokens": sum(result.tokens for result in results)}
    with atomic_dir(target) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        for name, text in {**beside, "training.json": json.dumps(cost | dict(best))}.items():
            (temporary / name).write_text(text, encoding="utf-8")


def best_step(result) -> dict[str, int]:
    """What is kept of a training's best step: nothing where none was asked for."""
    return {"best_step": result.best_step} if result.best_step else {}
