"""What test_parallel.py runs in one process, and under torchrun in two: python ranks.py WHAT FOLDER BASE."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

from effbert import parallel, random
from effbert.architecture import Architecture
from effbert.config import PRESETS, SearchConfig
from effbert.engine import Phase, train
from effbert.optim import TrainingArguments
from effbert.search.final import Row, equal_plain_width, final_rows
from effbert.search.progress import Reporter
from effbert.search.run import coarse_space
from effbert.search.shared import Draws, shared_supernet
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import warm_supernet
from effbert.step import general_lesson
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, model_inputs, open_teachers, open_workspace

KILLED_AT = 13  # a step after the save at step 10


def settings(batch: int) -> SearchConfig:
    """The smoke preset without dropout, at `batch` rows a process wherever training is data-parallel."""
    config = PRESETS["smoke"]()
    phase = TrainingArguments(learning_rate=1e-3, per_device_train_batch_size=batch)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    budget = {"general_share": 0.5, "task_share": 0.1, "general_phase": phase, "task_phase": phase}
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


def fresh_supernet(workspace: Workspace) -> Supernet:
    torch.manual_seed(0)
    base = supernet_config(workspace.student_config(), workspace.config.student.num_hidden_layers)
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
    arguments = TrainingArguments(learning_rate=1e-3, warmup_ratio=0.0, gradient_accumulation_steps=2)
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


def killed(workspace: Workspace, rank: int | None) -> dict:
    """Distil a supernet with dropout; the process `rank` dies at step KILLED_AT."""
    config = dataclasses.replace(workspace.config.student, hidden_dropout_prob=0.1)
    workspace.config = dataclasses.replace(workspace.config, student=config)
    supernet, world = fresh_supernet(workspace), workspace.world

    def die(step: int, total: int) -> None:
        assert total > KILLED_AT
        if step == KILLED_AT and world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        supernet,
        lambda epoch: workspace.general_plan(1.0, 4, epoch, world=world),
        general_lesson(workspace).loss(
            lambda batch, number, targets: supernet.trace(*model_inputs(batch), targets=targets),
            supernet.effbert.fit_dense,
        ),
        TrainingArguments(num_train_epochs=3),
        Phase(("killed",), 0, workspace.folder / "killed.pt", save_seconds=-1.0),
        on_step=die,
        world=world,
    )
    return supernet.state_dict()


def gradients(world: parallel.World) -> dict:
    """Three parameters of which the first is used by all, the second by the last rank, the third by none."""
    parameters = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((3, 2), 1.0 + world.rank)
    if world.rank == world.size - 1:
        parameters[1].grad = torch.full((3, 2), 5.0)
    loss = torch.tensor(float(world.rank), dtype=torch.float64)
    world.add_up(parameters, loss)
    return {"gradients": [parameter.grad for parameter in parameters], "loss": loss}


def main(what: str, folder: Path) -> None:
    """Run `what` on this rank and keep what came of it in FOLDER/WHAT-RANK.pt."""
    with parallel.joined() as world:
        if what == "gradients":
            found = gradients(world)
        else:
            workspace = workspace_in(folder, 4, world)
            found = (
                everything(workspace) if what == "everything" else killed(workspace, 1 if what == "killed" else None)
            )
        torch.save(found, folder / f"{what}-{world.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
