"""What test_parallel.py runs in one process, and under torchrun in two: ranks.py FOLDER WHAT ..."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

from effbert import __main__, cli, parallel, random
from effbert.architecture import Architecture
from effbert.config import PRESETS, SearchConfig
from effbert.engine import Phase, train
from effbert.flags import quiet_libraries
from effbert.kernels import gradients_in_place
from effbert.optim import TrainingArguments
from effbert.pace import Standing
from effbert.search.final import Row, equal_plain_width, final_rows
from effbert.search.progress import Reporter
from effbert.search.run import coarse_space
from effbert.search.shared import Draws, shared_supernet
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import warm_supernet
from effbert.step import general_lesson, task_lesson
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, model_inputs, open_teachers, open_workspace

KILLED_AT = 13  # a step after the save at step 10
RATE = 1e-4  # AdamW's step in an element whose gradient is nothing but rounding is the rate times a sign


def settings(batch: int) -> SearchConfig:
    """The smoke preset without dropout, at `batch` rows a process wherever training is data-parallel."""
    config = PRESETS["smoke"]()
    phase = TrainingArguments(learning_rate=RATE, per_device_train_batch_size=batch)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    budget = {"general_share": 0.52, "task_share": 0.1, "general_phase": phase, "task_phase": phase}
    return dataclasses.replace(
        config,
        device="cpu",
        corpus_tokens=2000,
        student=dataclasses.replace(config.student, **no_dropout),
        supernet=phase,
        stage3=dataclasses.replace(config.stage3, **budget),
        final=dataclasses.replace(config.final, **budget),
    )


def workspace_in(folder: Path, batch: int, world: parallel.World) -> Workspace:
    """A copy of a prepared run folder, opened."""
    config = dataclasses.replace(settings(batch), output_dir=str(folder))
    workspace = open_workspace(config, folder, lambda text: None, world)
    open_teachers(workspace, lambda text: None)
    return workspace


def fresh_supernet(workspace: Workspace, **changes) -> Supernet:
    torch.manual_seed(0)
    base = supernet_config(workspace.student_config(**changes), workspace.config.student.num_hidden_layers)
    return Supernet(base, [task.spec for task in workspace.tasks.values()])


def space_of(workspace: Workspace) -> ArchitectureSpace:
    coarse = coarse_space(workspace, Reporter(shown=False))
    base = coarse.sample(random.generator(0, "ranks"))
    return ArchitectureSpace("fine", coarse.dims, coarse.num_layers, *workspace.config.band(coarse.dims), base)


def everything(workspace: Workspace) -> dict:
    """All that is data-parallel, as a search does it; files lie in the workspace's folder."""
    reporter = Reporter(shown=False)
    supernet, space = warm_supernet(workspace, reporter), space_of(workspace)
    winner = space.sample(random.generator(0, "winner"))
    plain = Row("plain BERT", Architecture.uniform("1_1", 6), equal_plain_width(winner, workspace.student_config()))
    rows = final_rows(workspace, supernet, [Row("winner", winner), plain], 0, reporter)
    warm = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    shared = shared_supernet(workspace, supernet, space, workspace.config.stage3, reporter).state_dict()
    return {"rows": rows, "warm": warm, "shared": shared, "steps": few_steps(workspace, space)}


def few_steps(workspace: Workspace, space: ArchitectureSpace) -> dict:
    """Two updates, of two batches each, of one architecture's slices each."""
    supernet, world = fresh_supernet(workspace), workspace.world
    draws, size = Draws(workspace, supernet, space, "general"), workspace.config.supernet.per_device_train_batch_size
    arguments = TrainingArguments(learning_rate=RATE, warmup_ratio=0.0, gradient_accumulation_steps=2)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    result = train(
        supernet,
        lambda epoch: list(workspace.general_plan(1.0, size, epoch, world=world))[:4],
        draws.loss(general_lesson(workspace)),
        arguments,
        Phase(("steps",), 0),
        partly_used=draws.partly_used,
        world=world,
    )
    return {"before": before, "after": supernet.state_dict(), "loss": result.loss, "tokens": result.tokens}


def gradient(workspace: Workspace) -> dict:
    """The gradient of one batch of task distillation for one architecture, by parameter; None where there is none."""
    supernet, world, name = fresh_supernet(workspace), workspace.world, workspace.main_task.spec.name
    size = workspace.config.final.task_phase.per_device_train_batch_size
    batch = workspace.plan(workspace.main_task.train, size, "task", 0, world=world)[-1]
    loss_of = Draws(workspace, supernet, space_of(workspace), "tasks").loss(task_lesson(workspace, name), name)
    with gradients_in_place():
        loss_of(batch, 0).backward()
    world.add_up(list(supernet.parameters()))
    return {name: parameter.grad for name, parameter in supernet.named_parameters()}


def long_phase(workspace: Workspace, on_step=None) -> dict:
    """Distil a supernet with dropout, and a checkpoint every ten steps."""
    supernet, world = fresh_supernet(workspace, hidden_dropout_prob=0.1), workspace.world

    train(
        supernet,
        lambda epoch: workspace.general_plan(1.0, 4, epoch, world=world),
        general_lesson(workspace).loss(
            lambda batch, number, targets: supernet.trace(*model_inputs(batch), targets=targets),
            supernet.effbert.fit_dense,
        ),
        TrainingArguments(num_train_epochs=3),
        Phase(("long",), 0, workspace.folder / "long.pt", save_seconds=-1.0),
        on_step=on_step,
        world=world,
    )
    return supernet.state_dict()


def killed(workspace: Workspace) -> None:
    """The same from its start; rank 1 dies at step KILLED_AT."""

    def die(at: Standing) -> None:
        if at.step == KILLED_AT and not workspace.world.is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    (workspace.folder / "long.pt").unlink(missing_ok=True)
    workspace.world.wait()
    long_phase(workspace, die)


def failing(workspace: Workspace) -> None:
    """Rank 1 has an error that nobody foresaw, and the others wait for it."""
    if not workspace.world.is_first:
        raise ArithmeticError("the sum is\nwrong")
    workspace.world.wait()


def gradients(workspace: Workspace) -> dict:
    """Three parameters of which the first is used by all, the second by the last rank, the third by none."""
    world = workspace.world
    parameters = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((3, 2), 1.0 + world.rank)
    if world.rank == world.size - 1:
        parameters[1].grad = torch.full((3, 2), 5.0)
    loss = torch.tensor(float(world.rank), dtype=torch.float64)
    world.add_up(parameters, loss)
    return {"gradients": [parameter.grad for parameter in parameters], "loss": loss}


def disagreement(workspace: Workspace) -> dict:
    """What ranks are told that stand at different steps."""
    try:
        workspace.world.check_same((0, workspace.world.rank), "the processes see different checkpoints")
    except ValueError as error:
        return {"told": str(error)}


def main(folder: Path, parts: list[str]) -> int:
    """Run `parts` on this rank as a command does, and keep what came of each in FOLDER/PART-RANK.pt."""

    def run(arguments: list[str], world: parallel.World) -> int:
        quiet_libraries()
        workspace = workspace_in(folder, 4, world)
        for part in arguments:
            torch.save(globals()[part](workspace), folder / f"{part}-{world.rank}.pt")
        return 0

    cli.run, cli.is_shared = run, lambda arguments: True
    return __main__.main(parts)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
