"""What `bench.semantic` prints and draws of its results."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from bench import record
from bench.semantic_judge import ALL, Verdict
from fastsd.picture_grid import grid

PRINTED = 10
"""So many failures are printed; the JSON file has all."""
SHOWN, COLUMNS = 64, 8
SIDE = 128
"""Of the grid: pictures, and in a row; pixels of a picture's side."""
RIGHT, WRONG = "#d0d0d0", "#e00000"


def run_report(run: Mapping[str, Any]) -> str:
    """A sampler's attributes and suites, and its first failures."""
    head = f"{run['sampler']}, {run['steps']} steps"
    if "failed" in run:
        return f"{head}: FAILED {run['failed']}"
    rows = [[head, "right", "accuracy", "95% interval"]]
    rows += [_row(name, score) for name, score in run["attributes"].items()]
    rows += [_row(f"{ALL}, {suite}", score) for suite, score in run["suites"].items()]
    lines = [record.table(rows)]
    for failure in run["failures"][:PRINTED]:
        wrong = ", ".join(failure["wrong"])
        lines.append(f'  "{failure["prompt"]}" (seed {failure["seed"]}): {wrong} wrong; read {failure["read"]}')
    if len(run["failures"]) > PRINTED:
        lines.append(f"  … {len(run['failures']) - PRINTED} more in the JSON file")
    return "\n".join(lines)


def samplers_report(runs: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> str:
    """Of each sampler how much is all right, and the difference to the reference's in points (hundredths)."""
    rows = [["sampler", "steps", "right", "accuracy", "95% interval", f"to {_named(reference)}"]]
    for run in runs:
        if "failed" in run:
            rows.append([run["sampler"], str(run["steps"]), "FAILED", "-", "-", "-"])
            continue
        score = run["attributes"][ALL]
        points = "-"
        if "failed" not in reference:
            points = f"{100 * (score['accuracy'] - reference['attributes'][ALL]['accuracy']):+.1f}"
        rows.append([run["sampler"], str(run["steps"]), *_row("", score)[1:], points])
    return record.table(rows)


def _named(run: Mapping[str, Any]) -> str:
    return f"{run['sampler']} at {run['steps']}"


def _row(name: str, score: Mapping[str, Any]) -> list[str]:
    interval = f"{score['low']:.1%} to {score['high']:.1%}"
    return [name, f"{score['right']}/{score['number']}", f"{score['accuracy']:.1%}", interval]


def verdict_grid(pictures: Sequence[Image.Image], verdicts: Sequence[Verdict]) -> Image.Image:
    """The first 64 pictures, their prompts under them; those that are not all right in a red frame."""
    shown = verdicts[:SHOWN]
    return grid(
        [picture.resize((SIDE, SIDE), Image.Resampling.NEAREST) for picture in pictures[:SHOWN]],
        COLUMNS,
        [verdict.prompt.text for verdict in shown],
        [RIGHT if verdict.right[ALL] else WRONG for verdict in shown],
    )
