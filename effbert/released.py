"""The authors' checkpoints: their parameter names in ours (students) and in transformers' (BERT teachers), and a
released student or supernet as a standalone model.

Every size is read from the tensors; only the number of attention heads cannot be. A released student holds four MLPs a
layer at full width, as the supernet does: an architecture uses slices of them, and those are what is kept.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from effbert.architecture import Architecture
from effbert.data.tasks import TaskSpec, plain_name
from effbert.data.tokenizer import save_tokenizer
from effbert.errors import first_line, first_of
from effbert.files import atomic_dir
from effbert.kernels.expression import Structure
from effbert.model import (
    EffBertConfig,
    EffBertForQuestionAnswering,
    EffBertModel,
    EffBertPreTrainedModel,
    new_student,
    num_outputs,
    refuse_not_finite,
)
from effbert.models import architecture_of, dimensions, is_name
from effbert.supernet import FULL_STRUCTURE, Supernet, derive_config, head_key, used_slices

STUDENT_NAMES = (  # theirs and ours, as whole parts of a name
    ("encoder", "layers"),
    ("all_ffn", "mlps"),
    ("segment_embeddings", "token_type_embeddings"),
    ("layernorm", "norm"),
    ("cls_pooler.dense", "pooler"),
)
TEACHER_NAMES = (
    (r"^embeddings\.token_embeddings\b", "embeddings.word_embeddings"),
    (r"\bsegment_embeddings\b", "token_type_embeddings"),
    (r"^encoder\.(\d+)\.", r"encoder.layer.\1."),
    (r"\battention\.(query|key|value)\b", r"attention.self.\1"),
    (r"\battention\.(dense|layernorm)\b", r"attention.output.\1"),
    (r"\bffn\.dense1\b", "intermediate.dense"),
    (r"\bffn\.(dense2|layernorm)\b", r"output.\1"),
    (r"\bdense2\b", "dense"),
    (r"\blayernorm\b", "LayerNorm"),
    (r"^cls_pooler\b", "pooler"),
)
Value = TypeVar("Value")  # what a state holds under its names: tensors, or names again


def student_state(
    state: Mapping[str, Value], prefix: str = "effbert.", head_name: str = "classifier"
) -> dict[str, Value]:
    """A released student or supernet state under the names of `effbert.model`, one head (classifier) under `head_name`;
    several (classifiers) keep theirs."""
    rules = [(rf"\b{re.escape(theirs)}\b", ours) for theirs, ours in STUDENT_NAMES]
    named = {_renamed(name, rules, prefix): value for name, value in state.items()}
    return {re.sub(r"^classifier\b", head_name, name): value for name, value in named.items()}


def authors_name(name: str, heads: Mapping[str, str] = MappingProxyType({})) -> str:
    """The name that a student's weight of ours has in the authors' checkpoints, as `student_state` backwards; heads:
    how the names of heads begin here, and there."""
    for ours, theirs in heads.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    name = name.removeprefix("effbert.")
    for theirs, ours in STUDENT_NAMES:
        name = re.sub(rf"\b{ours}\b", theirs, name)
    return name


def teacher_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A released BERT state under the names of transformers' BertForSequenceClassification."""
    return {_renamed(name, TEACHER_NAMES, "bert."): tensor for name, tensor in state.items()}


def _renamed(name: str, rules, prefix: str) -> str:
    if name.startswith("classifier"):
        return name
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return prefix + name


LEARNT_LENGTH = 128  # tokens of the longest texts that the released models learnt with
LEARNT_WINDOWS = {"doc_stride": 32, "max_query_length": 62}  # of SQuAD's contexts, as effbert.data.squad means them
SUPERNET = "supernet"  # in place of an architecture
MULTI_TASK = ("mnli", "qqp", "qnli", "sst-2", "cola", "sts-b", "mrpc", "rte")  # the order of their `classifiers`
LABELS = {"mnli": ("contradiction", "entailment", "neutral")}  # where their order is not that of `effbert.data.glue`
MLP = re.compile(r"encoder\.(\d+)\.all_ffn\.(\d+)\.")


def import_checkpoint(
    path: str | Path, architecture: Architecture | str, num_attention_heads: int = 12, task: str | None = None
) -> EffBertPreTrainedModel:
    """A released student or supernet as a model of ours that runs `architecture`, in eval mode, with the head it has;
    for the architecture "supernet" one with all weights and heads, which students and searches begin with.

    path: their file, read without running code. architecture: also as text, or by the name of a model, whose sizes the
    checkpoint must have. task: of GLUE or SQuAD, whose labels the head has; of several heads the one to keep. The
    training-only projection stays. Masked neighbours are embedded as in the released code; a table without neighbours
    (their 768-wide model) has its padding operations. ValueError, in one line, for missing or surplus weights, sizes
    that do not go together, a head that is not the task's.
    """
    name = str(architecture)
    state = read_state(path)
    if name == SUPERNET:
        return import_supernet(state, num_attention_heads, task, path).eval()
    architecture = architecture_of(name)
    stacks = stacks_of(state, architecture, path)
    config = config_of(state, architecture, num_attention_heads, path)
    refuse_other_sizes(config, name, path)
    names = with_one_head({name: name for name in state}, task, path)
    pooled, head = "cls_pooler.dense.weight" in names, names.get("classifier.weight")
    if head is not None:
        kind, labels = head_of(_size(state, head, 0, path), pooled, task, path)
        build, prefix = partial(new_student, kind=kind, labels=labels), "effbert."
    elif task is not None:
        raise ValueError(f"checkpoint {path}: it has no head, and none for task {task}: leave out --task")
    else:
        build, prefix = partial(EffBertModel, add_pooling_layer=pooled), ""
    model = build(config)
    if isinstance(model, EffBertForQuestionAnswering):
        for setting, value in LEARNT_WINDOWS.items():
            setattr(model.config, setting, value)
    head_name = getattr(model, "head_name", "")
    with torch.device("meta"):
        whole = build(derive_config(config, whole_architecture(stacks)))
    heads = {f"{head_name}.": head.removesuffix("weight")} if head else {}
    found = fitting_weights(whole, state, student_state(names, prefix, head_name), heads, path)
    model.load_state_dict(used_slices(found, architecture, config.intermediate_size, prefix))
    return model.eval()


def whole_architecture(stacks: Sequence[int]) -> Architecture:
    """The architecture that uses all weights of a checkpoint with so many MLPs in each layer; no layer has more than
    the supernet's."""
    most = Structure.parse(FULL_STRUCTURE).stacks
    return Architecture(sum((Architecture.uniform(Structure(min(count, most), 1), 1).layers for count in stacks), ()))


def import_supernet(
    state: Mapping[str, torch.Tensor], num_attention_heads: int, task: str | None, path: str | Path
) -> Supernet:
    """A released supernet whole: of several tasks with all their heads, after general distillation with none, and then
    with a fresh pooler where it lacks one."""
    if task is not None:
        raise ValueError(f"checkpoint {path}: a supernet keeps all its heads: leave out --task")
    if any(name.startswith("classifier.") for name in state):
        raise ValueError(f"checkpoint {path}: it has the head of one task: it is a student, so give its architecture")
    layers = 1 + max((int(found[1]) for found in map(MLP.match, state) if found), default=0)
    whole = Architecture.uniform(FULL_STRUCTURE, layers)
    stacks_of(state, whole, path)
    config = config_of(state, whole, num_attention_heads, path)
    heads = any(name.startswith("classifiers.") for name in state)
    specs = [_spec_of(name) for name in MULTI_TASK] if heads else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what the checkpoint lacks
        supernet = Supernet(config, specs)
    ours = {f"classifiers.{number}.": f"heads.{head_key(spec.name)}." for number, spec in enumerate(specs)}
    own = partial(re.sub, r"^classifiers\.\d+\.", lambda found: ours.get(found[0], found[0]))
    names = {own(name): theirs for name, theirs in student_state({name: name for name in state}).items()}
    if not heads:
        fresh = {name: tensor for name, tensor in supernet.state_dict().items() if ".pooler." in name}
        state = {authors_name(name): tensor for name, tensor in fresh.items()} | dict(state)
        names = {name: authors_name(name) for name in fresh} | names
    supernet.load_state_dict(fitting_weights(supernet, state, names, {b: a for a, b in ours.items()}, path))
    return supernet


def _spec_of(task: str) -> TaskSpec:
    """A task as the released models know it."""
    from effbert.data import glue

    spec = glue.TASKS[plain_name(task)].spec
    return replace(spec, labels=LABELS.get(plain_name(task), spec.labels))


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under its own names, without "module." and without a language-model head."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        with torch.serialization.safe_globals([(_Unread, name) for name in UNREAD]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and end-of-file errors share no better class
        raise ValueError(f"checkpoint {path}: {why_not(error)}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f'checkpoint {path}: holds no weights: a state dict, or {{"state_dict": ...}}, belongs there')
    found = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in found.items() if not name.startswith("lm_head.")}


UNREAD = (  # what their files hold beside tensors, scores and arguments, by the names in pickles of NumPy 1 and 2
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
)


class _Unread:
    """Stands for what no weight is made of: it takes whatever its pickle says, keeps nothing and runs nothing."""

    def __new__(cls, *state, **more):
        return super().__new__(cls)

    def __init__(self, *state, **more):
        pass

    def __setstate__(self, state):
        pass


def why_not(error: Exception) -> str:
    """Why torch.load read no tensors, without its advice to run what a file holds."""
    refused = re.search(r"\bGLOBAL (\S+)", str(error))
    if refused:
        return f"holds {refused[1]}, which is not read since it could run code: save its state dict alone"
    reason = "" if "weights_only" in str(error) else f": {first_line(error)}"
    return f"no file of tensors that torch.load reads{reason}"


def stacks_of(state: Mapping[str, torch.Tensor], architecture: Architecture, path: str | Path) -> list[int]:
    """How many MLPs a checkpoint has in each layer. ValueError where it has other layers than `architecture`, or too
    few MLPs in one."""
    stacks: dict[int, int] = {}
    for layer, stack in (map(int, found.groups()) for found in map(MLP.match, state) if found):
        stacks[layer] = max(stacks.get(layer, 0), stack + 1)
    if sorted(stacks) != list(range(len(architecture.layers))):
        raise ValueError(f"checkpoint {path}: {len(stacks)} layers, the architecture has {len(architecture.layers)}")
    for layer, structure in enumerate(architecture.structures):
        if structure.stacks > stacks[layer]:
            raise ValueError(
                f"checkpoint {path}: {stacks[layer]} MLPs in layer {layer + 1}, the architecture stacks "
                f"{structure.stacks} there"
            )
    return [stacks[layer] for layer in sorted(stacks)]


def _size(state: Mapping[str, torch.Tensor], name: str, dimension: int, path: str | Path) -> int:
    if name not in state or state[name].dim() <= dimension:
        raise ValueError(f"checkpoint {path}: it lacks {name}: is it a student or supernet of EfficientBERT?")
    return state[name].shape[dimension]


def config_of(
    state: Mapping[str, torch.Tensor], architecture: Architecture, num_attention_heads: int, path: str | Path
) -> EffBertConfig:
    """The sizes of a checkpoint, for `architecture`. ValueError where it lacks what they are read from."""
    size = partial(_size, state, path=path)
    neighbours = "embeddings.dense.weight" in state
    return EffBertConfig(
        architecture=str(architecture),
        vocab_size=size("embeddings.token_embeddings.weight", dimension=0),
        embedding_size=size("embeddings.token_embeddings.weight", dimension=1) if neighbours else None,
        hidden_size=size("embeddings.position_embeddings.weight", dimension=1),
        num_attention_heads=num_attention_heads,
        intermediate_size=size("encoder.0.all_ffn.0.dense1.weight", dimension=0),
        max_position_embeddings=size("embeddings.position_embeddings.weight", dimension=0),
        type_vocab_size=size("embeddings.segment_embeddings.weight", dimension=0),
        fit_size=size("fit_dense.weight", dimension=0) if "fit_dense.weight" in state else None,
        neighbour_padding="released",
        combine="truncate" if neighbours else "pad_released",
    )


def refuse_other_sizes(config: EffBertConfig, name: str, path: str | Path) -> None:
    """ValueError where a checkpoint has other sizes than the model that `name` names; no name asks for none."""
    if not is_name(name):
        return
    named = dimensions(name)
    other = [
        f"{size} {getattr(config, size)}, {name} has {getattr(named, size)}"
        for size in ("hidden_size", "intermediate_size", "embedding_size")
        if getattr(config, size) != getattr(named, size)
    ]
    if other:
        raise ValueError(f"checkpoint {path}: {'; '.join(other)}: name the model that it is, or spell its layers out")


def with_one_head(state: Mapping[str, Value], task: str | None, path: str | Path) -> dict[str, Value]:
    """A state with the head of `task` alone, under the name that a model with one head has."""
    if not any(name.startswith("classifiers.") for name in state):
        return dict(state)
    names = [plain_name(name) for name in MULTI_TASK]
    if plain_name(task or "") not in names:
        given = f"{task!r} is none of them" if task else "none is named"
        raise ValueError(f"checkpoint {path}: its heads are of {', '.join(MULTI_TASK)}, and {given}: give --task")
    own = f"classifiers.{names.index(plain_name(task))}."
    return {
        name.replace(own, "classifier."): value
        for name, value in state.items()
        if name.startswith(own) or not name.startswith("classifiers.")
    }


def head_of(width: int, pooled: bool, task: str | None, path: str | Path) -> tuple[str, tuple[str, ...]]:
    """Kind and label names of a released head with `width` outputs, as `effbert.model.new_student` takes them."""
    kind = "spans" if not pooled else "regression" if width == 1 else "classification"
    if task is None:
        return kind, tuple(f"LABEL_{index}" for index in range(width)) if kind == "classification" else ()
    wanted, labels = kind_of(task)
    if (wanted, num_outputs(wanted, labels)) != (kind, width):
        raise ValueError(
            f"checkpoint {path}: a head for {kind} with {width} outputs, task {task} needs {wanted} with "
            f"{num_outputs(wanted, labels)}"
        )
    return kind, LABELS.get(plain_name(task), labels)


def kind_of(task: str) -> tuple[str, tuple[str, ...]]:
    """Kind and labels of a task of GLUE or SQuAD, by name."""
    from effbert.data import glue, squad

    name = plain_name(task)
    if name in squad.VERSIONS:
        return "spans", ()
    if name not in glue.TASKS:
        known = ", ".join([source.spec.name for source in glue.TASKS.values()] + list(squad.NAMES))
        raise ValueError(f"--task {task}: the released heads are of {known}")
    return glue.TASKS[name].spec.kind, glue.TASKS[name].spec.labels


def fitting_weights(
    model: EffBertPreTrainedModel,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    heads: Mapping[str, str],
    path: str | Path,
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under our names, of which `names` tells theirs.

    heads: as `authors_name` takes them. ValueError that lists, under the authors' names, which weights of a model are
    missing, surplus, of another size, or not finite.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(state[theirs].shape) for name, theirs in names.items()}
    other = [name for name in found if name in wanted and found[name] != wanted[name]]
    problems = {
        "missing": (f"{authors_name(name, heads)} {wanted[name]}" for name in wanted if name not in found),
        "surplus": (f"{names[name]} {found[name]}" for name in found if name not in wanted),
        "of another size": (f"{names[name]} is {found[name]}, not {wanted[name]}" for name in other),
    }
    said = [f"{what}: {listed}" for what, weights in problems.items() if (listed := first_of(weights))]
    if said:
        raise ValueError(f"checkpoint {path}: weights {'; '.join(said)}")
    refuse_not_finite({theirs: state[theirs] for theirs in names.values()}, f"checkpoint {path}")
    return {name: state[theirs] for name, theirs in names.items()}


def save_imported(model: EffBertPreTrainedModel, output_dir: str | Path, vocab: str | Path | None = None) -> None:
    """A transformers folder of an imported model; vocab: a BERT vocabulary, a token a line, for its tokenizer (lower
    case, as all released checkpoints). ValueError where the folder exists or the vocabulary is of another size."""
    folder = Path(output_dir)
    if folder.exists():
        raise ValueError(f"--output_dir {folder} exists: give a folder that does not")
    tokenizer = None if vocab is None else read_vocab(vocab, model.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)


def read_vocab(vocab: str | Path, config: EffBertConfig):
    """The lower-casing WordPiece tokenizer of a vocabulary file."""
    from transformers import BertTokenizer

    if not Path(vocab).is_file():
        raise FileNotFoundError(f"--vocab {vocab}: no such file")
    try:
        tokens = Path(vocab).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--vocab {vocab}: not UTF-8 text: {error}") from None
    if len(tokens) != config.vocab_size:
        raise ValueError(f"--vocab {vocab}: {len(tokens)} tokens, the checkpoint has {config.vocab_size}")
    known = {token: index for index, token in enumerate(tokens)}
    if len(known) != len(tokens):
        raise ValueError(f"--vocab {vocab}: {len(tokens) - len(known)} of its {len(tokens)} tokens are there twice")
    longest = min(LEARNT_LENGTH, config.max_position_embeddings)
    return BertTokenizer(vocab=known, do_lower_case=True, model_max_length=longest)
