"""The header of every result: which machine, which versions, which commit."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastsd import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def header(packages: tuple[str, ...] = ("torch", "triton", "numpy", "diffusers", "transformers")) -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": environment.cpu(),
        "gpus": environment.gpus(),
        "system": platform.platform(),
        "versions": environment.versions(packages),
    }


def commit() -> str:
    """The checkout's commit, "+changes" if the package or the benchmarks differ from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", "fastsd", "bench/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(rows: list[list[str]]) -> str:
    """Columns lined up, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
