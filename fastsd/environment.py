"""What machine and what versions this is: for `fastsd info`, and for the header of every benchmark."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastsd

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pillow")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """fastsd, Python and the packages, each with its version or "not installed"."""
    return {"fastsd": fastsd.__version__, "python": platform.python_version()} | {
        name: _version(name) for name in packages
    }


def cpu() -> str:
    """The CPU's name, its logical cores and how many threads PyTorch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used"


def gpus() -> list[str]:
    """Each CUDA device: name, compute capability, memory, CUDA and driver."""
    if not torch.cuda.is_available():
        return []
    driver = _driver()
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            f"cuda:{index} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}, driver {driver}"
        )
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The NVIDIA driver's version; PyTorch does not tell it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer[0] if answer else "unknown"
