"""AdamW groups, gradient clipping and the learning-rate curve, as in the published method.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

PartlyUsed = Mapping[nn.Parameter, tuple[int, int]]  # of which dimension how many entries, the first ones, were used


@dataclass(frozen=True)
class TrainingArguments:
    """One training phase; names as in transformers.

    num_train_epochs: passes over the phase's data. warmup_ratio: share of all steps with a rising learning rate.
    bf16: autocast (weights stay fp32). A step is gradient_accumulation_steps batches, and where several processes train
    one model a batch has per_device_train_batch_size rows for each. load_best_model_at_end: end with the weights of the
    step that had the best score on the official validation rows, which are scored after every eval_steps steps of an
    epoch, and at its end; a score on those rows is then that of what was chosen by them.
    """

    learning_rate: float = 1e-4
    num_train_epochs: int = 1
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.1
    lr_scheduler_type: Literal["linear", "cosine"] = "linear"
    bf16: bool = False
    load_best_model_at_end: bool = False
    eval_steps: int = 0

    def __post_init__(self):
        at_least = {
            "num_train_epochs": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "eval_steps": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.learning_rate < 0 or not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"learning_rate {self.learning_rate} must not be negative and warmup_ratio {self.warmup_ratio} in 0..1"
            )
        if self.eval_steps and not self.load_best_model_at_end:
            raise ValueError(
                f"eval_steps is {self.eval_steps}, and nothing is chosen by it: give load_best_model_at_end too"
            )


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, kind: str = "linear") -> float:
    """Multiplier of the learning rate for update `step`, from 0: linear warm-up, then linear or half-cosine decay.

    With warm-up the first update has rate 0, as published.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, 1 - progress)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW groups: biases and LayerNorm weights without weight decay, everything else with it."""
    decayed, exempt = [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        parts = name.lower().split(".")
        is_norm = len(parts) > 1 and parts[-2] in ("norm", "layernorm", "layer_norm")
        (exempt if parts[-1] == "bias" or is_norm else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


class Optimizer:
    """AdamW with clipping; `step` applies the accumulated gradients at the rate of the given update number.

    What a sampled architecture did not use is neither updated nor decayed, and its moments stay: whole parameters that
    have no gradient, and the rest of those that `step` is told were used in part.
    """

    def __init__(self, model: nn.Module, arguments: TrainingArguments, total_steps: int):
        self.arguments = arguments
        self.total_steps = total_steps
        self.warmup_steps = int(total_steps * arguments.warmup_ratio)
        groups = parameter_groups(model.named_parameters(), arguments.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=True)
        self.rate: torch.Tensor | None = None

    def step(self, number: int, partly_used: PartlyUsed | None = None) -> torch.Tensor:
        """Clip, update, clear the gradients; returns the gradient norm before clipping, a 0-d tensor."""
        self.set_rate(number)
        return self.apply(partly_used)

    def set_rate(self, number: int) -> None:
        """The learning rate of the given update: a number, or where the update is recorded, in the tensor it reads."""
        factor = learning_rate_factor(number, self.total_steps, self.warmup_steps, self.arguments.lr_scheduler_type)
        rate = self.arguments.learning_rate * factor
        if self.rate is not None:
            rate = self.rate.fill_(rate)
        for group in self.adamw.param_groups:
            group["lr"] = rate

    def apply(self, partly_used: PartlyUsed | None = None) -> torch.Tensor:
        """`step` at the rate that is set."""
        if self.rate is not None and self.rate.is_cuda:
            for group in self.adamw.param_groups:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm)
        self._make_moments()
        before = [(part, part.clone()) for part in self._unused(partly_used or {})]
        self.adamw.step()
        for part, value in before:
            part.copy_(value)
        self.adamw.zero_grad(set_to_none=self.rate is None)
        return norm

    def keep_in_place(self, device: torch.device | None) -> None:
        """From now on updates may be recorded on `device`: gradients are zeroed, not dropped, and the learning rate is
        a tensor. None: no longer."""
        self.rate = None if device is None else torch.zeros((), device=device)
        self.adamw.zero_grad(set_to_none=True)

    def _make_moments(self) -> None:
        """AdamW's state of every parameter that has a gradient, before anything is updated: where memory does not
        suffice for one, the step can be tried again."""
        for parameter in self.parameters:
            if parameter.grad is not None and not self.adamw.state.get(parameter):
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.adamw.state[parameter] = {"step": step, **moments}

    def _unused(self, partly_used: PartlyUsed) -> Iterator[torch.Tensor]:
        """Views of the unused parts of parameters and of their moments."""
        for parameter, (dimension, width) in partly_used.items():
            state = self.adamw.state.get(parameter, {})
            for tensor in (parameter.detach(), *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)):
                yield tensor.narrow(dimension, width, tensor.shape[dimension] - width)
