"""What tests of a search share."""

import dataclasses

import pytest

from effbert.config import PRESETS
from effbert.workspace import open_teachers, open_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Data, a teacher of a few steps and nothing else of a smoke run."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(PRESETS["smoke"](), output_dir=str(folder), tasks=())
    found = open_workspace(config, folder, lambda text: None)
    open_teachers(found, lambda text: None)
    return found
