"""Fixtures for all tests: two threads, the small model, models with random weights made and saved by diffusers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network; those of the Hub start their own server
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

# Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before anything (diffusers does)
# imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections import Counter
from pathlib import Path

import pytest

import fastsd
from bench import record
from tests import oracle
from tests.small_model import SMALL_MODEL

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


ON_DEVICE = ("tests/kernels/", "tests/models/test_triton_nets.py", "tests/test_backends.py")
"""What runs on the GPU where there is one: `pytest -m gpu` takes it too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write each test's outcome and seconds into this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--results"):
        config.pluginmanager.register(Results(config.getoption("--results")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available() and item.nodeid.startswith(ON_DEVICE):
            item.add_marker("gpu")
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Results:
    """The record of a run: which machine, versions and commit, and what each test did there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, str | float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = {} if report.outcome == "passed" else {"message": str(report.longrepr)[-1000:]}
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 3), **message}

    def pytest_sessionfinish(self) -> None:
        counts = Counter(test["outcome"] for test in self.tests.values())
        record.save(self.path, record.header() | {"counts": counts, "tests": self.tests})


@pytest.fixture(scope="session")
def small_model() -> Path:
    return SMALL_MODEL


@pytest.fixture(scope="session")
def pipe() -> fastsd.Pipeline:
    """The small model on plain PyTorch, in fp32: what parity is judged by."""
    return fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")


@pytest.fixture(scope="session")
def diffusers_pipe(small_model: Path):
    return oracle.load_pipeline(small_model)


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder of small width and random weights, in the style of SD 1.x or SD 2.x."""
    return oracle.save_random_model(tmp_path_factory.mktemp(request.param), request.param)
