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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import torch
import triton

from bench import record
from bench.shapes import MODELS, Call, trace
from fastsd.kernels import flash_attn, geglu, gemm, groupnorm_silu, layernorm
from fastsd.kernels.launch import Launch

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
TENSOR_CORES = {"linear_kernel", "geglu_kernel", "attention_kernel"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Job:
    """One launch of one call, for one architecture."""

    call: Call
    index: int
    arch: int


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
        if self.shared > SHARED[self.arch]:
            return f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {SHARED[self.arch]}"
        if self.arch == 90 and self.kernel in TENSOR_CORES and not self.hgmma:
            return "no HGMMA: not on sm_90's tensor cores"
        return None


def plan(call: Call, arch: int, dtype: torch.dtype = torch.float16) -> list[Launch]:
    """The launches of one call; none for an op that has no kernel yet."""
    arguments, options = call.meta(dtype)
    if call.op == "linear":
        return plan_linear(arch, *arguments, **options)
    if call.op == "geglu":
        x, w, b = arguments
        return geglu.plan_geglu(
            x, w, b, torch.empty((*x.shape[:-1], w.shape[0] // 2), dtype=dtype, device="meta"), arch
        )
    if call.op == "attention":
        return plan_attention(arch, *arguments, **options)
    if call.op == "group_norm":
        return plan_group_norm(*arguments, **options)
    if call.op == "layer_norm":
        x, w, b, eps = arguments
        return layernorm.plan_layer_norm(x, w, b, eps, torch.empty_like(x))
    return []


def plan_group_norm(
    x: Any, w: Any, b: Any, groups: int, eps: float, silu: bool = False, skip: Any = None
) -> list[Launch]:
    out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=x.dtype, device="meta")
    return groupnorm_silu.plan_group_norm(x, w, b, groups, eps, silu, skip, out)


def plan_attention(arch: int, q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> list[Launch]:
    return flash_attn.plan_attention(q, k, v, mask, causal, torch.empty_like(q), shared=SHARED[arch])


def plan_linear(arch: int, x: Any, w: Any, b: Any = None, residual: Any = None, activation: Any = None) -> list[Launch]:
    out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=x.dtype, device="meta")
    return gemm.plan_linear(x, w, b, residual, activation, out, arch)


def jobs(models: list[str], pixels: int, archs: list[int]) -> Counter[Job]:
    """One job for each different kernel, and how many launches use it."""
    calls: Counter[Call] = Counter()
    for name in models:
        calls.update(sum(trace(MODELS[name], pixels).values(), Counter()))
    first: dict[tuple[Any, ...], Job] = {}
    uses: Counter[Job] = Counter()
    for call, count in calls.items():
        for arch in archs:
            for index, launch in enumerate(plan(call, arch)):
                job = first.setdefault((arch, *identity(launch)), Job(call, index, arch))
                uses[job] += count
    return uses


def identity(launch: Launch) -> tuple[Any, ...]:
    """What decides the compiled code."""
    source = launch.source()
    types = tuple(sorted(source.signature.items()))
    aligned = tuple(sorted(source.attrs))
    constants = tuple(sorted((name, str(value)) for name, value in launch.constants.items()))
    return launch.kernel.__name__, types, aligned, constants, launch.num_warps, launch.num_stages


def compile_job(job: Job, uses: int) -> Compiled:
    launch = plan(job.call, job.arch)[job.index]
    binary = launch.compile(job.arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name) if job.arch == 90 else ""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    blocks = [str(value) for key, value in launch.constants.items() if key.startswith("BLOCK")]
    constants = launch.constants
    extras = [name for name in ("HAS_BIAS", "HAS_RESIDUAL") if constants.get(name)]
    extras += [str(constants["ACTIVATION"])] if constants.get("ACTIVATION") else []
    extras += [f"split {constants['SPLIT_K']}"] if constants.get("SPLIT_K", 1) > 1 else []
    epilogue = "".join(f" +{extra.removeprefix('HAS_').lower()}" for extra in extras)
    size = "x".join(str(launch.constants[key]) for key in ("N", "N2", "K", "D") if key in launch.constants)
    return Compiled(
        arch=job.arch,
        kernel=launch.kernel.__name__,
        config=f"{size} | {'x'.join(blocks)} w{launch.num_warps} s{launch.num_stages}{epilogue}",
        registers=numbers["REG"],
        spilled=numbers.get("LOCAL", 0) + numbers.get("STACK", 0),
        shared=binary.metadata.shared,
        hgmma=sass.count("HGMMA"),
        uses=uses,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--arch", type=int, choices=SHARED, action="append", help="default: all")
    parser.add_argument("--fast", action="store_true", help="the most used kernels only, for the test suite")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    start = time.perf_counter()
    todo = jobs(args.model or list(MODELS), args.size, args.arch or list(SHARED)).most_common(8 if args.fast else None)
    with ProcessPoolExecutor(args.workers) as pool:
        done = list(pool.map(compile_job, *zip(*todo, strict=True)))
    done.sort(key=lambda one: (one.kernel, one.config, one.arch))
    rows = [["kernel", "arch", "N x K, or D | tile", "registers", "spilled", "shared", "HGMMA", "launches", ""]]
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
