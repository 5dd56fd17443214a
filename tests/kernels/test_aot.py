"""The compiler's gates: what the interpreter cannot see. The whole table is `python -m bench.aot`."""

import os
import subprocess
import sys

import pytest

from bench.record import ROOT


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_most_used_kernels_compile_within_their_gates(arch: str) -> None:
    """In a process without the interpreter: no spill, shared memory within the architecture's, HGMMA on sm_90."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--model", "sd15", "--arch", arch, "--fast"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kernels compiled" in done.stdout
    assert "linear_kernel" in done.stdout


def test_the_gates_see_what_they_should() -> None:
    """A kernel of one tile too many spills, wants too much shared memory, or has no tensor-core instruction."""
    code = (
        "import torch\n"
        "from bench import aot, shapes\n"
        "from fastsd.kernels import gemm\n"
        "size = torch.Size\n"
        "x, w, b = size((4096, 512)), size((512, 512)), size((512,))\n"
        "call = shapes.Call('linear', (x, w, b, x), (), x)\n"
        "configs = {'spills': (128, 256, 64, 4, 2), 'shared memory': (128, 128, 64, 8, 9)}\n"
        "for says, config in configs.items():\n"
        "    gemm.choose_config = lambda *_: gemm.Config(*config)\n"
        "    breach = aot.compile_job(aot.Job(call, 0, 90, torch.float16, None), 1).breach\n"
        "    assert breach and says in breach, (says, breach)\n"
        "slow = aot.Compiled(90, 'linear_kernel', '', 100, 0, 1000, 0, 1)\n"
        "assert 'HGMMA' in slow.breach\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
