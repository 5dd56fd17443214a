"""`fastsd compile`: what it puts into Triton's cache is what a generation looks for, with a GPU that is only named."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.record import ROOT
from fastsd import cli, compiling, launches
from fastsd.errors import ParameterError
from fastsd.kernels import tuned
from fastsd.kernels.launch import Launch
from fastsd.pipeline import BUNDLED

# An sm_90 that is only named, and the kernels' wrappers on tensors that are on no GPU: a launch ends at Triton's cache.
STAND_IN = """
import sys, torch, triton
from pathlib import Path
from triton.runtime import driver
from fastsd import backends, compiling, tracing
from fastsd.kernels import flash_attn, launch
driver.set_active(compiling.Named(90))
flash_attn._check_tensors = lambda *_: None
flash_attn._shared = lambda _: launch.SHARED_MEMORY[90]
def run(self):
    self.warm()
    for name in ('out_ptr', 'new_ptr'):
        if name in self.arguments:
            self.arguments[name].zero_()
launch.Launch.run = run
"""


def process(code: str, cache: Path) -> str:
    """What it printed, run without the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN + code], cwd=ROOT, env=environment(cache), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one level and one layer: the bundled one's folder, its JSON made smaller."""
    folder = tmp_path_factory.mktemp("micro")
    changes: dict[str, dict[str, Any]] = {
        "text_encoder": {"num_hidden_layers": 1},
        "unet": {
            **{"block_out_channels": [32], "layers_per_block": 1, "sample_size": 8},
            **{"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]},
        },
        "vae": {
            **{"block_out_channels": [16], "layers_per_block": 1},
            **{"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
        },
    }
    for path in BUNDLED.rglob("*"):
        target = folder / path.relative_to(BUNDLED)
        if path.is_dir():
            target.mkdir()
        elif path.name == "config.json":
            config = json.loads(path.read_text()) | changes.get(path.parent.name, {})
            target.write_text(json.dumps(config))
        else:
            target.symlink_to(path)
    return folder


def test_what_was_compiled_is_not_compiled_again(micro: Path, tmp_path: Path) -> None:
    """By the command, into an empty cache; then every stage, through the kernels' own wrappers, in another process."""
    command = [sys.executable, "-m", "fastsd", "compile", "--arch", "sm_90", "--model", str(micro)]
    command += ["--cache-dir", str(tmp_path), "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path / "other"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, new = map(int, re.findall(r"(\d+) (?:kernels|of them new)", done.stdout))
    assert kernels == new > 40
    assert str(tmp_path) in done.stdout
    assert not (tmp_path / "other").exists()
    assert len(list(tmp_path.rglob("*.cubin"))) == kernels
    code = f"""
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
target = compiling.check_target('sm_90', model={str(micro)!r})
for guided in (True, False):
    tracing.run_stages(target.nets, lambda stage: backends.triton_ops(), target.dtype, pixels=target.pixels, images=1,
                       guided=guided, prompts=2 if guided else 1, steps=[20])
print(len(hits), hits.count(False))
"""
    looked_up, missed = map(int, process(code, tmp_path).split())
    assert missed == 0
    assert looked_up > 40


def test_a_generation_launches_nothing_that_was_not_planned(tmp_path: Path) -> None:
    """The bundled model as its users run it: Triton is stopped where it would look into its cache, and its key is kept."""
    code = """
import fastsd.pipeline
asked = set()
def stop(*, key, fn, **_):
    asked.add((fn.name, str(key)))
    return True
triton.knobs.runtime.jit_cache_hook = stop
for kernel in compiling.planned(compiling.check_target('sm_90', model=str(fastsd.pipeline.BUNDLED))):
    kernel.warm()
planned = frozenset(asked)
asked.clear()
fastsd.pipeline.select_ops = lambda *_: backends.triton_ops()
pipe = fastsd.pipeline.Pipeline(device='cpu', dtype='float16')
for sampler, steps, guidance in (('euler', 20, 7.5), ('dpmpp_2m', 3, 1.0), ('ddim', 2, 2.0)):
    pipe.generate('a star', num_inference_steps=steps, guidance_scale=guidance, sampler=sampler, eta=1.0, seed=0)
pipe.encode_image(torch.zeros(64, 64, 3).numpy())
print(len(planned), len(asked), *sorted(name for name, _ in asked - planned))
"""
    planned, asked, *others = process(code, tmp_path).split()
    assert others == []
    assert int(planned) >= int(asked) > 90


def test_tuned_configs_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured config decides the kernel, and where the library was faster there is none."""
    entry = tuned.Entry("linear", "fp16", 64, "", "kernel", (64, 32, 16, 4, 2, 1), 1.0, 2.0)
    x, w = (torch.empty(64, 32, dtype=torch.float16, device="meta") for _ in range(2))
    kept: list[Launch] = []
    ops = launches.planning(90, kept.append)
    monkeypatch.setattr(tuned, "lookup", lambda problem, arch: entry)
    assert ops.linear(x, w).shape == (64, 64)
    constants = kept[0].constants
    assert [constants[f"BLOCK_{axis}"] for axis in "MNK"] == [64, 32, 16]
    assert (kept[0].num_warps, kept[0].num_stages) == (4, 2)
    kept.clear()
    monkeypatch.setattr(tuned, "lookup", lambda problem, arch: entry._replace(use="library"))
    assert ops.linear(x, w).shape == (64, 64)
    assert kept == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_12", "--preset", "sd15"], "--arch: 'sm_12' is unknown; choose one of sm_80, sm_86, sm_89, sm_90, sm_100"),
        (["--arch", "sm_90"], "give either a model or a preset (sd15, sd21)"),
        (["--arch", "sm_90", "--preset", "sd15", "--model", "x"], "give either a model or a preset"),
        (["--arch", "sm_90", "--preset", "sdxl"], "--preset: 'sdxl' is unknown"),
        (["--arch", "sm_90", "--preset", "sd15", "--dtype", "int8"], "--dtype: 'int8' is unknown"),
        (["--arch", "sm_90", "--preset", "sd15", "--size", "100"], "--size: 100 is not a multiple of 8"),
        (["--arch", "sm_90", "--preset", "sd15", "--size", "0"], "--size: 0 is out of range"),
        (["--arch", "sm_90", "--preset", "sd15", "--batch", "0"], "--batch: 0 is out of range"),
        (["--preset", "sd15"], "--arch"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["compile", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_none() -> None:
    done = CliRunner().invoke(cli.app, ["compile", "--arch", "sm_90", "--model", "no/such/folder"])
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(ParameterError, match="Triton is not installed"):
        compiling.check_target("sm_90", preset="sd15")


def test_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ParameterError, match="TRITON_INTERPRET"):
        compiling.check_target("sm_90", preset="sd15")
