"""One small world, loaded once; one thread, as waiting for a second costs more than these sizes take."""

import os

import pytest
import torch

from models.data import TrainingData
from tests.models.small_world import SmallWorld


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # workers started by a test share the cores with that many


@pytest.fixture(scope="session")
def world() -> SmallWorld:
    return SmallWorld()


@pytest.fixture(scope="session")
def data(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return world.load(tmp_path_factory.mktemp("lake"))
