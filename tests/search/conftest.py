"""What tests of a search share."""

import dataclasses

import pytest
import torch

from effbert import random
from effbert.config import PRESETS
from effbert.search.progress import Reporter
from effbert.search.run import coarse_space
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import open_teachers, open_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Data, a teacher of a few steps and nothing else of a smoke run."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(PRESETS["smoke"](), output_dir=str(folder), tasks=())
    found = open_workspace(config, folder, lambda text: None)
    open_teachers(found, lambda text: None)
    return found


@pytest.fixture(scope="session")
def space(workspace):
    """The space of stage 1."""
    return coarse_space(workspace, Reporter())


@pytest.fixture(scope="session")
def architectures(space):
    """Three candidates of it."""
    return [space.sample(random.generator(0, "test", number)) for number in range(3)]


@pytest.fixture(scope="session")
def supernet(workspace):
    """A supernet as it is before anything trains, in eval mode: for tests that only read it."""
    torch.manual_seed(0)
    base = supernet_config(workspace.student_config(), workspace.config.student.num_hidden_layers)
    return Supernet(base, [workspace.main_task.spec]).eval()
