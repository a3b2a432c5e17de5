"""Shared weights: what a batch trains, in single-path and sandwich form, from one pass of the teacher."""

import copy
import dataclasses

import pytest
import torch

from effbert import random
from effbert.search.shared import Draws
from effbert.search.space import ArchitectureSpace
from effbert.step import general_lesson
from effbert.workspace import model_inputs


@pytest.fixture(scope="module")
def space(workspace, space):
    """The space of stage 3 round a candidate of stage 1's."""
    base = space.sample(random.generator(0, "shared"))
    return ArchitectureSpace("fine", space.dims, space.num_layers, *workspace.config.band(space.dims), base)


@pytest.fixture
def supernet(supernet):
    """One of each test's own, to train."""
    return copy.deepcopy(supernet)


def draws(workspace, supernet, space, sharing):
    config = dataclasses.replace(workspace.config, weight_sharing=sharing)
    return Draws(dataclasses.replace(workspace, config=config), supernet, space, "general")


def test_a_batch_trains_what_its_number_says(workspace, supernet, space):
    single, sandwich = (draws(workspace, supernet, space, sharing) for sharing in ("single-path", "sandwich"))
    assert single.of(3) == single.of(3) and len(single.of(3)) == 1
    assert len({str(single.of(number)[0]) for number in range(10)}) > 5
    smallest, largest, drawn = sandwich.of(3)
    assert (smallest, largest) == (space.extreme(False), space.extreme(True)) and [drawn] == single.of(3)


@pytest.mark.parametrize("sharing", ["single-path", "sandwich"])
def test_the_loss_is_the_mean_over_its_architectures_from_one_pass_of_the_teacher(workspace, supernet, space, sharing):
    lesson, drawn = general_lesson(workspace), draws(workspace, supernet, space, sharing)
    batch = workspace.general_plan(0.2, 8, 0)[0]
    calls = []
    hook = workspace.general_teacher.encoder.register_forward_hook(lambda *_: calls.append(1))
    loss = drawn.loss(lesson)(batch, 5)
    hook.remove()
    assert calls == [1]
    alone = [
        lesson.loss(
            lambda batch, number, targets, a=architecture: supernet.trace(*model_inputs(batch), a, targets=targets),
            supernet.effbert.fit_dense,
        )(batch, 5)
        for architecture in drawn.of(5)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_what_is_used_covers_all_architectures_of_an_update(workspace, supernet, space):
    drawn = draws(workspace, supernet, space, "sandwich")
    used = drawn.partly_used([1, 2])
    expected = supernet.partly_used([*drawn.of(1), *drawn.of(2)])
    assert used == expected and used
