"""The picture of a latency result: the ladder, and latency by size and batch."""

from pathlib import Path
from typing import Any

OURS = "fastsd"


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG of two charts. ImportError without matplotlib; ValueError where no row has times."""
    from matplotlib.figure import Figure  # its own canvas: no window, no global state

    rows = [row for row in result["rows"] if "milliseconds" in row]
    if not rows:
        raise ValueError("no row has times to plot")
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, next((row for row in rows if "ladder" in row), rows[0]))
    _sizes(right, rows)
    gpu = ", ".join(result["gpus"]) if result["device"] != "cpu" else result["cpu"]
    figure.suptitle(f"{gpu}; torch {result['versions']['torch']}; commit {result['commit']}", fontsize=9)
    figure.savefig(path, dpi=120, format="png")


def _bars(axes: Any, row: dict[str, Any]) -> None:
    """The ladder's rungs from top to bottom, and the best of diffusers; without a ladder every contender."""
    taken = row["milliseconds"]
    if "ladder" in row:
        bars = {rung["rung"]: rung["p50"] for rung in row["ladder"] if "p50" in rung}
        best = row.get("best_diffusers")
        bars |= {best: taken[best]["p50"]} if best else {}
    else:
        bars = {key: taken[key]["p50"] for key in taken}
    colours = ["tab:orange" if name.startswith("diffusers") else "tab:blue" for name in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, [f"{value:,.1f}" for value in bars.values()], padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.set_title(row["name"], fontsize=10)


def _sizes(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Latency over the size: a line for each batch of fastsd's, and a dashed one of the best of diffusers."""
    rows = [row for row in rows if not row["case"]["alone"]] or rows
    highest = 0.0
    for number, batch in enumerate(sorted({row["case"]["batch"] for row in rows})):
        ours, theirs = [], []
        for row in sorted(rows, key=lambda row: row["case"]["pixels"]):
            if row["case"]["batch"] == batch:
                size, best = row["case"]["pixels"], row.get("best_diffusers")
                ours.append((size, row["milliseconds"][OURS]["p50"]))
                if best:
                    theirs.append((size, row["milliseconds"][best]["p50"]))
        style = {"color": f"C{number}", "marker": "o"}
        axes.plot(*zip(*ours, strict=True), **style, label=f"{OURS}, batch {batch}")
        if theirs:
            dashed = style | {"linestyle": "--", "markerfacecolor": "none"}
            axes.plot(*zip(*theirs, strict=True), **dashed, label=f"best diffusers, batch {batch}")
        highest = max(highest, *(ms for _, ms in ours + theirs), 0.0)
    axes.set_xticks(sorted({row["case"]["pixels"] for row in rows}))
    axes.set_ylim(0, 1.15 * highest)
    axes.set_xlabel("pixels a side")
    axes.set_ylabel("milliseconds a run, median")
    axes.set_title("by size and batch", fontsize=10)
    axes.legend(fontsize=8)
