"""How long a candidate's deployed model takes for one text on this run's device, measured once for each architecture.

Measured times go into <run>/latency.json, and a resumed run reads them back: so what a constraint on them let through
does not change with the weather of the machine.
"""

import json
import statistics
import time

import torch
from torch import nn

from effbert.architecture import Architecture
from effbert.files import read_kept, write_atomic
from effbert.model import new_student
from effbert.supernet import derive_config
from effbert.workspace import Workspace

RUNS, WARM_UP = 20, 3


def latency(model: nn.Module, vocab_size: int, length: int) -> dict[str, float]:
    """Median and quartile distance, in ms, of RUNS forward passes of one text of `length` tokens in fp32, where the
    model is."""
    device = next(model.parameters()).device
    model.eval()
    ids = torch.arange(length, device=device)[None] % vocab_size
    mask, times = torch.ones_like(ids), []

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        for run in range(RUNS + WARM_UP):
            wait()
            begun = time.perf_counter()
            model(input_ids=ids, attention_mask=mask)
            wait()
            if run >= WARM_UP:
                times.append(1e3 * (time.perf_counter() - begun))
    low, median, high = statistics.quantiles(times, n=4)
    return {"latency_ms": median, "latency_spread_ms": high - low}


class Latencies:
    """Milliseconds of the deployed model of an architecture, on the run's device at max_length."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.path = workspace, workspace.folder / "latency.json"
        device = workspace.device
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def of(self, architecture: Architecture) -> float:
        """Measured now, or read back."""
        known = read_kept(self.path, "measures anew") if self.path.exists() else {}
        here = known.setdefault(self.name, {})
        if str(architecture) not in here:
            here[str(architecture)] = self._measure(architecture)
            write_atomic(self.path, json.dumps(known, indent=1))
        return here[str(architecture)]

    def _measure(self, architecture: Architecture) -> float:
        workspace, spec = self.workspace, self.workspace.main_task.spec
        config = derive_config(workspace.student_config(fit_size=None), architecture)
        model = new_student(config, spec.kind, spec.labels).to(workspace.device)
        return latency(model, config.vocab_size, workspace.config.max_length)["latency_ms"]
