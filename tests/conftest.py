"""Fixtures shared by all tests: the recorded numbers of the published method, as models and inputs of ours."""

import dataclasses
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any kernel is

from effbert.architecture import Architecture


def quick_interpreter() -> None:
    """Triton's interpreter with its bookkeeping done once, which was more than half of its time. triton.language is
    patched once a launch, not anew by every device function that a kernel calls, and sums of integers are not computed
    again for an overflow check that only `debug` would look at. Its scalars are arrays of one element, which NumPy no
    longer takes for numbers since 2.4 and Triton 3.6 still does."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, patch, inside = interpreter.interpreter_builder, interpreter._patch_lang, []
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def patch_once(fn):
        if inside:
            return None  # a device function: nobody restores what it patches
        scope = patch(types.FunctionType(fn.__code__, {"tl": tl, "core": tl.core}))  # all that such a function may use
        restore = scope.restore
        inside.append(fn)
        scope.restore = lambda: (inside.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


FIXTURES = Path(__file__).parent / "fixtures"
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter()
torch.set_num_threads(1)  # the tensors here are tiny: a second thread costs more than it gives
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LONGEST = ("test_run.py", "test_parallel.py", "test_paper.py", "test_runs.py", "test_compile_report.py")


def pytest_collection_modifyitems(items):
    """The files that run whole searches first: each then stays with one of several processes, which makes its fixtures
    once, and what is left at the end is short. Tests that cannot run here are skipped with a reason."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none")
    no_data = pytest.mark.skip(reason=f"needs the data in {SHARED}, which is absent")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(no_data)


def tensors(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


class Parity:
    """The recorded numbers: architectures, inputs, outputs, losses, gradients. Models and inputs are on `device`."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.facts = json.loads((FIXTURES / "parity.json").read_text())
        self.outputs = tensors("parity_outputs.npz")
        self.gradients = tensors("parity_grads.npz")
        self.student_state = tensors("parity_student.npz")
        self.teacher_state = tensors("parity_teacher.npz")
        self.architectures = {
            name: Architecture.parse(", ".join(expressions)) for name, expressions in self.facts["archs"].items()
        }

    @property
    def inputs(self):
        names = ("token_ids", "attention_mask", "segment_ids")
        return tuple(self.outputs[f"input/{name}"].to(self.device) for name in names)

    def student_config(self, **changes):
        from effbert.model import EffBertConfig

        return EffBertConfig(
            **{
                "architecture": str(Architecture.uniform("4_1", 3)),
                "vocab_size": 200,
                "embedding_size": 16,
                "hidden_size": 60,
                "intermediate_size": 60,
                "max_position_embeddings": 64,
                "fit_size": 96,
                "neighbour_padding": "released",
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                **changes,
            }
        )

    def supernet(self, task="mnli", **changes):
        """The recorded student weights as a supernet with one head: mnli, sts-b, squad1.1 or squad2.0."""
        from effbert.data.tasks import TaskSpec
        from effbert.released import student_state
        from effbert.supernet import Supernet, head_key

        labels = ("a", "b", "c") if task == "mnli" else ()
        kind = {"mnli": "classification", "sts-b": "regression"}.get(task, "spans")
        model = Supernet(self.student_config(**changes), [TaskSpec(task, kind, labels, ("accuracy",), True)])
        state = student_state({**self.student_state, **self._heads("student", task)})
        head = f"heads.{head_key(task)}"
        state = {name.replace("classifier", head): tensor for name, tensor in state.items()}
        model.load_state_dict(state)
        return model.to(self.device).eval()

    def teacher(self, task="mnli"):
        from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

        from effbert.released import teacher_state
        from effbert.teacher import Teacher

        config = BertConfig(
            vocab_size=200,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=144,
            max_position_embeddings=64,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
            num_labels={"mnli": 3, "sts-b": 1}.get(task, 2),
        )
        spans = task.startswith("squad")
        model = (BertForQuestionAnswering if spans else BertForSequenceClassification)(config)
        state = teacher_state({**self.teacher_state, **self._heads("teacher", task)})
        if spans:
            state = {name.replace("classifier", "qa_outputs"): t for name, t in state.items() if "pooler" not in name}
        model.load_state_dict(state)
        return Teacher(model.to(self.device))

    def _heads(self, role, task):
        start = f"heads/{role}|{task}|"
        return {name.removeprefix(start): tensor for name, tensor in self.outputs.items() if name.startswith(start)}


@pytest.fixture(scope="session")
def parity():
    return Parity()


@pytest.fixture(scope="session")
def shared_data():
    return SHARED


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Sum, Euclidean norm and product with cos(0), cos(1), ... of a tensor, in float64."""
    flat = tensor.detach().double().cpu().flatten()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return torch.stack((flat.sum(), flat.norm(), flat @ weights))


@pytest.fixture(scope="session")
def same_digest():
    def check(tensor, recorded, tolerance=1e-5):
        """Equal digests up to `tolerance` relative to what rounding every element can move them by."""
        mine = digest(tensor)
        allowed = tolerance * (1 + recorded[1] + tensor.abs().sum().double().cpu())
        assert ((mine - recorded).abs() <= allowed).all(), (mine, recorded)

    return check
