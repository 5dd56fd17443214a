"""`python -m bench.latency --device cpu --against diffusers`: how long fastsd takes, beside diffusers, on this machine.

Contenders run in one process, in turn (A B C A B C …), after runs that are not counted, with the same weights, dtype and
threads. Peak memory is that of a process of its own for each. No speed is reported where the outputs differ.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from bench.workloads import Contender, Workload, bundled_picture, sd15_unet_step

WORKLOADS = {
    "bundled": lambda: bundled_picture(),
    "sd15-fp32": lambda: sd15_unet_step(torch.float32),
    "sd15-bf16": lambda: sd15_unet_step(torch.bfloat16),
}
WARM_UP = 2


def measure(contenders: dict[str, Contender], runs: int) -> dict[str, list[float]]:
    """Seconds of each run, the contenders taking turns."""
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for turn in range(WARM_UP + runs):
        for key, contender in contenders.items():
            start = time.perf_counter()
            contender.run()
            if turn >= WARM_UP:
                times[key].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def bench(workload: Workload, keys: list[str], runs: int) -> dict[str, Any]:
    """Parity first, then time. A breach leaves no times."""
    contenders = {key: workload.contenders[key]() for key in keys}
    outputs = {key: contender.run() for key, contender in contenders.items()}
    oracle = outputs.get("diffusers", outputs["fastsd"])
    breaches = {key: why for key, output in outputs.items() if (why := workload.gate(output, oracle))}
    if breaches:
        return {"name": workload.name, "breaches": breaches}
    rows = {}
    for key, times in measure(contenders, runs).items():
        low, middle, high = np.percentile(times, [20, 50, 80])
        percentiles = {"p20": low, "p50": middle, "p80": high}
        rows[key] = {"contender": contenders[key].name, "runs": runs} | {
            k: round(v * 1e3, 2) for k, v in percentiles.items()
        }
    return {"name": workload.name, "milliseconds": rows}


@torch.no_grad()
def peak_memory(workload: Workload, key: str) -> int:
    """Peak resident MiB of this process after building one contender and running it three times."""
    contender = workload.contenders[key]()
    for _ in range(3):
        contender.run()
    # Not getrusage: its peak survives exec, so a child would answer with its parent's.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) // 1024


def peak_memory_alone(name: str, key: str, threads: int) -> int:
    """The same, in a fresh process."""
    command = [sys.executable, "-m", "bench.latency", "--only", name, "--memory-of", key, "--threads", str(threads)]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def report(result: dict[str, Any]) -> str:
    """The table: fastsd beside diffusers in its faster layout."""
    lines = [["", "fastsd", "diffusers", "ratio", "peak memory", "(diffusers)", "fastsd reference"]]
    for row in result["rows"]:
        if "breaches" in row:
            lines.append([row["name"], f"PARITY BREACH {row['breaches']}", *[""] * 5])
            continue
        times, memory = row["milliseconds"], row["peak_memory_mib"]
        median = {key: times[key]["p50"] for key in times}
        rival = min((key for key in times if key.startswith("diffusers")), key=median.__getitem__, default=None)
        theirs, ratio, their_memory = "-", "-", "-"
        if rival:
            theirs, ratio = f"{median[rival]:.0f} ms", f"{median[rival] / median['fastsd']:.2f}x"
            their_memory = f"{memory[rival]} MiB"
        ours, plain = f"{median['fastsd']:.0f} ms", f"{median['fastsd reference']:.0f} ms"
        lines.append([row["name"], ours, theirs, ratio, f"{memory['fastsd']} MiB", their_memory, plain])
    return record.table(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="the GPU comes with the Triton kernels")
    parser.add_argument("--against", choices=["diffusers"], help="measure this too, in the same run")
    parser.add_argument("--only", choices=WORKLOADS, help="one workload instead of all")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each contender (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/latency-cpu.json)")
    parser.add_argument("--memory-of", metavar="CONTENDER", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(WORKLOADS[args.only](), args.memory_of))
        return 0
    result = record.header() | {"device": args.device, "threads": args.threads, "rows": []}
    print(json.dumps({key: result[key] for key in ("commit", "cpu", "versions")}, ensure_ascii=False))
    for name in [args.only] if args.only else WORKLOADS:
        workload = WORKLOADS[name]()
        keys = [key for key in workload.contenders if key.startswith("fastsd") or args.against]
        row = bench(workload, keys, args.runs)
        del workload  # and its weights, before another process needs the memory
        if "breaches" not in row:
            row["peak_memory_mib"] = {key: peak_memory_alone(name, key, args.threads) for key in keys}
        result["rows"].append(row)
    print(report(result))
    out = args.out or record.RESULTS / f"latency-{args.device}.json"
    record.save(out, result)
    print(f"written to {out}")
    return 1 if any("breaches" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
