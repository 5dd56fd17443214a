"""`python -m bench.kernels --model sd15 --size 512`: each call of a model's nets by fastsd's kernel, beside PyTorch and a floor.

A call is timed alone in a CUDA graph, so without the CPU's share, and again and again on the same tensors: what fits L2 stays
there, and a small call may beat its floor. PyTorch's time is the reference op's (cuBLAS, cuDNN, SDPA and what follows them).
No time is reported of a kernel whose result is wrong. `--tune` first times every candidate config, and writes the fastest to
fastsd/kernels/configs, from where it is chosen; what it wrote stays if it is stopped.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import triton
from triton.testing import do_bench_cudagraph

from bench import record
from bench.kernel_calls import BUILD_ERRORS, KERNELS, draw, fault, library, truth_of
from bench.roofline import GPUS, floor, shape_of
from bench.shapes import MODELS, Call, trace
from fastsd.kernels import tuned
from fastsd.kernels.launch import Launch, arch_of
from fastsd.ops import Ops

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Times(NamedTuple):
    """Microseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Setting:
    """Where and in what the calls are run."""

    device: torch.device
    dtype: torch.dtype
    gpu: str
    configs: Path

    @property
    def arch(self) -> int:
        return arch_of(self.device)

    def time(self, run: Callable[[], Any], milliseconds: int = 20) -> Times:
        """In graphs of so many milliseconds; on the CPU the wall clock of one run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # graphs run on a stream of their own
            return Times(*(1e3 * t for t in do_bench_cudagraph(run, rep=milliseconds, quantiles=[0.2, 0.5, 0.8])))
        start = time.perf_counter()
        run()
        return Times(*[1e6 * (time.perf_counter() - start)] * 3)


@torch.no_grad()
def measure(call: Call, setting: Setting) -> dict[str, Any]:
    """One row. "us" is left out where the op has no kernel; "wrong" stands in its place where the result is."""
    arguments = draw(call, setting.dtype, setting.device)
    plain = library(call.op, arguments)
    row: dict[str, Any] = {"op": call.op, "shapes": shape_of(call), "floor_us": 1e6 * floor(call, GPUS[setting.gpu])}
    if call.op in KERNELS:
        kernel = KERNELS[call.op]
        entry = tuned.lookup(tuned.problem(call.op, **arguments), setting.arch, setting.configs)
        config = kernel.config(*entry.config) if entry is not None and entry.config is not None else None
        run = partial(kernel.run, **arguments, config=config)
        why = fault(call.op, run, truth_of(call.op, arguments), plain())
        row |= {"config": config} | ({"wrong": why} if why else {"us": setting.time(run)._asdict()})
    return row | {"library_us": setting.time(plain)._asdict()}


def report(stage: str, calls: Counter[Call], measured: dict[Call, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The table of a stage, the costliest calls first, and its sums in milliseconds, which a wrong kernel forbids.

    What has no kernel counts with PyTorch's time in "ours"; "best" takes the faster of the two for each call.
    """
    lines = [["op", "shapes", "calls", "floor us", "ours us", "p20-p80", "PyTorch us", "ratio", "of floor"]]
    sums: Counter[str] = Counter()
    for call, count in sorted(calls.items(), key=lambda item: -item[1] * measured[item[0]]["library_us"]["p50"]):
        row = measured[call]
        least = row["floor_us"]
        ours = theirs = row["library_us"]["p50"]
        cells = ["WRONG", row["wrong"]] if "wrong" in row else ["-", "-"]
        cells += [f"{theirs:.1f}", "-", "-"]
        if "us" in row:
            low, ours, high = row["us"].values()
            cells = [f"{ours:.1f}", f"{low:.1f}-{high:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x"]
            cells += [f"{least / ours:.0%}"]
        lines.append([row["op"], row["shapes"], str(count), f"{least:.1f}", *cells])
        for name, us in {"floor": least, "ours": ours, "pytorch": theirs, "best": min(ours, theirs)}.items():
            sums[name] += count * us / 1e3
    wrong = sum("wrong" in measured[call] for call in calls)
    total = {"wrong": wrong} if wrong else {f"{name}_ms": round(value, 4) for name, value in sums.items()}
    return record.table(lines), {"stage": stage, "calls": sum(calls.values()), **total}


def _compile_only() -> None:
    """For the processes that compile: a kernel's wrapper then compiles what it would launch."""
    Launch.run = Launch.warm  # type: ignore[method-assign]


@torch.no_grad()
def warm(calls: list[Call], config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Compile a config for calls of one op; what the compiler refuses is told when it is timed."""
    for call in calls:
        arguments = call.empty(dtype, device)
        try:
            KERNELS[call.op].run(**arguments, config=config)
        except BUILD_ERRORS:
            return


def candidates(call: Call, setting: Setting) -> list[Any]:
    arguments = call.empty(setting.dtype)
    return KERNELS[call.op].candidates(setting.arch, **arguments)


@torch.no_grad()
def best(call: Call, setting: Setting) -> tuned.Entry:
    """The fastest candidate among those that give a right result, or the library."""
    arguments = draw(call, setting.dtype, setting.device)
    plain = library(call.op, arguments)
    truth, theirs = truth_of(call.op, arguments), plain()
    found: list[tuple[float, tuple[int, ...]]] = []
    for config in candidates(call, setting):
        run = partial(KERNELS[call.op].run, **arguments, config=config)
        why = fault(call.op, run, truth, theirs)
        if why is None:
            found.append((setting.time(run, milliseconds=5).p50, tuple(config)))
        else:
            print(f"    {tuple(config)} is left out: {why}")
    us, config = min(found, default=(None, None))
    library_us = setting.time(plain, milliseconds=5).p50
    use = "kernel" if us is not None and us <= library_us else "library"
    rounded = None if us is None else round(us, 2)
    return tuned.Entry(
        *tuned.problem(call.op, **arguments), use=use, config=config, us=rounded, library_us=round(library_us, 2)
    )


def measured_before(path: Path, about: dict[str, str]) -> dict[tuned.Problem, tuned.Entry]:
    """The file's entries if they were measured on the same device with the same versions; else none, and it is said."""
    if not path.exists():
        return {}
    was, entries = tuned.read(path)
    if {key: was.get(key) for key in about} != about:
        print(f"{path.name} was measured with {was}: its {len(entries)} entries are dropped")
        return {}
    return {entry.problem: entry for entry in entries}


def tune(calls: Iterable[Call], setting: Setting, workers: int, again: bool = False) -> None:
    """Time every candidate of every problem not yet measured, op by op, and keep the file of configs up with it."""
    path = setting.configs / f"sm_{setting.arch}.json"
    about = {"device": _device_name(setting.device), "torch": torch.__version__, "triton": triton.__version__}
    entries = measured_before(path, about)
    about["commit"] = record.commit()

    problems: dict[str, dict[tuned.Problem, Call]] = {}
    for call in calls:
        if call.op in KERNELS:
            problem = tuned.problem(call.op, **call.empty(setting.dtype))
            if again or problem not in entries:
                problems.setdefault(call.op, {}).setdefault(problem, call)
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_compile_only) as pool:
        for op, todo in problems.items():
            same_code: dict[tuple[str, Any], list[Call]] = {}  # or nearly: one process compiles it
            for problem, call in todo.items():
                for config in candidates(call, setting):
                    same_code.setdefault((problem.fixed, config), []).append(call)
            jobs = [
                pool.submit(warm, each, config, setting.dtype, setting.device)
                for (_, config), each in same_code.items()
            ]
            for job in jobs:
                job.result()
            print(f"{op}: {len(jobs)} configs compiled after {time.perf_counter() - start:.0f} s", flush=True)
            for number, (problem, call) in enumerate(todo.items(), 1):
                entry = entries[problem] = best(call, setting)
                tuned.write(path, about, list(entries.values()))
                figures = f"{entry.config}, {entry.us} us, PyTorch {entry.library_us} us"
                seconds = time.perf_counter() - start
                print(f"  {number}/{len(todo)} {seconds:.0f} s: {problem.size} {problem.fixed}: {figures}", flush=True)
    print(f"written to {path}")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter: no measurement"


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    ops = [field.name for field in fields(Ops) if field.name != "name"]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="again for another; default sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--op", choices=ops, action="append", help="again for another; default all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="whose floor (default h200)")
    parser.add_argument("--tune", action="store_true", help="write the fastest configs first")
    parser.add_argument("--tune-only", action="store_true", help="and measure no more than that")
    parser.add_argument("--again", action="store_true", help="tune what the configs hold already, too")
    parser.add_argument("--configs", type=Path, default=tuned.CONFIGS, help="folder of the configs (default: fastsd's)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile (default: cores)")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/kernels-<gpu>.json)")
    args = parser.parse_args(argv)
    args.tune |= args.tune_only
    if args.device == "cpu" and args.tune and args.configs == tuned.CONFIGS:
        parser.error("the interpreter's times are no measurement: give --configs another folder")
    if args.device == "cpu" and args.dtype == "bf16":
        parser.error("Triton's interpreter cannot multiply bf16 matrices")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments_of(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.kernels: no CUDA device; --device cpu runs all this in Triton's interpreter, which measures nothing"
        )
        return 2
    if args.device == "cpu" and not triton.knobs.runtime.interpret:
        print("bench.kernels: --device cpu beside a GPU needs TRITON_INTERPRET=1")
        return 2
    setting = Setting(torch.device(args.device), DTYPES[args.dtype], args.gpu, args.configs)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True  # PyTorch at its best
    name = _device_name(setting.device)
    result = record.header() | {"device": name, "dtype": args.dtype, "size": args.size, "stages": [], "rows": []}
    print(json.dumps({key: result[key] for key in ("device", "dtype", "commit", "versions")}, ensure_ascii=False))

    stages = {
        f"{model} {stage}": Counter({call: n for call, n in calls.items() if not args.op or call.op in args.op})
        for model in args.model or ["sd15"]
        for stage, calls in trace(MODELS[model], args.size).items()
    }
    different = list(dict.fromkeys(call for calls in stages.values() for call in calls))
    if args.tune:
        tune(different, setting, args.workers, args.again)
        if args.tune_only:
            return 0
    measured = {call: measure(call, setting) for call in different}
    for stage, calls in stages.items():
        if not calls:
            continue
        lines, total = report(stage, calls, measured)
        result["stages"].append(total)
        print(f"{lines}\n{json.dumps(total)}\n", flush=True)
    result["rows"] = list(measured.values())
    out = args.out or (
        record.RESULTS / f"kernels-{name.replace(' ', '-').lower()}.json" if args.device == "cuda" else None
    )
    if out is not None:
        record.save(out, result)
        print(f"written to {out}")
    return 1 if any("wrong" in row for row in measured.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
