"""Fixtures for all tests: two threads, the bundled model, models with random weights made and saved by diffusers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network; those of the Hub start their own server
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

# Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before anything (diffusers does)
# imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest

import fastsd
from fastsd.pipeline import BUNDLED
from tests import oracle

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def bundled() -> Path:
    return BUNDLED


@pytest.fixture(scope="session")
def pipe() -> fastsd.Pipeline:
    """The bundled model on plain PyTorch, in fp32: what parity is judged by."""
    return fastsd.Pipeline(device="cpu", backend="reference")


@pytest.fixture(scope="session")
def diffusers_pipe(bundled: Path):
    return oracle.load_pipeline(bundled)


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder of small width and random weights, in the style of SD 1.x or SD 2.x."""
    return oracle.save_random_model(tmp_path_factory.mktemp(request.param), request.param)
