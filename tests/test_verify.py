"""`fastsd verify`: the bundled model passes, and what is wrong is named."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import fastsd.pipeline
from fastsd import cli, verify
from fastsd.backends import select_ops, triton_ops
from fastsd.ops import Ops
from tests import tolerances
from tests.kernels.case import draw
from tests.measured import measured


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["verify", "--device", "cpu", *arguments])


def verdicts(stdout: str) -> dict[str, str]:
    """Each row's name and verdict."""
    rows = [line for line in stdout.splitlines()[2:] if line]
    for name, _, worst, _, gate, *_ in (re.split(r"\s{2,}", row) for row in rows):
        if name in verify.OPS:
            measured("relative L2", float(worst), float(gate))
    return {row.split("  ")[0].strip(): "FAILED" if "  FAILED" in row else "ok" for row in rows}


EVERYTHING = {*verify.OPS, "text encoder", "UNet step", "VAE decode", "picture"}


@pytest.mark.parametrize("options", [(), ("--dtype", "float16", "--precise")], ids=["fp32", "fp16 against fp64"])
def test_the_bundled_model_passes(options: tuple[str, ...]) -> None:
    done = invoke("--steps", "2", *options)
    assert done.exit_code == 0, done.stderr
    assert "shapes-128, 128x128, 2 steps" in done.stdout
    assert verdicts(done.stdout) == dict.fromkeys(EVERYTHING, "ok")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernels_pass_on_a_gpu(dtype: str) -> None:
    done = CliRunner().invoke(cli.app, ["verify", "--device", "cuda", "--backend", "triton", "--dtype", dtype])
    assert done.exit_code == 0, done.stdout + done.stderr


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces ops of the fast path, whichever backend is asked for, and leaves the reference as it is."""

    def break_ops(**ops: Callable[..., Any]) -> None:
        def selected(backend: str, device: torch.device) -> Ops:
            chosen = select_ops(backend, device)
            return chosen if backend == "reference" else replace(chosen, **ops)

        monkeypatch.setattr(fastsd.pipeline, "select_ops", selected)

    return break_ops


def test_a_wrong_op_is_named(wrong: Callable[..., None]) -> None:
    """One percent off: the op fails, the other ops, which get right inputs, do not."""
    right = select_ops("auto", torch.device("cpu")).layer_norm
    wrong(layer_norm=lambda *arguments: 1.01 * right(*arguments))
    done = invoke("--steps", "1")
    assert done.exit_code == 1
    found = verdicts(done.stdout)
    assert [name for name in verify.OPS if found[name] == "FAILED"] == ["layer_norm"]
    assert found["text encoder"] == found["UNet step"] == "FAILED"
    assert found["VAE decode"] == "ok", "it has no layer norm"
    assert done.stderr.startswith("fastsd: error: beyond the gate: layer_norm, text encoder")
    row = next(line for line in done.stdout.splitlines() if line.startswith("layer_norm"))
    assert "1.0e-02" in row
    assert "layer_norm" in row.split("FAILED")[1] or ".norm" in row.split("FAILED")[1], "where it was worst"


def test_a_value_that_is_not_finite_is_a_breach(wrong: Callable[..., None]) -> None:
    right = select_ops("auto", torch.device("cpu")).geglu

    def once(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = right(x, w, b)
        y.view(-1)[0] = torch.nan
        return y

    wrong(geglu=once)
    done = invoke("--steps", "1")
    assert done.exit_code == 1
    found = verdicts(done.stdout)
    assert found["geglu"] == found["UNet step"] == found["picture"] == "FAILED"
    assert found["linear"] == found["text encoder"] == "ok"
    assert "unet: a non-finite value at step 1" in done.stdout, "what the picture ended with"


def test_heads_are_compared_as_they_are_stored() -> None:
    """The kernels store 40 columns as 48: the attention is given those, and judged by the 40."""
    comparison = verify.Comparison(triton_ops(), torch.float32, torch.float64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, *weights = (draw(*shape, seed=seed).to(device) for seed, shape in enumerate([(1, 5, 32)] + 3 * [(80, 32)]))
    with torch.no_grad():
        q, k, v = comparison.ops.project_heads(x, weights, None, 2)
        out = comparison.ops.attention(q, k, v, head_dim=40)
    assert out.shape == (1, 5, 2, 40), "the reference goes on with its own"
    assert comparison.calls == {"project_heads": 1, "attention": 1}
    for op, worst in comparison.worst.items():
        assert 0 < worst.error <= verify.OPS[op][torch.float32]
        assert worst.plain is not None


def test_gates_are_no_looser_than_the_tests() -> None:
    same_gate = {"project_heads": "linear", "upsample_conv2d": "conv2d"}
    for op, gates in verify.OPS.items():
        for dtype, limit in tolerances.OPS[same_gate.get(op, op)].items():
            assert gates[dtype] <= limit
    for dtype, limit in tolerances.UNET_STEP.items():
        assert verify.NETS[dtype] <= limit
        assert 1 - verify.NETS[dtype] ** 2 / 2 >= tolerances.COSINE[dtype]
        half = tolerances.HALF_PSNR.get(str(dtype).removeprefix("torch."), tolerances.IMAGE_PSNR)
        assert verify.BUNDLED_PSNR[dtype] >= half


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: 0 is out of range"),
        (["--size", "66"], "--size: 66 is not a multiple of 8"),
        (["--backend", "fast"], "--backend: 'fast' is unknown"),
        (["--dtype", "int8"], "--dtype: 'int8' is unknown"),
        (["--seed", "-2"], "--seed: -2 is out of range"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"fastsd: error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_is_none() -> None:
    done = invoke("no/such/folder")
    assert done.exit_code == 1
    assert "no such folder" in done.stderr
