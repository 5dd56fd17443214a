"""`python -m bench.machine --out environment.json`: the machine as it stands before anything is measured on it."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import record

QUERY = (
    *("index", "name", "driver_version", "compute_cap", "pstate", "persistence_mode", "temperature.gpu"),
    *("power.draw", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("memory.total", "memory.used", "utilization.gpu"),
)
"""What nvidia-smi is asked: it refuses the whole question for one field that it does not know."""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "diffusers",
    "transformers",
    "pytest",
    "hypothesis",
    "matplotlib",
)


def environment() -> dict[str, Any]:
    """The header of every result, and of each GPU what PyTorch and the driver say."""
    return record.header(PACKAGES) | {
        "cuda": {"runtime": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "devices": [described(index) for index in range(torch.cuda.device_count())],
        "driver": driver(),
    }


def described(index: int) -> dict[str, Any]:
    """One CUDA device by its properties; bytes as bytes."""
    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "memory_bytes": total,
        "memory_free_bytes": free,
    }


def driver() -> list[dict[str, str]] | str:
    """A GPU's row of nvidia-smi by the names of the fields, clocks and power among them; or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        return f"nvidia-smi: {(done.stderr or done.stdout).strip()[:300]}"
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(QUERY, map(str.strip, row), strict=False)) for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    found = environment()
    record.save(args.out, found)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
