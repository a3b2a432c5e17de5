"""One distillation step at the published shapes, eager against torch.compile, side by side in one run, with what the
device reaches beside them. Writes one JSON file: device, versions, dtype, shapes, and median and spread of each case.

    python -m effbert.bench.step --output step.json            the published sizes, bf16 autocast
    python -m effbert.bench.step --output step.json --small    sizes for a laptop's CPU
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from effbert.distill import LossWeights, distillation_losses
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


def main(arguments: list[str] | None = None) -> None:
    """Measure and write; what cannot be measured here is recorded with its reason."""
    parser = argparse.ArgumentParser(prog="python -m effbert.bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(measure_all(SMALL if options.small else Shapes()), indent=1))
    print(options.output.read_text())


def measure_all(shapes: Shapes) -> dict:
    """All cases on the GPU where there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    step = Step(shapes, device)
    cases: dict[str, dict] = {}
    for variant, wrap in (("eager", lambda fn: fn), ("compile", torch.compile)):
        for part in ("teacher_forward", "student_step", "whole_step"):
            try:
                cases[f"{part} {variant}"] = timed(wrap(getattr(step, part)), shapes.repeats, device)
            except Exception as error:
                cases[f"{part} {variant}"] = {"not measured": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "dtype": "bf16 autocast, fp32 weights",
        "shapes": asdict(shapes),
        "ceilings": ceilings(device, 8192 if device.type == "cuda" else 384),
        "cases": cases,
        "ratios": ratios(cases),
    }


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
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, fused=True)
        with self.autocast():
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
        with self.autocast():
            trace = self.student.trace(self.input_ids, self.mask)
            losses = distillation_losses(trace, target, self.student.fit_dense, self.mask, LossWeights())
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def timed(function: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a call after three unmeasured ones: median, and first and third quartile."""
    times = []
    for run in range(repeats + 3):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        if run >= 3:
            times.append(1e3 * (time.perf_counter() - begun))
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartile_1_ms": low, "quartile_3_ms": high}


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it runs on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """What the device reaches here: TFLOP/s of a square bf16 and fp32 product, GB/s of a copy (read and write)."""
    reached = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = timed(lambda a=a, b=b: a @ b, 10, device)["median_ms"]
        reached[f"matmul {dtype} TFLOP/s".replace("torch.", "")] = 2 * size**3 / best / 1e9
    x = torch.empty(size * size, device=device)
    y = torch.empty_like(x)
    reached["copy GB/s"] = 2 * x.nbytes / timed(lambda: y.copy_(x), 10, device)["median_ms"] / 1e6
    return reached


def ratios(cases: dict[str, dict]) -> dict[str, float]:
    """Eager time over compiled time, part by part, where both were measured."""
    parts = {name.split()[0] for name in cases}
    medians = {name: case["median_ms"] for name, case in cases.items() if "median_ms" in case}
    return {
        part: medians[f"{part} eager"] / medians[f"{part} compile"]
        for part in sorted(parts)
        if f"{part} eager" in medians and f"{part} compile" in medians
    }


if __name__ == "__main__":
    main()
