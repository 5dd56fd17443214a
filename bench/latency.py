"""`python -m bench.latency --device cpu --against diffusers`: how long fastsd takes, beside diffusers, on this machine.

Contenders run in one process, in turn (A B C A B C …), after runs that are not counted, with the same weights, noise, dtype and
threads. Peak memory and the first picture are those of a process of its own for each; on a GPU a run starts with empty caches,
so the first row's first pictures wait for all that is compiled, and later rows' for what earlier ones left to compile.
No speed is reported where the outputs differ.

Without --model: the bundled model, and on a CPU one step of SD 1.5's UNet in fp32 and bf16 beside it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from bench import contest, ladder, peers, plot, random_model, record
from bench.ladder import Engine
from bench.workloads import Case, model_config
from fastsd.config import SD15
from fastsd.device import DTYPES, select_dtype
from fastsd.errors import FastSDError
from fastsd.pipeline import BUNDLED
from fastsd.sampling.names import canonical_sampler

BUNDLED_NAME = "bundled"
UNET_STEPS = [
    Case("SD 1.5", "", 256, dtype="float32", alone=True),
    Case("SD 1.5", "", 256, dtype="bfloat16", alone=True),
]
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextmanager
def model_folder(model: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """A model's name in the report, and where it lies: a preset's is made, and goes again."""
    if model == BUNDLED_NAME:
        yield "bundled model", str(BUNDLED)
    elif model in random_model.PRESETS:
        with TemporaryDirectory(prefix="fastsd-bench-") as folder:
            config = random_model.PRESETS[model]
            yield f"{model} (random weights)", str(random_model.save(Path(folder) / model, config, dtype))
    else:
        yield Path(model).resolve().name, model


@contextmanager
def empty_caches(device: torch.device) -> Iterator[None]:
    """Compile caches of this run's own, on a GPU, for this process and its children."""
    if device.type != "cuda":
        yield
        return
    with (
        TemporaryDirectory(prefix="fastsd-bench-") as folder,
        patch.dict(os.environ, {name: str(Path(folder) / name.lower()) for name in CACHES}),
    ):
        yield


def measure(case: Case, args: argparse.Namespace, with_ladder: bool) -> dict[str, Any]:
    """One row, from the fresh processes to the figures."""
    device = torch.device(case.device)
    rivals = peers.names(device) if args.against else []
    engines = ladder.standard(device)
    failed: dict[str, str] = {}
    told: dict[str, dict[str, Any]] = {}
    for key in (*engines, *rivals):
        try:
            told[key] = contest.alone(case, key, args.threads)
        except RuntimeError as error:
            failed[key] = str(error)
    rungs = rungs_of(engines, device) if with_ladder else {}
    everyone = contest.makers(case, engines | dict(rungs.values()), rivals)
    row = contest.contest(case, everyone, args.runs, failed)
    del everyone  # and the weights it holds
    contest.let_go(device)
    about = {key: value for key, value in asdict(case).items() if key != "folder"}
    row = {"name": case.name, "case": about} | row
    if "breaches" in row:
        return row

    config = SD15 if case.alone else model_config(case.folder)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    row = contest.figures(row, contest.work(config, case, row.pop("calls"), gpu))
    for figure in ("peak_memory_mib", "reserved_memory_mib", "first_image"):
        if any(figure in one for one in told.values()):
            row[figure] = {
                key: one[figure] for key, one in told.items() if figure in one and key in row["milliseconds"]
            }
    if rungs:
        row["ladder"] = [climbed(label, key, row) for label, (key, _) in rungs.items()]
    return row


def rungs_of(engines: dict[str, Engine], device: torch.device) -> dict[str, tuple[str, Engine]]:
    """Each rung's contender: one that runs anyway where it is the same, else its own."""
    known = {engine: key for key, engine in engines.items()}
    return {label: (known.get(engine, f"ladder {label}"), engine) for label, engine in ladder.rungs(device).items()}


def climbed(label: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
    if key in row["failed"]:
        return {"rung": label, "failed": row["failed"][key]}
    return {
        "rung": label,
        "p50": row["milliseconds"][key]["p50"],
        "step_p50": row["stages_ms"][key]["step"]["p50"],
    }


def report(row: dict[str, Any]) -> str:
    """A row's contenders by stage, who failed, and the ladder."""
    if "skipped" in row:
        return f"{row['name']}: {row['skipped']}"
    lines = [row["name"]]
    if "breaches" in row:
        for key, why in row["breaches"].items():
            fault = "FAILED" if key in row["failed"] else "PARITY BREACH"
            lines.append(f"  {fault} {key}: {why}; no speed is reported")
    else:
        ours = row["milliseconds"]["fastsd"]["p50"]
        head = ["", "text ms", "step ms", "decode ms", "total ms", "p20-p80", "it/s", "TFLOP/s", "of floor", "MiB"]
        table = [[*head, "load s", "first s", "fastsd is"]]
        for key, total in row["milliseconds"].items():
            stage = {name: f"{spread['p50']:.2f}" for name, spread in row["stages_ms"][key].items()}
            speed, first = row["speed"][key], row.get("first_image", {}).get(key, {})
            share = speed.get("of_floor", {}).get("total")
            cells = [key, *(stage.get(name, "-") for name in ("text", "step", "decode")), f"{total['p50']:.1f}"]
            cells += [f"{total['p20']:.1f}-{total['p80']:.1f}", f"{speed['iterations_per_second']:.2f}"]
            cells += [f"{speed['tflops']['total']:.3g}", "-" if share is None else f"{share:.0%}"]
            cells.append(str(row.get("peak_memory_mib", {}).get(key, "-")))
            cells += [f"{first[name]:.1f}" if name in first else "-" for name in ("load_s", "first_s")]
            table.append([*cells, f"{total['p50'] / ours:.2f}x"])
        lines.append(record.table(table))
    lines += [f"  FAILED {key}: {why}" for key, why in row["failed"].items() if key not in row.get("breaches", {})]
    if "best_diffusers" in row:
        ratio = row["milliseconds"][row["best_diffusers"]]["p50"] / row["milliseconds"]["fastsd"]["p50"]
        lines.append(f"  best diffusers: {row['best_diffusers']}; fastsd is {ratio:.2f}x as fast")
    if "ladder" in row:
        rungs = [["  ladder", "total ms", "step ms"]]
        for rung in row["ladder"]:
            figures = [f"{rung[key]:.2f}" for key in ("p50", "step_p50")] if "p50" in rung else ["FAILED", "-"]
            rungs.append([f"  {rung['rung']}", *figures])
        lines.append(record.table(rungs))
    return "\n".join(lines)


def cases_of(args: argparse.Namespace, name: str, folder: str) -> list[Case]:
    """Every size with every batch, the first named first."""
    config = model_config(folder)
    if args.sampler is not None:
        canonical_sampler(args.sampler)  # ParameterError for one that is unknown
    sizes = args.size or [config.unet.sample_size * config.vae.downscale]
    if odd := [size for size in sizes if size < 1 or size % config.vae.downscale]:
        raise FastSDError(f"--size: {odd[0]} is not a multiple of {config.vae.downscale}")
    first = Case(name, folder, sizes[0], 1, args.steps, args.sampler, args.dtype, args.device)
    return [replace(first, pixels=size, batch=batch) for size in sizes for batch in args.batch or [1]]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def counted(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return number

    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    presets = ", ".join(random_model.PRESETS)
    parser.add_argument("--model", help=f"a diffusers folder, {BUNDLED_NAME}, or with random weights: {presets}")
    parser.add_argument(
        "--size", type=int, action="append", help="pixels a side; again for another (default: the model's)"
    )
    parser.add_argument("--batch", type=counted, action="append", help="images; again for another (default 1)")
    parser.add_argument("--steps", type=counted, default=20, help="of the sampler (default 20)")
    parser.add_argument("--sampler", help="as `fastsd samplers` names it (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on cuda, float32 on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", choices=["diffusers"], help="measure this too, in the same run")
    parser.add_argument("--ladder", action="store_true", help="also fastsd part by part, in the first row")
    parser.add_argument("--plot", action="store_true", help="also a PNG beside the JSON file; needs matplotlib")
    parser.add_argument("--runs", type=counted, default=7, help="counted runs of each contender (default 7)")
    parser.add_argument("--minutes", type=float, help="start no row after so many minutes")
    parser.add_argument("--threads", type=counted, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/latency-<device>.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what `contest.alone` asks of a fresh process
    args = parser.parse_args(argv)
    args.dtype = str(select_dtype(args.dtype or "auto", torch.device(args.device))).removeprefix("torch.")
    return args


def default_out(device: str) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return record.RESULTS / f"latency-{name.replace(' ', '-').lower()}.json"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.child:
        print(json.dumps(contest.child(args.child)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.latency: no CUDA device; --device cpu measures this machine's CPU")
        return 2
    torch.set_num_threads(args.threads)
    device, out = torch.device(args.device), args.out or default_out(args.device)
    result = record.header() | {
        "device": args.device,
        "threads": args.threads,
        "load_before": round(os.getloadavg()[0], 2),
        "rows": [],
    }
    print(json.dumps({key: result[key] for key in ("commit", "cpu", "gpus", "versions")}, ensure_ascii=False))
    start = time.perf_counter()
    try:
        with empty_caches(device), model_folder(args.model or BUNDLED_NAME, DTYPES[args.dtype]) as (name, folder):
            cases = cases_of(args, name, folder)
            cases += UNET_STEPS if args.model is None and args.device == "cpu" else []
            for number, case in enumerate(cases):
                if args.minutes is not None and time.perf_counter() - start > 60 * args.minutes:
                    row: dict[str, Any] = {"name": case.name, "skipped": f"not begun after {args.minutes:g} minutes"}
                else:
                    if args.device == "cuda":
                        contest.settings(case)
                    row = measure(case, args, args.ladder and number == 0)
                result["rows"].append(row)
                print("\n" + report(row), flush=True)
                record.save(out, result)  # what is measured stays if the next row is stopped
    except FastSDError as error:
        print(f"bench.latency: {error}")
        return 2
    print(f"written to {out}")
    breached = any("breaches" in row for row in result["rows"])
    return max(int(breached), draw(result, out.with_suffix(".png")) if args.plot else 0)


def draw(result: dict[str, Any], path: Path) -> int:
    """The exit code: 2 where it cannot be drawn."""
    try:
        plot.draw(result, path)
    except ImportError:
        print("bench.latency: --plot needs matplotlib: pip install 'fastsd[bench]'")
        return 2
    except ValueError as error:
        print(f"bench.latency: {error}")
        return 2
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
