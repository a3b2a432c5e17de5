"""One distillation step at the published shapes: fused kernels against eager PyTorch and torch.compile, side by side.

Writes one JSON file: device, versions, dtype, shapes, what the device reaches, and median and spread of each case. The
rivals are what people run (effbert.bench.rivals): PyTorch's own dropout and attention. "+graph" is the same student
step captured as a CUDA graph. Dropout's key is a tensor, as in training on a GPU, that stays as it is.

    python -m effbert.bench.step --output step.json            the published sizes, bf16 autocast
    python -m effbert.bench.step --output step.json --small    sizes for a laptop's CPU
    python -m effbert.bench.step --warm-up                     compile the fused kernels, measure nothing
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from effbert import random
from effbert.bench.measure import captured, ceilings, described, device_to_measure, machine, output_file, wall_time
from effbert.distill import LossWeights, distillation_losses, score_targets
from effbert.files import write_atomic
from effbert.flags import Parser, run_alone
from effbert.kernels import dispatch, gradients_in_place, use_backend
from effbert.model import EffBertConfig, EffBertModel
from effbert.teacher import Teacher


@dataclass(frozen=True)
class Shapes:
    """Sizes of one step: batch_size sequences of `length` tokens; student and teacher as in transformers."""

    batch_size: int = 64
    length: int = 128
    vocab_size: int = 30522
    hidden_size: int = 540
    num_attention_heads: int = 12
    teacher_hidden_size: int = 768
    teacher_layers: int = 12
    repeats: int = 30


SMALL = Shapes(4, 32, 500, 48, 4, 64, 6, 3)

dispatch.BACKENDS["rivals"] = "effbert.bench.rivals"
PARTS = ("teacher_forward", "student_step", "whole_step")
# variant -> backend of the student's ops, what is done with the function, the parts it makes sense for
VARIANTS = {
    "eager": ("rivals", lambda function: function, PARTS),
    "triton": ("triton", lambda function: function, PARTS[1:]),
    "eager+graph": ("rivals", captured, ("student_step",)),
    "triton+graph": ("triton", captured, ("student_step",)),
    "compile": ("rivals", lambda function: torch.compile(function), PARTS),  # last: it may take all the time there is
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and write; what cannot be measured here is recorded with its reason."""
    parser = Parser(prog="effbert bench step", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="sizes for a try")
    parser.add_argument("--warm-up", action="store_true", help="compile the fused kernels and measure nothing")
    options = parser.parse_args(arguments)
    if bool(options.output) == options.warm_up:
        parser.error("one of --output FILE and --warm-up is needed")
    shapes = SMALL if options.small else Shapes()
    if options.warm_up:
        step = Step(shapes, device_to_measure())
        with running(step, "triton"):
            step.student_step()
        return
    output_file(options.output)
    for record in measure_all(shapes):
        write_atomic(options.output, json.dumps(record, indent=1))
    print(options.output.read_text())


def measure_all(shapes: Shapes) -> Iterator[dict]:
    """The record after each case, the last one of all; on the GPU where there is one, else on the CPU."""
    device = device_to_measure()
    step = Step(shapes, device)
    cases: dict[str, dict] = {}
    record = {
        **machine(device),
        "dtype": "bf16 autocast, fp32 weights",
        "shapes": asdict(shapes),
        "ceilings": described(ceilings(device, 8192 if device.type == "cuda" else 384)),
        "cases": cases,
    }
    for variant, (backend, wrap, parts) in VARIANTS.items():
        for part in parts:
            cases[f"{part} {variant}"] = measured(step, part, backend, wrap, shapes.repeats)
            yield record | {"ratios": ratios(cases)}


@contextlib.contextmanager
def running(step: "Step", backend: str) -> Iterator[None]:
    """Inside, the step's student runs as in training, its ops by `backend`."""
    with use_backend(backend), gradients_in_place(), random.dropout_key_in(step.key):
        yield


def measured(step: "Step", part: str, backend: str, wrap, repeats: int) -> dict:
    """Spread of one case, or the reason why there is none."""
    try:
        if step.device.type == "cpu" and (backend == "triton" or wrap is captured):
            raise RuntimeError("no GPU")
        with running(step, backend):
            return asdict(wall_time(wrap(getattr(step, part)), repeats, step.device))
    except Exception as error:
        return {"not measured": f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"}


class Step:
    """A student and a teacher with fresh weights, and the parts of a step on one batch."""

    def __init__(self, shapes: Shapes, device: torch.device):
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        heads, width = shapes.num_attention_heads, shapes.teacher_hidden_size
        positions = max(512, shapes.length)
        common = {"vocab_size": shapes.vocab_size, "num_attention_heads": heads, "max_position_embeddings": positions}
        teacher = BertConfig(
            **common,
            hidden_size=width,
            num_hidden_layers=shapes.teacher_layers,
            intermediate_size=4 * width,
            attn_implementation="sdpa",
        )
        self.teacher = Teacher(BertModel(teacher)).to(device)
        student = EffBertConfig(
            **common, hidden_size=shapes.hidden_size, intermediate_size=shapes.hidden_size, fit_size=width
        )
        self.student = EffBertModel(student, add_pooling_layer=False).to(device).train()
        self.device = device
        self.input_ids = torch.randint(5, shapes.vocab_size, (shapes.batch_size, shapes.length), device=device)
        self.mask = torch.ones_like(self.input_ids)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda"
        )
        self.key = torch.zeros((), dtype=torch.int64, device=device)
        with self.autocast(), torch.no_grad():
            self.target = self.teacher.trace(self.input_ids, self.mask)

    def autocast(self):
        """bf16 for the matrix products, as in training."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def teacher_forward(self):
        """The teacher's trace of the batch."""
        with self.autocast():
            return self.teacher.trace(self.input_ids, self.mask)

    def student_step(self):
        """Forward, losses, backward and update of the student against a target that is at hand."""
        self._update(self.target)

    def whole_step(self):
        """Teacher and student."""
        self._update(self.teacher_forward())

    def _update(self, target):
        weights = LossWeights()
        with self.autocast():
            targets = score_targets(target, len(self.student.layers), weights)
            trace = self.student.trace(self.input_ids, self.mask, targets=targets)
            losses = distillation_losses(trace, target, self.student.fit_dense, self.mask, weights)
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ratios(cases: dict[str, dict]) -> dict[str, float]:
    """Eager time over each other variant's, part by part, where both were measured."""
    medians = {name: case["median_ms"] for name, case in cases.items() if "median_ms" in case}
    return {
        name: medians[f"{name.split()[0]} eager"] / median
        for name, median in medians.items()
        if f"{name.split()[0]} eager" in medians and not name.endswith(" eager")
    }


if __name__ == "__main__":
    run_alone(main, "bench.step")
