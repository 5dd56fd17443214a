"""`python -m tests.support_matrix`: every feature of docs/SUPPORT.md, what it is compared with, and the error measured now.

The rows are the documentation's; `TESTS` says which tests measure each. They are run here, and what they note (`tests.measured`)
is held against its bound once more. Exit code 1 if a row lacks an oracle, a test or a measurement, a test of it fails, or an
error is beyond its bound. Further arguments go to pytest.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from fastsd.cli_program import print_table
from tests.measured import NOTED, Measured
from tests.support_tests import TESTS

DOCUMENT = Path(__file__).parent.parent / "docs" / "SUPPORT.md"
HEADER = ("feature", "example", "compared with")


class Row(NamedTuple):
    """A line of the documentation's tables."""

    feature: str
    example: str
    oracle: str


class Run:
    """A pytest plugin: what each test noted, and which did not pass."""

    def __init__(self) -> None:
        self.noted: dict[str, list[Measured]] = defaultdict(list)
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        NOTED.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "call":
            self.noted[report.nodeid] += NOTED


def read_rows(text: str) -> list[Row]:
    """The rows of all tables of a Markdown text that have the three columns."""
    lines = (line.strip() for line in text.splitlines())
    cells = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines if line[:1] == line[-1:] == "|"]
    return [Row(*three) for three in cells if len(three) == 3 and three != HEADER and set("".join(three)) != {"-"}]


def judge(row: Row, tests: Sequence[str], run: Run) -> tuple[Measured | None, str]:
    """(the error nearest to its bound, or furthest beyond it; "ok", or what is wrong). tests: ids, of one case or of all."""
    ids = {*run.noted, *run.failed}
    mine = {test: [one for one in ids if one == test or one.startswith(f"{test}[")] for test in tests}
    noted = [one for cases in mine.values() for case in cases for one in run.noted[case]]
    worst = max(noted, key=lambda one: one.share, default=None)
    failed = sorted(case for cases in mine.values() for case in cases if case in run.failed)
    silent = [test for test, cases in mine.items() if not any(run.noted[case] for case in cases)]
    if not row.oracle:
        return worst, "NO ORACLE"
    if not tests:
        return worst, "NO TEST"
    if failed:
        return worst, f"FAILED: {failed[0]}"
    if silent:
        return worst, f"NOT MEASURED: {silent[0]}"
    if worst is None or worst.share > 1:
        return worst, "BREACH"
    return worst, "ok"


def shown(value: float, unit: str) -> str:
    return f"{value:.1f} dB" if unit == "dB" else f"{value:.2g} {unit}"


def run_tests(tests: Mapping[str, Sequence[str]], *options: str) -> Run:
    """All tests of all features, each once. options: more arguments for pytest."""
    ids = dict.fromkeys(test for several in tests.values() for test in several)
    run = Run()
    quiet = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings")
    pytest.main([*ids, *quiet, *options], [run])
    return run


def report(rows: Sequence[Row], tests: Mapping[str, Sequence[str]], run: Run) -> int:
    """Print the table → the exit code."""
    unwritten = [Row(feature, "", "") for feature in tests.keys() - {row.feature for row in rows}]
    table, wrong = [("FEATURE", "COMPARED WITH", "WORST", "BOUND", "VERDICT")], 0
    for row in [*rows, *unwritten]:
        worst, verdict = judge(row, tests.get(row.feature, ()), run)
        wrong += verdict != "ok"
        errors = (shown(worst.value, worst.unit), f"{worst.bound:.2g}") if worst else ("-", "-")
        table.append((row.feature, row.oracle or "-", *errors, verdict))
    print_table(table)
    print(f"\n{len(table) - 1} features, {wrong} of them not as claimed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(report(read_rows(DOCUMENT.read_text(encoding="utf-8")), TESTS, run_tests(TESTS, *sys.argv[1:])))
