from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsd.training.model import Model
from fastsd.training.run import train
from tests.training.builders import AUTOENCODER, DIFFUSION, TEXT, recipe, save_new_model, trained_model


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Nets of this size are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with initial weights. To be read only."""
    return save_new_model(tmp_path_factory.mktemp("new") / "model")


@pytest.fixture
def model(new_folder: Path) -> Model:
    """A tiny model with random weights, for the test alone."""
    return trained_model(new_folder)


@pytest.fixture(scope="session")
def trained_folder(new_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a folder. To be read only."""
    path = tmp_path_factory.mktemp("trained") / "model"
    trained_model(new_folder).save(path)
    return path


@pytest.fixture(scope="package")
def whole_run(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from nothing that nothing interrupted: its folder, with the recipe beside `runs`. To be read only."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(recipe(folder, TEXT + AUTOENCODER + DIFFUSION))
    return folder
