"""What all stages of a run share, made once and kept in its folder: tokenizer, corpus, tasks, teachers.

Each piece is made the first time and read back afterwards, so a resumed run goes on from where it stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import attention_head_size
from effbert.config import SearchConfig
from effbert.data.batches import BatchPlan, subset
from effbert.data.corpus import load_corpus, sentences_of
from effbert.data.encode import EncodedTask, encode_task
from effbert.data.tasks import BUILTIN, Task, TaskSpec, load_task, map_labels
from effbert.data.tokenizer import load_tokenizer, train_wordpiece
from effbert.engine import Phase, forget, train
from effbert.evaluate import evaluate
from effbert.files import atomic_dir
from effbert.mlm import masked_lm_loss, new_bert
from effbert.model import EffBertConfig
from effbert.teacher import Teacher, check_shape, head_of, load_model, read_config, student_vocabulary

Say = Callable[[str], None]


@dataclass
class Workspace:
    """Tokenizer, data and teachers of a run.

    tasks: by name, the main task first: rows to train on, and as validation the rows that rank candidates, cut from the
        official training rows. held_out: the official validation split, for the final table only.
    teacher_config: the encoder's transformers config, known before its weights. general_teacher: the encoder for
        general distillation. teachers: one fine-tuned teacher a task.
    """

    config: SearchConfig
    folder: Path
    device: torch.device
    tokenizer: object
    corpus: object
    tasks: dict[str, EncodedTask]
    held_out: dict[str, EncodedTask]
    teacher_config: object
    general_teacher: Teacher | None = None
    teachers: dict[str, Teacher] = field(default_factory=dict)

    @property
    def main_task(self) -> EncodedTask:
        """The task that ranks candidates."""
        return next(iter(self.tasks.values()))

    @property
    def pad_token_id(self) -> int:
        """Id that fills batches."""
        return self.tokenizer.pad_token_id

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
                "initializer_range": initializer_range(student.hidden_size),
                **student_vocabulary(self.teacher_config),
                **changes,
            }
        )

    def general_plan(self, share: float, batch_size: int, epoch: int) -> BatchPlan:
        """Batches over the first `share` of the corpus, in an order that depends on the seed and the epoch alone."""
        data = subset(self.corpus, share)
        return self.plan(data, batch_size, "general", epoch)

    def plan(self, data, batch_size: int, name: str, epoch: int, seed: int | None = None) -> BatchPlan:
        """Shuffled batches of any encoded data; `seed` None is the run's."""
        seed = self.config.seed if seed is None else seed
        return BatchPlan(data, batch_size, pad_token_id=self.pad_token_id, seed=seed, name=name, epoch=epoch)


def open_workspace(config: SearchConfig, folder: Path, say: Say) -> Workspace:
    """Make or read back tokenizer and data, and check that they, the teacher and the student go together.

    Cheap beside what follows: `open_teachers` makes the teachers.
    """
    device = pick_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    raw = {name: split_task(task, config) for name, task in load_tasks(config).items()}
    given = read_config(config.teacher) if config.teacher else None
    check_teacher(given, config, next(iter(raw.values()))[0].spec)
    tokenizer = load_tokenizer(config.teacher) if given is not None else own_tokenizer(config, folder, say)
    corpus = load_corpus(config.corpus, tokenizer, config.max_length, limit_tokens=config.corpus_tokens or None)
    say(f"corpus: {len(corpus):,} sequences of at most {config.max_length} tokens from {config.corpus}")
    tasks = {name: encode_task(task, tokenizer, config.max_length) for name, (task, _) in raw.items()}
    held_out = {name: encode_task(task, tokenizer, config.max_length) for name, (_, task) in raw.items()}
    for name, task in tasks.items():
        say(
            f"task {name}: {len(task.train):,} rows to train on, {len(task.validation):,} to rank on, "
            f"{len(held_out[name].validation):,} held out"
        )
    teacher_config = given or own_teacher_config(config, tokenizer)
    return Workspace(config, folder, device, tokenizer, corpus, tasks, held_out, teacher_config)


def open_teachers(workspace: Workspace, say: Say) -> None:
    """Make or read back the teachers: the encoder for general distillation, and one fine-tuned teacher a task."""
    base = workspace.config.teacher or str(pretrained_teacher(workspace, say))
    workspace.general_teacher = Teacher(load_model(base)).to(workspace.device)
    workspace.teachers = {name: task_teacher(workspace, base, task, say) for name, task in workspace.tasks.items()}


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name}: this PyTorch finds no GPU here; use --device cpu or auto")
    return torch.device(name)


def load_tasks(config: SearchConfig) -> dict[str, Task]:
    """The main task and the further ones of stage 3, raw."""
    own = {}
    if config.train_file:
        own = {
            "train_file": config.train_file,
            "validation_file": config.validation_file or None,
            "text_columns": config.text_columns,
            "label_column": config.label_column,
            "kind": config.task_kind or None,
        }
    main = load_task(config.task, None if own else _data_dir(config, config.task), **own)
    tasks = {main.spec.name: main}
    for name in config.tasks:
        task = load_task(name, _data_dir(config, name))
        tasks[task.spec.name] = task
    return tasks


def _data_dir(config: SearchConfig, task: str) -> str | None:
    return None if task in BUILTIN else config.data_dir or None


def split_task(task: Task, config: SearchConfig) -> tuple[Task, Task]:
    """(training rows cut into train and ranking rows, the official validation rows held out), by a fixed draw."""
    order = random.generator(0, "ranking split", task.spec.name).permutation(len(task.train))
    if config.max_train_rows:
        order = order[: config.max_train_rows]
    ranking = max(1, round(len(order) * config.validation_share))
    if ranking >= len(order):
        raise ValueError(
            f"task {task.spec.name}: {len(order)} training rows leave none to train on "
            f"with validation_share {config.validation_share}"
        )
    train, rank = task.train.select(order[ranking:]), task.train.select(order[:ranking])
    return Task(task.spec, train, rank), Task(task.spec, task.validation, task.validation)


def check_teacher(given, config: SearchConfig, spec: TaskSpec) -> None:
    """Fail early, before anything is computed, where a teacher (given, or the run's own) cannot serve the student."""
    student, teacher = config.student, given or config.teacher_model
    check_shape(
        teacher.num_hidden_layers, teacher.num_attention_heads, student.num_hidden_layers, student.num_attention_heads
    )
    attention_head_size(student.hidden_size, student.num_attention_heads)
    if given is not None and head_of(given) == "classification" and spec.kind == "classification":
        teacher_columns(given, config, spec)


def teacher_columns(given, config: SearchConfig, spec: TaskSpec) -> list[int]:
    """Columns of a given teacher's logits in the task's label order, mapped by name."""
    names = dict(enumerate(config.teacher_labels)) if config.teacher_labels else given.id2label
    return map_labels(spec.labels, names, f"teacher {config.teacher}")


def own_tokenizer(config: SearchConfig, folder: Path, say: Say):
    """A WordPiece tokenizer trained on the run's corpus, kept in its folder."""
    target = folder / "tokenizer"
    if not target.exists():
        say(f"training a WordPiece vocabulary of {config.teacher_model.vocab_size:,} on {config.corpus}")
        tokenizer = train_wordpiece(sentences_of(config.corpus), config.teacher_model.vocab_size)
        with atomic_dir(target) as temporary:
            tokenizer.save_pretrained(temporary)
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
        initializer_range=initializer_range(sizes.hidden_size),
    )


def initializer_range(hidden_size: int) -> float:
    """BERT's standard deviation of fresh weights, 0.02 at width 768, at the width that keeps a product's variance."""
    return 0.02 * (768 / hidden_size) ** 0.5


def pretrained_teacher(workspace: Workspace, say: Say) -> Path:
    """A small BERT trained by masked language modelling on the run's corpus."""
    config, tokenizer = workspace.config, workspace.tokenizer
    target = workspace.folder / "teacher" / "base"
    if target.exists():
        return target
    arguments = config.teacher_model.pretraining
    model = new_bert(workspace.teacher_config, config.seed).to(workspace.device)
    target.parent.mkdir(parents=True, exist_ok=True)
    phase = Phase(("teacher", "mlm"), config.seed, target.parent / "mlm.pt")
    say(f"teacher: masked language modelling, {model.num_parameters():,} parameters")
    result = train(
        model,
        lambda epoch: workspace.general_plan(1.0, arguments.per_device_train_batch_size, epoch),
        lambda batch, number: masked_lm_loss(
            model, batch, tokenizer, random.generator(config.seed, "teacher", "mask", number)
        ),
        arguments,
        phase,
        device=workspace.device,
    )
    _must_finish(result, "the teacher's masked language modelling")
    say(f"teacher: loss {result.loss:.3f} after {result.tokens:,} tokens in {result.seconds:.0f} s")
    _keep(model, tokenizer, target)
    forget([phase])
    return target


def task_teacher(workspace: Workspace, base: str, task: EncodedTask, say: Say) -> Teacher:
    """The teacher of one task: the given one where it has the task's head, else the encoder fine-tuned on the task."""
    config, spec = workspace.config, task.spec
    given = read_config(base)
    head = head_of(given) if config.teacher else None
    same_kind = head == ("spans" if spec.kind == "spans" else "classification")
    if same_kind and (spec.kind == "spans" or given.num_labels == spec.num_labels):
        columns = teacher_columns(given, config, spec) if spec.kind == "classification" else None
        say(f"teacher for {spec.name}: {base} as it is")
        return Teacher(load_model(base, spec.kind), columns).to(workspace.device)
    target = workspace.folder / "teacher" / spec.name
    if not target.exists():
        fine_tune(workspace, base, task, target, say)
    columns = None
    if spec.kind == "classification":
        columns = map_labels(spec.labels, read_config(target).id2label, f"teacher {target}")
    return Teacher(load_model(target, spec.kind), columns).to(workspace.device)


def fine_tune(workspace: Workspace, base: str, task: EncodedTask, target: Path, say: Say) -> None:
    """Fine-tune the encoder `base` on a task's labels into the folder `target`."""
    config, spec = workspace.config, task.spec
    arguments = config.teacher_model.finetuning
    labels = {}
    if spec.kind != "spans":
        names = spec.labels or ("score",)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(random.key(config.seed, "teacher", spec.name, "head"))
    model = load_model(base, spec.kind, **labels).to(workspace.device)
    target.parent.mkdir(parents=True, exist_ok=True)
    phase = Phase(("teacher", spec.name), config.seed, target.parent / f"{spec.name}.pt")

    def inputs(batch):
        types = {} if getattr(model.config, "type_vocab_size", 1) < 2 else {"token_type_ids": batch.token_type_ids}
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **types}

    def loss_of(batch, number):
        if spec.kind == "spans":
            return model(**inputs(batch), start_positions=batch.start_positions, end_positions=batch.end_positions).loss
        return model(**inputs(batch), labels=batch.labels).loss

    size = arguments.per_device_train_batch_size
    say(f"teacher for {spec.name}: fine-tuning {base}")
    result = train(
        model,
        lambda epoch: workspace.plan(task.train, size, f"teacher {spec.name}", epoch),
        loss_of,
        arguments,
        phase,
        device=workspace.device,
    )
    _must_finish(result, f"fine-tuning the teacher on {spec.name}")
    teacher = Teacher(model)
    scores = score(workspace, lambda batch: teacher.trace(*model_inputs(batch)).logits, task)
    say(f"teacher for {spec.name}: {show(scores)} on the ranking rows after {result.seconds:.0f} s")
    _keep(model, workspace.tokenizer, target)
    forget([phase])


def model_inputs(batch):
    """(input_ids, attention_mask, token_type_ids) of a batch."""
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def score(workspace: Workspace, logits_of, task: EncodedTask) -> dict[str, float]:
    """Metrics on the task's validation rows."""
    return evaluate(logits_of, task, pad_token_id=workspace.pad_token_id, device=workspace.device)


def show(scores: dict[str, float]) -> str:
    """Scores as text."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _must_finish(result, what: str) -> None:
    if not result.finished:
        raise ValueError(f"{what} diverged (non-finite loss after {result.steps} steps): lower its learning_rate")


def _keep(model, tokenizer, target: Path) -> None:
    with atomic_dir(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
