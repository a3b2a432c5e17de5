"""The supernet: one set of full-width weights of which every candidate is slices, with a head for each task.

Three verbs: run a candidate on the shared weights (`trace`), count what it uses (`effbert.architecture`), and extract
it as a standalone model that holds only the used slices and gives the same outputs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from effbert.architecture import Architecture
from effbert.data.tasks import TaskSpec
from effbert.model import (
    EffBertConfig,
    EffBertModel,
    EffBertPreTrainedModel,
    new_student,
    num_outputs,
)
from effbert.trace import ScoreTargets, Trace

FULL_STRUCTURE = "4_1"


def supernet_config(config: EffBertConfig, num_layers: int) -> EffBertConfig:
    """`config` with the architecture that uses every weight: four full-width MLPs with gelu in each layer."""
    return derive_config(config, Architecture.uniform(FULL_STRUCTURE, num_layers))


def derive_config(config: EffBertConfig, architecture: Architecture, **changes) -> EffBertConfig:
    """A copy of `config` for another architecture, with `changes` to its fields."""
    fields = config.to_dict()
    for name in ("architectures", "num_hidden_layers", "transformers_version", "model_type", "supernet_tasks"):
        fields.pop(name, None)
    return EffBertConfig(**{**fields, "architecture": str(architecture), **changes})


def used_slices(state: dict[str, torch.Tensor], architecture: Architecture, intermediate_size: int, prefix: str = ""):
    """The part of an encoder's state dict that `architecture` uses, cut to its inner widths (views, not copies)."""
    used = {}
    for name, tensor in state.items():
        parts = name.removeprefix(prefix).split(".")
        if parts[0] != "layers" or parts[2] != "mlps":
            used[name] = tensor
            continue
        structure = architecture.layers[int(parts[1])].structure
        if int(parts[3]) >= structure.stacks:
            continue
        width = structure.inner_width(intermediate_size)
        if parts[4] == "dense1":
            tensor = tensor[:width]
        elif parts[4:] == ["dense2", "weight"]:
            tensor = tensor[:, :width]
        used[name] = tensor
    return used


class Supernet(EffBertPreTrainedModel):
    """An encoder with full weights and one head for each task.

    Classification and regression tasks share the pooler, as the published multi-task model does; a spans task reads
    the last layer directly. `tasks` is the task list; it is kept in the config as (name, kind, labels) so that a saved
    supernet loads by itself.
    """

    def __init__(self, config: EffBertConfig, tasks: Sequence[TaskSpec] = ()):
        if tasks:
            config.supernet_tasks = [[task.name, task.kind, list(task.labels)] for task in tasks]
        super().__init__(config)
        self.effbert = EffBertModel(config, add_pooling_layer=True)
        self.kinds = {name: kind for name, kind, _ in getattr(config, "supernet_tasks", [])}
        self.labels = {name: labels for name, _, labels in getattr(config, "supernet_tasks", [])}
        self.heads = nn.ModuleDict(
            {
                head_key(name): nn.Linear(config.hidden_size, num_outputs(kind, self.labels[name]))
                for name, kind in self.kinds.items()
            }
        )
        self.post_init()

    def trace(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        architecture: Architecture | None = None,
        task: str | None = None,
        targets: ScoreTargets | None = None,
    ) -> Trace:
        """Run `architecture` (default: all weights) on the shared weights; logits of `task` where one is named."""
        trace = self.effbert.trace(input_ids, attention_mask, token_type_ids, architecture, targets=targets)
        if task is None:
            return trace
        last = trace.hidden_states[-1]
        x = last if self.kinds[task] == "spans" else self.effbert.pool(last)
        return replace(trace, logits=self.heads[head_key(task)](x))

    def partly_used(self, architectures: Sequence[Architecture]) -> dict[nn.Parameter, tuple[int, int]]:
        """The MLP weights of which these architectures together use the first entries of a dimension only: that
        dimension, and how many. Those of stacks that none of them has are not among them: they get no gradient."""
        full, found = self.config.intermediate_size, {}
        for index, layer in enumerate(self.effbert.layers):
            structures = [architecture.layers[index].structure for architecture in architectures]
            for stack, mlp in enumerate(layer.mlps):
                widths = [structure.inner_width(full) for structure in structures if stack < structure.stacks]
                if widths and max(widths) < full:
                    for parameter, dimension in ((mlp.dense1.weight, 0), (mlp.dense1.bias, 0), (mlp.dense2.weight, 1)):
                        found[parameter] = dimension, max(widths)
        return found

    def extract(self, architecture: Architecture, task: str | None = None, **changes):
        """A standalone model with copies of the used slices: with the head of `task`, or the bare encoder.

        `changes` go to its config, e.g. `fit_size=None` drops the training-only projection. Outputs equal those of the
        supernet running the same architecture.
        """
        config = derive_config(self.config, architecture, **changes)
        source = {f"effbert.{name}": tensor for name, tensor in self.effbert.state_dict().items()}
        source = used_slices(source, architecture, config.intermediate_size, "effbert.")
        if task is None:
            model = EffBertModel(config)
            source = {name.removeprefix("effbert."): tensor for name, tensor in source.items()}
        else:
            model = new_student(config, self.kinds[task], self.labels[task])
            head = self.heads[head_key(task)].state_dict()
            source |= {f"{model.head_name}.{name}": tensor for name, tensor in head.items()}
        wanted = model.state_dict()
        model.load_state_dict({name: source[name] for name in wanted})
        return model.train(self.training)

    def narrowed(self, hidden_size: int, times: int = 1) -> "Supernet":
        """A supernet of the first `hidden_size` channels, with every layer `times` times in place, as the published
        narrow and 12-layer students are begun; where it is narrower its MLPs are as wide as its layers, as theirs are.

        ValueError where this one has fewer channels. They are cut as they lie, across the heads.
        """
        architecture = Architecture.parse(self.config.architecture).repeat(times)
        config = derive_config(
            self.config, architecture, hidden_size=hidden_size,
            intermediate_size=narrowed_inner_width(self.config, hidden_size),
            supernet_tasks=getattr(self.config, "supernet_tasks", []),
        )  # fmt: skip
        narrow, source = Supernet(config), self.state_dict()
        state = {}
        for name, tensor in narrow.state_dict().items():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(int(parts[2]) // times)
            state[name] = source[".".join(parts)][tuple(map(slice, tensor.shape))]
        narrow.load_state_dict(state)
        return narrow.train(self.training)


def narrowed_inner_width(config: EffBertConfig, hidden_size: int) -> int:
    """Inner width, at ratio 1, of what `Supernet.narrowed` makes of a supernet; ValueError as there."""
    inner = config.intermediate_size if hidden_size == config.hidden_size else hidden_size
    if hidden_size > config.hidden_size or inner > config.intermediate_size:
        raise ValueError(
            f"a supernet of width {config.hidden_size}, {config.intermediate_size} inside its MLPs, has no first "
            f"{hidden_size} channels: train a wider one"
        )
    return inner


def head_key(task: str) -> str:
    """A task name as a module name, which may hold no dot and not be a name that ModuleDict has already."""
    return f"task_{task.replace('.', '_')}"
