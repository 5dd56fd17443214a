from pathlib import Path

import pytest

from tests.checkpoints.checkpoint_builders import model_on_disk
from tests.checkpoints.single_files import Model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_on_disk(tmp_path / "model")


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sd2"), "sd2")
