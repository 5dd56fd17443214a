"""The compiler's gates: what the interpreter cannot see. The whole table is `python -m bench.aot`."""

import pytest

from tests.kernels.case import run_compiled


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_most_used_kernels_compile_within_their_gates(arch: str) -> None:
    """In a process without the interpreter: no spill, shared memory within the architecture's, HGMMA on sm_90."""
    done = run_compiled("-m", "bench.aot", "--model", "sd15", "--arch", arch, "--fast")
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
    done = run_compiled("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sizes_of_one_compile() -> None:
    """Triton makes a constant of an integer that is 1: what may be called on a value must also be there on a constant."""
    code = (
        "import torch\n"
        "from fastsd.kernels import conv2d, conv2d_norm, flash_attn, gemm, groupnorm_silu, sampler_step\n"
        "def meta(*shape, dtype=torch.float16):\n"
        "    return torch.empty(shape, dtype=dtype, device='meta')\n"
        "config, fp32 = gemm.Config(64, 64, 64, 4, 3, 2), torch.float32\n"
        "x, w, b, pixel = meta(1, 16), meta(1, 16), meta(64), meta(1, 1, 1, 64)\n"
        "launches = gemm.plan_linear(x, w, None, None, None, meta(1, 1), 90, config)\n"
        "epilogue = conv2d.Epilogue(b, meta(1, 64), pixel)\n"
        "launches += conv2d.plan_conv2d(pixel, meta(64, 3, 3, 64), 1, (1,) * 4, epilogue, pixel, 90, config)\n"
        "sums = conv2d_norm.plan_conv2d_norm(\n"
        "    pixel, meta(64, 3, 3, 64), b, None, b, b, 32, 1e-5, pixel, 90, config\n"
        ")\n"
        "assert [launch.kernel.__name__ for launch in sums] == ['conv_kernel', 'add_parts_norm_kernel']\n"
        "launches += sums\n"
        "launches += conv2d.plan_upsample_conv2d(pixel, meta(4, 64, 2, 2, 64), b, meta(1, 2, 2, 64), 90)\n"
        "chunks = groupnorm_silu.choose_chunks(1, 1, 64)\n"
        "for way in (None, chunks):\n"
        "    launches += groupnorm_silu.plan_group_norm(pixel, b, b, 32, 1e-5, True, None, pixel, way)\n"
        "launches += flash_attn.plan_attention(pixel, pixel, pixel, None, False, pixel)\n"
        "state, row = meta(1, 1, 1, 1, 4, dtype=fp32), meta(1, 1, 1, 3, dtype=fp32)\n"
        "step, rows = meta(3, dtype=torch.int32), meta(1, 1, dtype=torch.int32)\n"
        "launches += sampler_step.plan_step_input(state, meta(1, 1, 1, dtype=fp32), x, rows, step, state[0], x)\n"
        "launches += sampler_step.plan_sampler_step(state, state[0], None, row, meta(1, dtype=fp32), step, state)\n"
        "ones = [sum(value == 1 for value in launch.arguments.values() if type(value) is int) for launch in launches]\n"
        "assert sum(ones) >= 15, ones\n"
        "for launch in launches:\n"
        "    launch.compile(90)\n"
    )
    done = run_compiled("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
