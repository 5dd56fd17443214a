from pathlib import Path

import pytest

from tests.checkpoints.checkpoint_builders import model_on_disk


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_on_disk(tmp_path / "model")
