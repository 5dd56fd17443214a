"""Two processes give what one gives, always the same; what one of them raises reaches the caller."""

import atexit
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastSDError, NumericsError, ParameterError
from fastsd.training import parallel
from tests.training.builders import (
    checkpoint,
    differing,
    fit_in_parts,
    logged,
    state_of,
)

ROUNDING = 1e-6
"""Two processes against one, relative: means of means are added up in another order."""


def fit_three_times(folder: Path) -> None:
    """Whole, whole once more, and in parts, then an average: in one launch, as starting a process takes seconds."""
    for name, stops in {"first": [None], "second": [None], "parts": [3, None]}.items():
        task = fit_in_parts(folder / name, stops)
        torch.save(state_of(task), folder / f"{name}-{parallel.rank()}.pt")
    average_ranks(folder)


def average_ranks(folder: Path) -> None:
    rank = parallel.rank()
    tensors = [torch.full((2, 2), float(rank)), torch.tensor([10.0 * rank, 1.0]), torch.tensor(rank * 4.0)]
    parallel.average(iter(tensors))
    torch.save([parallel.processes(), torch.get_num_threads(), tensors], folder / f"average-{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    parallel.launch(fit_three_times, 2, 1, folder)
    return folder


def test_two_processes_give_the_weights_of_one(pair: Path, tmp_path: Path) -> None:
    fit_in_parts(tmp_path, [None])
    ours, theirs = checkpoint(pair / "first"), checkpoint(tmp_path)
    for part in ("weights", "ema"):
        for name, tensor in theirs[part].items():
            error = ((ours[part][name] - tensor).norm() / tensor.norm()).item()
            assert error <= ROUNDING, f"{part} {name}: relative error {error:.1e} against one process"
    for line, expected in zip(logged(pair / "first"), logged(tmp_path), strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=2e-6), "the log is not of the whole batch"


def test_two_processes_always_give_the_same_bits(pair: Path) -> None:
    assert not differing(checkpoint(pair / "second"), checkpoint(pair / "first"))
    assert logged(pair / "second") == logged(pair / "first")


def test_two_processes_go_on_bit_by_bit(pair: Path) -> None:
    assert not differing(checkpoint(pair / "parts"), checkpoint(pair / "first"))
    assert logged(pair / "parts") == logged(pair / "first")


@pytest.mark.parametrize("name", ["first", "parts"])
def test_every_process_holds_the_result(name: str, pair: Path) -> None:
    ranks = [torch.load(pair / f"{name}-{rank}.pt") for rank in range(2)]
    assert not differing(ranks[1], ranks[0]), "the processes' weights have drifted apart"


def abort_at_exit(folder: Path) -> None:
    """As PyTorch's threads do now and then while the interpreter is taken down."""
    atexit.register(os.abort)
    print(f"done {parallel.rank()}\n", end="")
    (folder / str(parallel.rank())).touch()


def test_a_process_that_is_done_cannot_fail_any_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parallel.launch(abort_at_exit, 2, 1, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert sorted(capfd.readouterr().out.splitlines()) == ["done 0", "done 1"], "what was printed last is lost"


def raise_in_the_second(folder: Path) -> None:
    """While the first waits for it: it must be told, and not wait for the two hours of the time limit."""
    if parallel.rank() == 1:
        raise ParameterError("config: one line, and how to mend it")
    parallel.wait()
    (folder / "went on").touch()


def test_an_error_of_ours_arrives_as_itself(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ParameterError) as caught:
        parallel.launch(raise_in_the_second, 2, 1, tmp_path)
    assert str(caught.value) == "config: one line, and how to mend it"
    assert type(caught.value) is ParameterError
    assert time.monotonic() - began < 120
    assert not (tmp_path / "went on").exists()


def divide(folder: Path) -> None:
    1 / parallel.rank()
    parallel.wait()


def test_any_other_error_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)1 / parallel\.rank.*ZeroDivisionError"):
        parallel.launch(divide, 2, 1, tmp_path)


def note_and_sleep(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(300)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Else they would go on writing to the folder that the next run writes to."""
    call = f"parallel.launch(test_parallel.note_and_sleep, 2, 1, Path({str(tmp_path)!r}))"
    code = f"from pathlib import Path\nfrom fastsd.training import parallel\nfrom tests.training import test_parallel\n{call}"
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(children) == 2, "they did not start"
    parent.kill()
    parent.wait()
    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, children))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def raise_numerics() -> None:
    raise NumericsError("training: the loss is not finite")


def test_one_process_is_this_one(tmp_path: Path) -> None:
    with pytest.raises(NumericsError) as caught:
        parallel.launch(raise_numerics, 1, 1)
    assert caught.traceback[-1].name == "raise_numerics", "it was not called here"
    assert (parallel.rank(), parallel.processes()) == (0, 1)


def test_alone_nothing_is_averaged_and_nobody_is_waited_for() -> None:
    tensor = torch.tensor([1.0, 3.0])
    parallel.average([tensor])
    parallel.wait()
    assert tensor.tolist() == [1, 3]


def test_tensors_are_averaged_in_place(pair: Path) -> None:
    for rank in range(2):
        count, threads, (a, b, c) = torch.load(pair / f"average-{rank}.pt")
        assert (count, threads) == (2, 1)
        assert (a.tolist(), b.tolist(), c.item()) == ([[0.5, 0.5], [0.5, 0.5]], [5, 1], 2)


def test_errors_that_are_passed_on_need_no_more_than_a_message() -> None:
    """`launch` makes them anew from their name and message."""
    kinds = [FastSDError, *FastSDError.__subclasses__()]
    assert [str(kind("what is wrong")) for kind in kinds] == ["what is wrong"] * len(kinds)
