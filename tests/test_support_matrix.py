"""The support matrix is a gate, so it is shown what must not pass: breaches, rows without oracle or measurement, failed tests."""

import math
import sys

import pytest

from tests.measured import NOTED, Measured
from tests.support_matrix import Row, Run, read_rows, report, run_tests

SMALL_TESTS = """
import pytest
from tests.measured import measured

def test_good():
    measured("relative error", 1e-7, 1e-6)
    measured("dB", 71.0, 60.0)

@pytest.mark.parametrize("case", ["small", "large"])
def test_cases(case):
    measured("max abs error", {"small": 1e-5, "large": 3e-4}[case], 1e-4)

def test_not_a_number():
    measured("relative error", float("nan"), 1e-6)

def test_silent():
    pass

def test_failing():
    measured("values differ", 0, 0)
    assert False
"""
NAMES = ("test_good", "test_cases", "test_not_a_number", "test_silent", "test_failing")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the small tests noted, run by the matrix's own pytest inside this one."""
    folder, noted, modules = tmp_path_factory.mktemp("small"), list(NOTED), set(sys.modules)
    (folder / "test_of_the_matrix.py").write_text(SMALL_TESTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ids = [f"test_of_the_matrix.py::{name}" for name in NAMES]
        found = run_tests({"all": ids}, "--rootdir", str(folder))
    NOTED[:] = noted
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    return found


def judged(run: Run, oracle: str, *names: str) -> int:
    """The exit code of a matrix of two rows, the first of them good."""
    rows = [Row("good", "`x`", "fp64"), Row("other", "`y`", oracle)]
    tests = tuple(f"test_of_the_matrix.py::{name}" for name in names)
    return report(rows, {"good": ("test_of_the_matrix.py::test_good",), "other": tests}, run)


def test_what_holds_is_ok(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(run, "another program", "test_cases[small]") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "good fp64 71.0 dB 60 ok" in lines, "the nearest to its bound is not the one shown"
    assert "other another program 1e-05 max abs error 0.0001 ok" in lines
    assert "2 features, 0 of them not as claimed" in lines


CASES = {
    "a breach in one of two cases": ("fp64", ("test_good", "test_cases"), "0.0003 max abs error", "BREACH"),
    "not a number": ("fp64", ("test_not_a_number",), "nan relative error", "BREACH"),
    "no oracle": ("", ("test_good",), "71.0 dB", "NO ORACLE"),
    "one test that measures nothing": ("fp64", ("test_good", "test_silent"), "71.0 dB", "NOT MEASURED"),
    "a test that is gone": ("fp64", ("test_good", "test_renamed"), "71.0 dB", "NOT MEASURED"),
    "a failed test": ("fp64", ("test_failing",), "0 values differ", "FAILED"),
    "no test": ("fp64", (), "-", "NO TEST"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_hold_is_exit_code_1(case: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    oracle, names, error, verdict = CASES[case]
    assert judged(run, oracle, *names) == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("other "))
    assert error in line
    assert verdict in line
    assert "2 features, 1 of them not as claimed" in out


def test_what_is_tested_but_not_documented(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([], {"secret": ("test_of_the_matrix.py::test_good",)}, run) == 1
    assert "NO ORACLE" in capsys.readouterr().out


def test_shares_of_a_bound() -> None:
    assert Measured("relative error", 2e-6, 1e-6).share == pytest.approx(2)
    assert Measured("dB", 60.0, 60.0).share == 1
    assert Measured("dB", 54.0, 60.0).share == pytest.approx(2, rel=0.01)
    assert Measured("dB", math.inf, 60.0).share == 0
    assert Measured("values differ", 0, 0).share == 0
    assert Measured("values differ", 1, 0).share == math.inf
    for unit, bound in (("relative error", 1e-6), ("dB", 60.0), ("values differ", 0)):
        assert Measured(unit, math.nan, bound).share == math.inf


def test_rows_are_read_from_tables_of_three_columns() -> None:
    header = "| feature | example | compared with |\n|---|---|---|\n"
    text = f"{header}| a b | `c(1)` | d |\n| e | `f` |  |\n\n| one | two |\n|---|---|\n"
    assert read_rows(text) == [Row("a b", "`c(1)`", "d"), Row("e", "`f`", "")]
