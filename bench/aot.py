"""`python -m bench.aot`: compile every kernel that the models' shapes choose, for GPUs that need not be here.

For each: registers, spills, shared memory, and on sm_90 the wgmma (HGMMA) instructions in the SASS. Fails on a spill, on shared
memory beyond the architecture's, or on a GEMM without HGMMA on sm_90: the interpreter sees none of these.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import torch
import triton

from bench import record
from bench.shapes import MODELS, Call, trace
from fastsd import launches
from fastsd.kernels.launch import SHARED_MEMORY, TYPE_NAMES, Launch

NATIVE = {"sd15": 512, "sd21": 768, "sdxl": 1024}
"""Pixels that the models were trained for."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TENSOR_CORES = {"linear_kernel", "geglu_kernel", "attention_kernel", "conv_kernel"}
GEOMETRY = ("N", "N2", "K", "C", "R", "C1", "C2", "D")
EXTRAS = ("HAS_BIAS", "HAS_CHANNEL_BIAS", "HAS_RESIDUAL", "STATISTICS", "CAUSAL", "SILU")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Job:
    """One launch of one call, for one architecture."""

    call: Call
    index: int
    arch: int
    dtype: torch.dtype
    mask: str | None  # of an attention


@dataclass(frozen=True)
class Compiled:
    arch: int
    kernel: str
    config: str
    registers: int
    spilled: int
    shared: int
    hgmma: int
    uses: int

    @property
    def breach(self) -> str | None:
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_MEMORY[self.arch]}"
        if self.arch == 90 and self.kernel in TENSOR_CORES and not self.hgmma:
            return "no HGMMA: not on sm_90's tensor cores"
        return None


def plan(call: Call, arch: int, dtype: torch.dtype, mask: str | None = None) -> list[Launch]:
    """The launches of one call."""
    arguments = call.empty(dtype)
    if mask is not None:
        size = (call.result[0], 1, 1, arguments["k"].shape[1])
        arguments["mask"] = torch.empty(size, dtype=torch.bool if mask == "boolean" else dtype, device="meta")
    return launches.plan(call.op, arch, arguments)[0]


def long_prompts(calls: Counter[Call]) -> Counter[Call]:
    """The cross-attentions again with the keys of prompts of two and three chunks of 77 tokens."""
    found: Counter[Call] = Counter()
    for call in calls:
        if call.op == "attention" and call.named()["k"][1] == 77 != call.named()["q"][1]:
            q, k, *rest = call.arguments
            for keys in (154, 231):
                longer = torch.Size((k[0], keys, *k[2:]))
                found[replace(call, arguments=(q, longer, longer, *rest[1:]))] += 1
    return found


def jobs(models: list[str], pixels: int | None, archs: list[int], dtypes: list[torch.dtype]) -> Counter[Job]:
    """One job for each different kernel, and how many launches use it."""
    calls: Counter[Call] = Counter()
    for name in models:
        calls.update(sum(trace(MODELS[name], pixels or NATIVE[name]).values(), Counter()))
    calls.update(long_prompts(calls))
    masks = {call: (None, "boolean", "additive") if may_be_masked(call) else (None,) for call in calls}
    first: dict[tuple[Any, ...], Job] = {}
    uses: Counter[Job] = Counter()
    for arch, dtype, (call, count) in product(archs, dtypes, calls.items()):
        for mask in masks[call]:
            for index, launch in enumerate(plan(call, arch, dtype, mask)):
                job = first.setdefault((arch, *launches.identity(launch)), Job(call, index, arch, dtype, mask))
                uses[job] += count
    return uses


def may_be_masked(call: Call) -> bool:
    """Attention to a text: the VAE's and a picture's to itself never are."""
    return call.op == "attention" and call.named()["k"][1] <= 231 and not call.named().get("causal")


def compile_job(job: Job, uses: int) -> Compiled:
    launch = plan(job.call, job.arch, job.dtype, job.mask)[job.index]
    binary = launch.compile(job.arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name) if job.arch == 90 else ""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        arch=job.arch,
        kernel=launch.kernel.__name__,
        config=f"{TYPE_NAMES[job.dtype]} {describe(launch)}",
        registers=numbers["REG"],
        spilled=numbers.get("LOCAL", 0) + numbers.get("STACK", 0),
        shared=binary.metadata.shared,
        hgmma=sass.count("HGMMA"),
        uses=uses,
    )


def describe(launch: Launch) -> str:
    """Geometry | tile, warps, stages, and what else is compiled in."""
    constants = launch.constants
    geometry = [f"{name} {constants[name]}" for name in GEOMETRY if constants.get(name)]
    tile = "x".join(
        str(value) for name, value in constants.items() if name.startswith(("BLOCK", "TAIL", "TILES")) and value
    )
    extras = [name.removeprefix("HAS_").lower() for name in EXTRAS if constants.get(name)]
    extras += [str(constants[name]) for name in ("ACTIVATION", "MASK") if constants.get(name)]
    extras += [
        f"{name.lower()} {constants[name]}" for name in ("SPLIT_K", "PHASES", "STRIDE") if constants.get(name, 1) > 1
    ]
    return f"{' '.join(geometry)} | {tile} w{launch.num_warps} s{launch.num_stages}" + "".join(f" +{e}" for e in extras)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--size", type=int, help="pixels (default: what each model was trained for)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--arch", type=int, choices=SHARED_MEMORY, action="append", help="default: all")
    parser.add_argument("--fast", action="store_true", help="the most used kernels only, for the test suite")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    start = time.perf_counter()
    models, archs = args.model or list(MODELS), args.arch or list(SHARED_MEMORY)
    dtypes = [DTYPES[name] for name in args.dtype or DTYPES]
    todo = jobs(models, args.size, archs, dtypes).most_common(8 if args.fast else None)
    with ProcessPoolExecutor(args.workers) as pool:
        done = list(pool.map(compile_job, *zip(*todo, strict=True)))
    done.sort(key=lambda one: (one.kernel, one.config, one.arch))
    rows = [["kernel", "arch", "geometry | tile", "registers", "spilled", "shared", "HGMMA", "launches", ""]]
    for one in done:
        numbers = (one.registers, one.spilled, one.shared, one.hgmma, one.uses)
        rows.append([one.kernel, f"sm_{one.arch}", one.config, *map(str, numbers), one.breach or ""])
    print(record.table(rows))
    breaches = sum(one.breach is not None for one in done)
    print(
        f"{len(done)} kernels compiled in {time.perf_counter() - start:.0f} s, {breaches} breaches, triton {triton.__version__}"
    )
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
