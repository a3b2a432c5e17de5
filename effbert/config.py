"""What a run is: typed settings and the presets, which are values of them.

Every field can be overridden on the command line under its own name (`--learning_rate` style, nested ones as
`--stage1.task_phase.learning_rate`). Sizes and rates that a preset changes are in `PRESETS`, at the end of this file.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from effbert.architecture import PUBLISHED, Architecture, Dimensions, count_parameters
from effbert.data.tasks import BUILTIN, task_key
from effbert.distill import LossWeights
from effbert.models import refuse_plus_without_start
from effbert.optim import TrainingArguments


@dataclass(frozen=True)
class StudentArguments:
    """Sizes of a supernet and its candidates, or of an architecture that is spelt out; names as in transformers.

    neighbour_padding, also of named models: what padding contributes to the embedding of its neighbour, "zero", or as
    published the row of its token, which stays as it was drawn.
    """

    hidden_size: int = 540
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 540
    embedding_size: int = 128
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    neighbour_padding: Literal["zero", "released"] = "zero"

    def __post_init__(self):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "embedding_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")


@dataclass(frozen=True)
class TeacherArguments:
    """The teacher made where no folder is given: a BERT of these sizes, masked-LM on the corpus, then the task.

    finetuning also serves a given teacher that has no head for the task. finetuning_eval_steps: TASK=N, where a task's
    teacher is scored after every N steps, not after every finetuning.eval_steps.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    dropout_prob: float = 0.1
    pretraining: TrainingArguments = field(default_factory=TrainingArguments)
    finetuning: TrainingArguments = field(
        default_factory=lambda: TrainingArguments(learning_rate=5e-5, num_train_epochs=3)
    )
    finetuning_eval_steps: tuple[str, ...] = ()

    def __post_init__(self):
        refuse_best(pretraining=self.pretraining)
        for text in self.finetuning_eval_steps:
            task, _, steps = text.partition("=")
            if not (task and steps.isdecimal() and self.finetuning.load_best_model_at_end):
                raise ValueError(
                    f"finetuning_eval_steps {text!r}: it should be TASK=N, beside finetuning.load_best_model_at_end, "
                    "without which it should be left empty"
                )

    def finetuning_on(self, task: str) -> TrainingArguments:
        """How the teacher of a task is trained; of two settings for it the last counts."""
        given = dict(text.split("=") for text in self.finetuning_eval_steps)
        own = {task_key(name): int(steps) for name, steps in given.items()}
        steps = own.get(task_key(task), self.finetuning.eval_steps)
        return dataclasses.replace(self.finetuning, eval_steps=steps)


def refuse_best(**phases: TrainingArguments) -> None:
    """ValueError where a phase is to end with its best step though no score tells which that is."""
    for name, arguments in phases.items():
        if arguments.load_best_model_at_end:
            raise ValueError(f"{name}.load_best_model_at_end: nothing scores the steps of that phase: leave it out")


@dataclass(frozen=True)
class Budget:
    """What a distillation may see: shares of the corpus and of the task's training rows, and how it trains on them."""

    general_share: float = 1.0
    task_share: float = 1.0
    general_phase: TrainingArguments = field(default_factory=TrainingArguments)
    task_phase: TrainingArguments = field(
        default_factory=lambda: TrainingArguments(learning_rate=4e-4, num_train_epochs=3)
    )

    def __post_init__(self):
        for name in ("general_share", "task_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0 and at most 1")
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 is all of it, and not one row
        refuse_best(general_phase=self.general_phase)
        if self.task_phase.num_train_epochs < 1:
            raise ValueError("task_phase.num_train_epochs is 0: a student without task distillation has no score")


@dataclass(frozen=True)
class SearchStage(Budget):
    """A stage of the search: how many candidates, who proposes them, and its budget.

    In stages 1 and 2 the budget is each candidate's own; in stage 3 it is that of the one shared supernet, on which
    candidates are scored without training. sampler: who proposes candidates, the first initial_samples at random; what
    it learns from their values is learned anew every refit_every of them; "released" is the published search's, which
    learns nothing of less than 50 and draws architectures in ways of its own, also those that stage 3 trains its
    supernet on (effbert.search.released). cohort: candidates proposed at once, before any of them has a value, so a
    whole first cohort is random. rungs: rising shares of the budget, the last one 1; a
    cohort is trained on the first, its best on the next, so many that every rung costs the same. filter: a score before
    any training by which filter_share of a cohort, all but one at the most, is discarded (effbert.search.proxies).
    ranking_share: of the rows that rank candidates, those that this stage scores on. scored_epochs: of the task, after
    which a candidate with the whole budget is scored: the last alone, or all, of which the best counts, as published;
    scoring takes as long as a part of the training. With less than the whole budget it is always the last.
    """

    num_candidates: int = 80
    sampler: Literal["random", "evolution", "lanas", "predictor", "released"] = "predictor"
    initial_samples: int = 12
    refit_every: int = 2
    cohort: int = 1
    rungs: tuple[float, ...] = (1.0,)
    filter: Literal["none", "parameters", "w-pca", "supernet"] = "none"
    filter_share: float = 0.5
    ranking_share: float = 1.0
    scored_epochs: Literal["last", "all"] = "last"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ranking_share <= 1:
            raise ValueError(f"ranking_share is {self.ranking_share}: it must be above 0 and at most 1")
        object.__setattr__(self, "ranking_share", float(self.ranking_share))
        if self.task_phase.load_best_model_at_end:
            raise ValueError(
                "task_phase.load_best_model_at_end: --scored_epochs all lets a candidate's best epoch count, and stage "
                "3's supernet has no score: leave it out"
            )
        if not 0 < self.filter_share < 1:
            raise ValueError(f"filter_share is {self.filter_share}: it must be above 0 and below 1")
        for name, least in {"num_candidates": 1, "cohort": 1, "initial_samples": 2, "refit_every": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.filter != "none" and self.kept(self.cohort) == self.cohort:
            raise ValueError(
                f"filter is {self.filter}: with a filter_share of {self.filter_share} it would discard nobody of a "
                f"cohort of {self.cohort}: give a larger cohort"
            )
        rising = all(low < high for low, high in zip(self.rungs, self.rungs[1:], strict=False))
        if not self.rungs or not rising or self.rungs[0] <= 0 or self.rungs[-1] != 1:
            raise ValueError(f"rungs is {self.rungs}: it should rise, from above 0, to 1 at its end")

    def kept(self, count: int) -> int:
        """How many of `count` candidates the filter leaves to be trained."""
        return count if self.filter == "none" else max(1, round(count * (1 - self.filter_share)))


@dataclass(frozen=True)
class FinalStage(Budget):
    """The full distillation of the winner, and of the rows it is compared with, all under this budget.

    num_random: random architectures in the table. num_front: candidates of stage 3's Pareto front beside the winner,
    where there are costs to minimise.
    """

    num_random: int = 2
    num_front: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_random", "num_front"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")


def _candidate() -> SearchStage:
    return SearchStage(
        general_share=0.02,
        task_share=0.1,
        task_phase=TrainingArguments(learning_rate=4e-4, num_train_epochs=3, per_device_train_batch_size=64),
        cohort=27,
        rungs=(1 / 9, 1 / 3, 1.0),
    )


@dataclass(frozen=True)
class RunConfig:
    """What every run has.

    Attributes:
        output_dir: The run's folder; the same command again resumes there.
        teacher: Folder or name of a BERT-like encoder; a search without one trains its own.
        max_length: Longest text in tokens.
        pad_to_max_length: Pad every batch to max_length, as published, instead of grouping texts by length.
        seed: Of everything random.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; each process of several has a GPU of its own.
        num_threads: CPU threads, and processes that tokenise the corpus; 0 leaves it to PyTorch, and is one process a
            core, 16 at most. The last bits of a score depend on the threads, and on how many models train at once.
        float32_matmul_precision: PyTorch's switch of that name, for products of fp32: "high" lets a GPU compute them in
            TF32; "medium" does too, and gives those of a CPU with AVX-512 to oneDNN, which may round to bf16 where
            there are units for that (AMX).
    """

    output_dir: str
    teacher: str = ""
    max_length: int = 128
    pad_to_max_length: bool = False
    seed: int = 0
    device: str = "auto"
    num_threads: int = 0
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"

    def __post_init__(self):
        self.at_least(max_length=8, num_threads=0)

    def at_least(self, **least: float) -> None:
        """ValueError where a field is below what it must be."""
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {minimum}")


OWN_ROWS = ("validation_file", "text_columns", "label_column", "task_kind")  # settings of a task with a train_file


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """A run on a task.

    Attributes:
        task: The task, in a search the one that ranks candidates: builtin-topic, builtin-next, a GLUE name, squad,
            squad2.0, or a name of your own with train_file.
        data_dir: Folder with GLUE or SQuAD files in their official layout, or with folders glue and squad of these;
            without it they are loaded by name.
        train_file: Your own task as CSV, TSV, JSON or JSON lines.
        validation_file: The rows of your own task to hold out.
        text_columns: The one or two text columns of your own task.
        label_column: The label column of your own task.
        task_kind: "regression" where the labels of your own task are scores.
        max_train_rows: Use at most so many training rows of each task; 0 for all.
        teacher_labels: Names for the columns of the teacher's logits, in their order.
        doc_stride: Tokens of context by which the windows of a long SQuAD context move on; 0 for windows that share
            128, or a third of max_length.
        max_query_length: Tokens kept of a SQuAD question, special ones not counted (the published 64 count two: 62); 0
            for 64, or a quarter of max_length.
    """

    task: str = "mnli"
    data_dir: str = ""
    train_file: str = ""
    validation_file: str = ""
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    task_kind: Literal["", "classification", "regression"] = ""
    max_train_rows: int = 0
    teacher_labels: tuple[str, ...] = ()
    doc_stride: int = 0
    max_query_length: int = 0

    tasks: ClassVar[tuple[str, ...]] = ()
    validation_share: ClassVar[float] = 0.0
    ranking_rows: ClassVar[str] = "drawn"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(max_train_rows=0, doc_stride=0, max_query_length=0)


@dataclass(frozen=True)
class TextConfig(RunConfig):
    """A run that distils students on plain text.

    Attributes:
        corpus: Plain text for general distillation, one or several of: "builtin", a text file or folder, a parquet,
            JSON or CSV file or folder, NAME, NAME:CONFIG or NAME:CONFIG@REVISION of a data set on the hub (streamed).
        corpus_samples: "packed" uses every token; "released" cuts one sample out of each document, as published: other
            ones each epoch, of which there are at most five sets.
        corpus_tokens: Use at most so many tokens of it, in a search of each of its two texts; 0 for all.
        start_from: Folder of a supernet to begin with (effbert pretrain), or where no supernet is trained, of a
            student; for several models one each, or one for all. Without it weights are fresh.
    """

    corpus: tuple[str, ...] = ("builtin",)
    corpus_samples: Literal["packed", "released"] = "packed"
    corpus_tokens: int = 0
    start_from: tuple[str, ...] = ()
    student: StudentArguments = field(default_factory=StudentArguments)
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(corpus_tokens=0)

    @property
    def reads_text(self) -> bool:
        """Whether anything learns from the corpus."""
        return True

    @property
    def text_epochs(self) -> int:
        """Epochs of the longest phase that reads the corpus."""
        return 1


@dataclass(frozen=True)
class TeacherConfig(TaskConfig):
    """A teacher fine-tuned on a task, from an encoder, whatever head that had: all its training rows, scored on its
    official validation rows.

    Attributes:
        finetuning: How it is trained.
    """

    finetuning: TrainingArguments = field(
        default_factory=lambda: TrainingArguments(learning_rate=5e-5, num_train_epochs=3)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_labels:
            raise ValueError(f"teacher_labels is {self.teacher_labels}: the head that is trained has the task's labels")


@dataclass(frozen=True)
class PretrainConfig(TextConfig):
    """General distillation, on plain text without labels, of a supernet or of models.

    Attributes:
        model: "supernet" with the sizes of --student; or one or several that learn together, from one pass of the
            teacher: a published model such as efficientbert-tiny, a plain BERT such as bert-6x312, "teacher" sized down
            to --params, or an architecture, an expression a layer, with the sizes of --student.
        params: Parameters of --model teacher, without pooler and head.
        training: How it is trained.
    """

    model: tuple[str, ...] = ("supernet",)
    params: int = 0
    training: TrainingArguments = field(default_factory=TrainingArguments)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(params=0)
        refuse_best(training=self.training)
        if not self.model or ("supernet" in self.model and len(self.model) > 1):
            raise ValueError(f"model is {self.model}: give a supernet alone, or one or several models")
        refuse_plus_without_start(self.model, self.start_from)

    @property
    def text_epochs(self) -> int:
        """Epochs of general distillation."""
        return self.training.num_train_epochs


@dataclass(frozen=True)
class DistillConfig(TextConfig, TaskConfig):
    """General, then task distillation of a model, scored on the official validation rows; several learn together, from
    one pass of the teacher.

    Attributes:
        model: A published model such as efficientbert-tiny, a plain BERT such as bert-6x312, "teacher" sized down to
            --params, or an architecture, an expression a layer, with the sizes of --student; without it the students
            that --start_from holds.
        params: Parameters of --model teacher, without pooler and head.
        seeds: Repeat it so often, for mean and spread.
        teacher_cache: On a CPU, keep the teacher's outputs for the task's rows in the run's folder, in bf16 and until
            the run ends, where they take at most so many GB; 0 for never.
        budget: What it may see and how it trains; --budget.general_phase.num_train_epochs 0 leaves out the first half,
            and the corpus unread.
    """

    model: tuple[str, ...] = ()
    params: int = 0
    seeds: int = 1
    teacher_cache: float = 2.0
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(params=0, seeds=1, teacher_cache=0)
        if not self.model and not self.start_from:
            raise ValueError("nothing to distil: give --model, or --start_from with the folder of a student")
        refuse_plus_without_start(self.model, self.start_from)

    @property
    def reads_text(self) -> bool:
        """Whether there is a first half, of general distillation."""
        return self.text_epochs > 0

    @property
    def text_epochs(self) -> int:
        """Epochs of general distillation."""
        return self.budget.general_phase.num_train_epochs


@dataclass(frozen=True)
class SearchConfig(TextConfig, TaskConfig):
    """A progressive search with warm-up distillation, from text to a small model.

    Attributes:
        candidate_corpus: Text that the candidates of stages 1 and 2 learn from, and a supernet of their own, where that
            is another than --corpus; stage 3 and the final rows then begin with a second supernet, of --corpus.
        tasks: Further tasks that stage 3 learns beside it.
        validation_share: Share of the task's training rows on which candidates are ranked.
        ranking_metric: What ranks candidates of a classification task: "roc_auc", how well their logits tell the
            classes apart, wherever the threshold lies (the area under the ROC curve, mean of each class against all
            others); or "task", the task's first metric, as published. Other tasks are ranked by that.
        ranking_rows: "drawn" cuts them out by a fixed draw, and nothing trains on them; "released" takes the last ones
            of the file, as published, on which teachers and final rows train too.
        min_params: Fewest parameters of a candidate, with the projection, without pooler and head; 0 for the published
            architecture's count at these sizes times 15/15.74, or 15/16 of max_params where that is less.
        max_params: Most parameters of a candidate; 0 for the published architecture's count times 16/15.74, or 16/15 of
            min_params where that is more.
        params: Find a sub-network of so many parameters: the published band, 15 to 16 million for 15.74, scaled to it,
            in place of min_params and max_params.
        max_flops: Most FLOPs of a candidate for a text of max_length tokens, without projection, pooler and head; 0 for
            any.
        max_latency_ms: Most milliseconds of a candidate's deployed model for one text of max_length tokens, in fp32 on
            this device; 0 for any. Slower ones are discarded before they train.
        minimize: Costs that count beside the task's metric: "parameters", "flops", "latency". Candidates are then
            ranked by Pareto fronts, and the best others of stage 3's front join the final table; its winner still has
            the best metric.
        weight_sharing: What each batch of stage 3 trains: "single-path" one drawn architecture, "sandwich" the smallest
            and the largest of the band too.
        task_temperature: Stage 3 draws a task of n batches in proportion to n^(1/task_temperature); 1 takes all there
            are.
        agreement_candidates: Train so many of stage 3's candidates alone too, with the whole budget of stage 1, and
            record how far the scores on shared weights agree; 0 for none, from 12 on it says something.
        storage: URL of the database that keeps the study, such as postgresql+psycopg://user@machine/name, for workers
            on several machines, which all share output_dir; empty for SQLite in output_dir. An SQLite file's relative
            path is one from the working directory, and kept as an absolute one.
        population: Candidates trained at once on the same batches; 0 for as many of a cohort as memory holds.
        teacher_cache: On a CPU, keep the teacher's outputs for the rows that candidates train on in the run's folder,
            in bf16 and while candidates train, where they take at most so many GB; 0 for never.
        seeds: Repeat the rows of the final table so often, for mean and spread.
    """

    candidate_corpus: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    validation_share: float = 0.1
    ranking_metric: Literal["roc_auc", "task"] = "roc_auc"
    ranking_rows: Literal["drawn", "released"] = "drawn"
    min_params: int = 0
    max_params: int = 0
    params: int = 0
    max_flops: int = 0
    max_latency_ms: float = 0.0
    minimize: tuple[Literal["parameters", "flops", "latency"], ...] = ()
    weight_sharing: Literal["single-path", "sandwich"] = "single-path"
    task_temperature: float = 1.0
    agreement_candidates: int = 0
    storage: str = ""
    population: int = 0
    teacher_cache: float = 2.0
    seeds: int = 1
    teacher_model: TeacherArguments = field(default_factory=TeacherArguments)
    supernet: TrainingArguments = field(default_factory=TrainingArguments)
    stage1: SearchStage = field(default_factory=_candidate)
    stage2: SearchStage = field(default_factory=_candidate)
    stage3: SearchStage = field(default_factory=lambda: SearchStage(num_candidates=1000))
    final: FinalStage = field(default_factory=FinalStage)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "storage", absolute_storage(self.storage))
        self.at_least(seeds=1, population=0, params=0, min_params=0, max_params=0, max_flops=0, max_latency_ms=0)
        self.at_least(teacher_cache=0, agreement_candidates=0)
        self._check_limits()
        refuse_best(supernet=self.supernet)
        if len(self.start_from) > 1:
            raise ValueError(f"start_from is {self.start_from}: a search begins with one supernet")
        if self.start_from and self.other_corpus:
            raise ValueError(
                f"candidate_corpus is {self.candidate_corpus}, for a supernet of its own, and start_from names one for "
                "all stages: leave one of them out"
            )
        self._check_scored_tasks()
        if len(self.stage3.rungs) > 1:
            raise ValueError(
                f"stage3.rungs is {self.stage3.rungs}: its candidates are scored, not trained: leave it out"
            )
        if self.stage3.filter != "none":
            raise ValueError(f"stage3.filter is {self.stage3.filter}: its candidates cost a moment: leave it out")
        if self.student.intermediate_size > self.student.hidden_size:
            raise ValueError(
                f"student.intermediate_size is {self.student.intermediate_size}, above the hidden_size of "
                f"{self.student.hidden_size}: add, mul and max cut both to the narrower, which the second linear of an "
                f"expression does not take: give at most {self.student.hidden_size}"
            )
        if self.agreement_candidates > self.stage3.num_candidates:
            raise ValueError(
                f"agreement_candidates is {self.agreement_candidates}: they are stage 3's, of which there are "
                f"{self.stage3.num_candidates}: give no more than that, or more --stage3.num_candidates"
            )
        if not self.task_temperature >= 1:
            raise ValueError(f"task_temperature is {self.task_temperature}: it must be at least 1")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: it must be above 0 and below 1")

    @property
    def other_corpus(self) -> tuple[str, ...]:
        """The candidates' text where it is another than all else's; with none, one supernet serves all."""
        return () if self.candidate_corpus == self.corpus else self.candidate_corpus

    def _check_limits(self) -> None:
        """ValueError where the parameters that a candidate may have contradict each other."""
        if self.params and (self.min_params or self.max_params):
            raise ValueError("--params sets the band of parameters: leave out --min_params and --max_params")
        if self.min_params > self.max_params > 0:
            raise ValueError(
                f"--min_params {self.min_params:,} is above --max_params {self.max_params:,}: nothing is between"
            )

    def _check_scored_tasks(self) -> None:
        """ValueError where --teacher_model.finetuning_eval_steps names no task."""
        from effbert.data import glue, squad

        own = (task_key(task) for task in (self.task, *self.tasks))
        known = {*own, *map(task_key, (*glue.TASKS, *squad.VERSIONS, *BUILTIN))}
        for text in self.teacher_model.finetuning_eval_steps:
            if task_key(text.split("=")[0]) not in known:
                raise ValueError(f"teacher_model.finetuning_eval_steps {text!r}: that is no task")

    @property
    def text_epochs(self) -> int:
        """Epochs of the longest general phase, and of the teacher's own where the run makes one."""
        phases = [self.supernet, *(s.general_phase for s in (self.stage1, self.stage2, self.stage3, self.final))]
        phases += [] if self.teacher else [self.teacher_model.pretraining]
        return max(phase.num_train_epochs for phase in phases)

    def band(self, dims: Dimensions) -> tuple[int, int]:
        """(min_params, max_params), where unset the published band scaled to `params`, or else to these sizes."""
        count = self.params or count_parameters(published(self.student.num_hidden_layers), dims).total_with_projection
        low, high = (round(count * end / PUBLISHED_PARAMETERS) for end in BAND)
        if self.max_params:
            low, high = min(low, round(self.max_params * BAND[0] / BAND[1])), self.max_params
        if self.min_params:
            low, high = self.min_params, self.max_params or max(high, round(self.min_params * BAND[1] / BAND[0]))
        return low, high


def published(num_layers: int) -> Architecture:
    """The published architecture at another depth: each of its six layers repeated, or the first layers of that."""
    six = Architecture.parse(PUBLISHED)
    return Architecture(six.repeat(-(-num_layers // 6)).layers[:num_layers])


BAND = (15_000_000, 16_000_000)
PUBLISHED_PARAMETERS = 15_737_724


def as_dict(config: RunConfig) -> dict:
    """The configuration as plain JSON values, without output_dir, which does not change what is computed, and without
    the storage's password."""
    fields = dataclasses.asdict(config)
    fields.pop("output_dir")
    if "candidate_corpus" in fields:
        fields["candidate_corpus"] = config.other_corpus
    if fields.get("storage"):
        fields["storage"] = without_password(fields["storage"])
    return _plain(fields)


def absolute_storage(url: str) -> str:
    """A database's URL, of an SQLite file with its absolute path, so that it names one file wherever a worker starts;
    "" as it is. ValueError as `without_password`, and for an SQLite that keeps no file."""
    if not url.startswith("sqlite"):
        return url
    parsed = _parsed_url(url)
    file = parsed.database
    if not file or file in (":memory:", "file::memory:") or parsed.query.get("mode") == "memory":
        raise ValueError(
            f"--storage {url} keeps the study in one process's memory, where it is lost: name a file, such as "
            "sqlite:////path/study.db, or leave it out for one in --output_dir"
        )
    if file.startswith(("/", "file:")):
        return url
    return parsed.set(database=str(Path(file).resolve())).render_as_string(hide_password=False)


def without_password(url: str) -> str:
    """A database's URL as it may be shown and kept: with *** for the password. ValueError where it is no such URL."""
    parsed = _parsed_url(url)
    hidden = {name: "***" for name in parsed.query if "password" in name}
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def _parsed_url(url: str):
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url)
    except ArgumentError:
        raise ValueError(
            "--storage is not the URL of a database, such as postgresql+psycopg://user@machine/name or sqlite:////path"
        ) from None


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def demo() -> SearchConfig:
    """Five minutes on one core: a 6×96 teacher trained on the built-in text, 6×64 students."""
    small = TrainingArguments(learning_rate=1e-3, per_device_train_batch_size=32, warmup_ratio=0.05)
    task = TrainingArguments(learning_rate=4e-3, num_train_epochs=1, per_device_train_batch_size=16)
    stage = SearchStage(
        num_candidates=12,
        general_share=0.04,
        task_share=0.4,
        general_phase=small,
        task_phase=task,
        initial_samples=4,
        refit_every=2,
        cohort=4,
    )
    return SearchConfig(
        output_dir="",
        task="builtin-topic",
        max_length=64,
        corpus_tokens=100_000,
        max_train_rows=3200,
        validation_share=0.15,
        num_threads=1,
        student=StudentArguments(
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=64,
            embedding_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        teacher_model=TeacherArguments(
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=384,
            vocab_size=3000,
            dropout_prob=0.0,
            pretraining=dataclasses.replace(small, learning_rate=2e-4),
            finetuning=TrainingArguments(learning_rate=5e-4, num_train_epochs=3, per_device_train_batch_size=32),
        ),
        supernet=small,
        stage1=stage,
        stage2=dataclasses.replace(stage, num_candidates=8),
        stage3=SearchStage(
            num_candidates=20,
            general_share=0.15,
            task_share=0.6,
            general_phase=small,
            task_phase=task,
            initial_samples=8,
            refit_every=4,
        ),
        final=FinalStage(
            general_share=0.05,
            general_phase=small,
            task_phase=dataclasses.replace(task, num_train_epochs=2),
        ),
    )


def smoke() -> SearchConfig:
    """Everything the demo does, in under a minute: for CI, and for tests that kill it. Its scores mean nothing."""
    base = demo()
    fast = dataclasses.replace(base.stage1.task_phase, learning_rate=4e-3)
    stage = dataclasses.replace(
        base.stage1, num_candidates=3, task_share=0.5, task_phase=fast, initial_samples=2, cohort=2, rungs=(0.5, 1.0)
    )
    teacher = base.teacher_model
    return dataclasses.replace(
        base,
        tasks=("builtin-next",),
        agreement_candidates=2,
        max_length=32,
        corpus_tokens=20_000,
        max_train_rows=400,
        student=StudentArguments(hidden_size=32, num_attention_heads=4, intermediate_size=32, embedding_size=16),
        teacher_model=dataclasses.replace(
            teacher,
            hidden_size=32,
            intermediate_size=64,
            vocab_size=2000,
            finetuning=dataclasses.replace(teacher.finetuning, learning_rate=2e-3),
        ),
        stage1=stage,
        stage2=stage,
        stage3=dataclasses.replace(base.stage3, num_candidates=4, task_phase=fast, initial_samples=2, refit_every=1),
        final=dataclasses.replace(base.final, num_random=1, task_phase=fast),
    )


GLUE_TASKS = ("mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")


def paper() -> SearchConfig:
    """The published choices, from its paper and code: fp32, everything padded to 128, candidates one at a time and all
    at full budget, the released sampler and its proposals, ten epochs for each supernet, of which stage 3 and the final
    rows have their own, teachers and students as they are after the step that did best on the official validation rows.
    In stages 1 and 2 the first tenth of a task's rows trains and the last hundredth ranks, in stage 3 nine tenths and
    one; teachers and final rows learn from all. Give --teacher (BERT-base; the released code computes tanh's form of
    gelu in it, as one does whose config.json has "hidden_act": "gelu_new"), --corpus (Wikipedia and BooksCorpus) and
    --candidate_corpus (Wikipedia).

    What it is not: the released code to the letter. There candidates take heads over from each other, in the order in
    which they happen to be trained; a best step is that of means over batches of the split, which for accuracy is that
    of the whole; the sampler is another in what effbert.search.released names; and with a torch before 2 what a batch
    of stage 3 does not use decays and moves on by its momentum. It stops when somebody stops it; 500, 500 and 1,000
    candidates are ours.

    Batches are as many rows as those of all processes that its scripts start: 256 of text (64 in each of four), 128 in
    the stages (64 in each of two), 32 in fine-tuning (8 in each of four). Started as so many processes, give each its
    part; where memory does not suffice, fewer rows and --supernet.gradient_accumulation_steps (but not in stage 3,
    where each batch has an architecture of its own).
    """
    best = {"load_best_model_at_end": True, "eval_steps": 50}
    tuning = TrainingArguments(learning_rate=3e-5, num_train_epochs=3, per_device_train_batch_size=32, **best)
    general = TrainingArguments(learning_rate=1e-4, per_device_train_batch_size=128)
    task = TrainingArguments(learning_rate=4e-4, num_train_epochs=3, per_device_train_batch_size=128)
    stage = SearchStage(
        num_candidates=500, sampler="released", initial_samples=80, refit_every=10, general_share=0.02,
        task_share=1 / 9, ranking_share=0.1, scored_epochs="all", general_phase=general, task_phase=task,
    )  # fmt: skip
    ten = dataclasses.replace(general, num_train_epochs=10)
    pretraining = dataclasses.replace(ten, per_device_train_batch_size=256)
    return SearchConfig(
        output_dir="",
        task=GLUE_TASKS[0],
        tasks=GLUE_TASKS[1:],
        corpus=(),
        corpus_samples="released",
        max_length=128,
        pad_to_max_length=True,
        doc_stride=32,
        max_query_length=62,
        validation_share=0.1,
        ranking_metric="task",
        ranking_rows="released",
        population=1,
        student=StudentArguments(neighbour_padding="released"),
        loss=LossWeights(loss_mask="released", score_form="direct"),
        teacher_model=TeacherArguments(finetuning=tuning, finetuning_eval_steps=("qqp=250",)),
        supernet=pretraining,
        stage1=stage,
        stage2=stage,
        stage3=dataclasses.replace(
            stage,
            num_candidates=1000,
            general_share=1.0,
            task_share=1.0,
            ranking_share=1.0,
            general_phase=ten,
            task_phase=dataclasses.replace(task, num_train_epochs=10),
        ),
        final=FinalStage(
            general_phase=pretraining,
            task_phase=TrainingArguments(
                learning_rate=5e-5, num_train_epochs=10, per_device_train_batch_size=32, **best
            ),
        ),
    )


def paper_fast() -> SearchConfig:
    """The published sizes our way: bf16, no padding, one teacher pass for a cohort, halving, three epochs for each
    supernet instead of ten. Give --teacher (BERT-base) and --corpus (Wikipedia and BooksCorpus)."""
    base = paper()

    def fast(arguments: TrainingArguments, epochs: int, **changes) -> TrainingArguments:
        last = {"load_best_model_at_end": False, "eval_steps": 0}
        return dataclasses.replace(arguments, bf16=True, num_train_epochs=epochs, **last, **changes)

    rows = {"per_device_train_batch_size": 64}  # in the stages: twice the updates of the published batches
    stage = dataclasses.replace(
        _candidate(),
        num_candidates=500,
        general_share=PAPER_GENERAL_TOKENS / PAPER_CORPUS_TOKENS,
        general_phase=fast(base.stage1.general_phase, 1, **rows),
        task_phase=fast(base.stage1.task_phase, 3, **rows),
    )
    return dataclasses.replace(
        base,
        pad_to_max_length=False,
        doc_stride=0,
        max_query_length=0,
        population=0,
        validation_share=0.02,
        ranking_metric="roc_auc",
        ranking_rows="drawn",
        student=StudentArguments(),
        loss=LossWeights(),
        teacher_model=TeacherArguments(finetuning=fast(base.teacher_model.finetuning, 3)),
        supernet=fast(base.supernet, 3),
        stage1=stage,
        stage2=stage,
        stage3=dataclasses.replace(
            base.stage3,
            sampler="predictor",
            initial_samples=12,
            refit_every=2,
            cohort=27,
            general_phase=fast(base.stage3.general_phase, 3, **rows),
            task_phase=fast(base.stage3.task_phase, 3, **rows),
        ),
        final=dataclasses.replace(
            base.final, general_phase=fast(base.supernet, 10), task_phase=fast(base.final.task_phase, 10)
        ),
    )


PAPER_CORPUS_TOKENS = 1.27e9  # Wikipedia and BooksCorpus in samples of the published preparation, an epoch
PAPER_GENERAL_TOKENS = 16e6  # of a candidate's general phase

PRESETS = {"demo": demo, "smoke": smoke, "paper": paper, "paper-fast": paper_fast}
