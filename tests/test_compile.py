"""`fastsd compile`: what it puts into Triton's cache is what a generation looks for, with a GPU that is only named. And when a
Pipeline has it done: which sizes, in how many processes, what becomes of a failure."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from typer.testing import CliRunner

import fastsd
from bench.record import ROOT
from fastsd import cli, compiling, launches
from fastsd.compiling import Target
from fastsd.config import SD15, SD21
from fastsd.errors import ParameterError
from fastsd.kernels import tuned
from fastsd.kernels.launch import Launch
from fastsd.ops import REFERENCE, Ops
from tests.small_model import SMALL_MODEL

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
    """A model of one level and one layer: the small one's folder, its JSON made smaller."""
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
    for path in SMALL_MODEL.rglob("*"):
        target = folder / path.relative_to(SMALL_MODEL)
        if path.is_dir():
            target.mkdir()
        elif path.name == "config.json":
            config = json.loads(path.read_text()) | changes.get(path.parent.name, {})
            target.write_text(json.dumps(config))
        else:
            target.symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def compiled(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the command has filled for that model."""
    tmp_path = tmp_path_factory.mktemp("triton")
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "fastsd", "compile", "--arch", "sm_90", "--model", str(micro)]
    command += ["--cache-dir", str(cache), "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path / "other"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, new = map(int, re.findall(r"(\d+) (?:kernels|of them new)", done.stdout))
    assert kernels == new > 40
    assert str(cache) in done.stdout
    assert not (tmp_path / "other").exists()
    assert len(list(cache.rglob("*.cubin"))) == kernels
    return cache


def test_what_was_compiled_is_not_compiled_again(micro: Path, compiled: Path) -> None:
    """Every stage, through the kernels' own wrappers, in another process."""
    code = f"""
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
target = compiling.check_target('sm_90', model={str(micro)!r})
for guided in (True, False):
    tracing.run_stages(target.nets, lambda stage: backends.triton_ops(), target.dtype, height=target.height, width=target.width,
                       images=1, guided=guided, prompts=2 if guided else 1, steps=[20])
print(len(hits), hits.count(False))
"""
    looked_up, missed = map(int, process(code, compiled).split())
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
pipe.encode_image(torch.zeros(128, 128, 3).numpy())
print(len(planned), len(asked), *sorted(name for name, _ in asked - planned))
asked.clear()
pipe.generate('a star', num_inference_steps=2, tiling='x')
wrapping = frozenset(asked)
asked.clear()
for kernel in compiling.planned(compiling.check_target('sm_90', model=str(fastsd.pipeline.BUNDLED), tiling='x')):
    kernel.warm()
print(len(wrapping - planned), *sorted(name for name, _ in wrapping - asked))
"""
    plain, seamless = (line.split() for line in process(code, tmp_path).splitlines())
    planned, asked, *others = plain
    assert others == []
    assert int(planned) >= int(asked) > 90
    new, *others = seamless
    assert others == []
    assert int(new) > 20, "convolutions whose edges meet are kernels of their own"


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


# Ahead of a Pipeline's first launch.

SMALL = Target(SD15, 90, torch.float16, 64, 48, 1)
OTHER: dict[str, Any] = {"nets": SD21, "arch": 80, "dtype": torch.float32}
FAST: dict[str, Any] = {"width": 16, "num_inference_steps": 1, "seed": 0}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No interpreter, an sm_90 that is only named, nothing asked before; its empty cache."""
    # Before the variable goes, or what is restored is False.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiling, "_settled", set())
    return tmp_path


@pytest.fixture
def started(outside: Path, monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """What processes would have compiled: each only leaves the stamp."""
    targets: list[Target] = []

    def run(command: list[str], *, input: bytes, **_: Any) -> subprocess.CompletedProcess[bytes]:
        stream = io.BytesIO(input)
        assert pickle.load(stream) == sys.path
        target, jobs, cache_dir = pickle.load(stream)
        assert (command[0], jobs, cache_dir) == (sys.executable, os.cpu_count(), outside)
        targets.append(target)
        compiling.stamp(target).parent.mkdir(parents=True, exist_ok=True)
        compiling.stamp(target).touch()
        return subprocess.CompletedProcess(command, 0, b"noise\n3 2 1.5\n", b"")

    monkeypatch.setattr(subprocess, "run", run)
    return targets


def drawing(monkeypatch: pytest.MonkeyPatch, ops: str = "triton", device: str = "cuda") -> fastsd.Pipeline:
    """The small model on plain PyTorch, which goes by another name, and believes itself elsewhere where it compiles."""

    def elsewhere(nets: Any, ops: Ops, _: torch.device, *rest: Any, **options: Any) -> None:
        real(nets, ops, torch.device(device), *rest, **options)

    real: Callable[..., None] = compiling.prepare
    monkeypatch.setattr(compiling, "prepare", elsewhere)
    return fastsd.Pipeline(SMALL_MODEL, device="cpu", backend=replace(REFERENCE, name=ops))


def test_a_fresh_process_compiles_what_the_cache_lacks(
    micro: Path, compiled: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(compiled, outside, dirs_exist_ok=True)
    target = compiling.check_target("sm_90", model=str(micro))
    assert compiling.stamp(target).exists(), "the command left none"
    compiling.stamp(target).unlink()
    for cubin in list(outside.rglob("*.cubin"))[:3]:
        shutil.rmtree(cubin.parent)
    count = len(list(compiled.rglob("*.cubin")))
    with caplog.at_level(logging.INFO, "fastsd"):
        compiling.compile_ahead(target)
        monkeypatch.setattr(subprocess, "run", None)
        compiling.compile_ahead(target)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.endswith(f"for 1 images of 8x8 in up to {os.cpu_count()} processes")
    assert last.startswith(f"3 of {count} kernels were new, in ")
    assert len(list(outside.rglob("*.cubin"))) == count
    assert compiling.compiled_before(replace(target, height=16))


def test_a_size_is_compiled_once(started: list[Target], caplog: pytest.LogCaptureFixture) -> None:
    """However many threads ask for it."""
    with caplog.at_level(logging.INFO, "fastsd"), ThreadPoolExecutor(4) as threads:
        list(threads.map(compiling.compile_ahead, [SMALL] * 4))
    assert started == [SMALL]
    assert [record.getMessage() for record in caplog.records][1:] == ["2 of 3 kernels were new, in 2 s"]
    assert compiling.compiled_before(SMALL)
    assert not any(compiling.compiled_before(replace(SMALL, **{name: value})) for name, value in OTHER.items())
    larger = replace(SMALL, images=2)
    assert compiling.compiled_before(larger)
    compiling.compile_ahead(larger)
    assert started == [SMALL, larger]


@pytest.mark.parametrize(
    ("file", "counts"),
    [("kernels/gemm.py", True), ("kernels/configs/sm_80.json", True), ("models/unet.py", True), ("cli.py", False)],
)
def test_a_changed_source_forgets_the_stamps(
    file: str, counts: bool, started: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling.compile_ahead(SMALL)
    copy = tmp_path / "copy"
    shutil.copytree(compiling.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(compiling, "PACKAGE", copy)
    assert compiling.compiled_before(SMALL), "the same sources elsewhere"
    with (copy / file).open("a") as changed:
        changed.write("\n")
    compiling._hash.cache_clear()
    assert compiling.compiled_before(SMALL) is not counts


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; print('first'); sys.exit('one\\nthe last line')", "the last line"),
        ("import sys; sys.exit(3)", "returned non-zero exit status 3"),
        ("print('no numbers')", "not enough values"),
        ("", "No such file"),  # no Python either
    ],
)
def test_a_failure_is_one_warning(
    code: str, told: str, outside: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the picture is drawn; it is not tried again, even at another size."""
    monkeypatch.setattr(compiling, "FRESH", code)
    if not code:
        monkeypatch.setattr(sys, "executable", str(outside / "no-python"))
    pipe = drawing(monkeypatch)
    for height in (16, 32):
        pipe.generate("a star", height=height, **FAST)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert message.startswith("kernels are compiled when launched, not ahead: ")
    assert told in message
    assert "\n" not in message


def test_a_pipeline_compiles_before_its_first_picture_and_for_each_size_of_a_warmup(
    started: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = drawing(monkeypatch)

    def sizes() -> list[tuple[int, int, int]]:
        assert {(target.nets, target.arch, target.dtype) for target in started} == {(pipe.config, 90, pipe.dtype)}
        return [(target.height, target.width, target.images) for target in started]

    for height in (16, 16, 24):
        pipe.generate(["a star", "a circle"], height=height, **FAST)
    assert sizes() == [(16, 16, 2)]
    for _ in range(2):
        pipe.warmup([(16, 32), (32, 16)], num_images_per_prompt=2, guidance=True)
        assert sizes() == [(16, 16, 2), (16, 32, 2), (32, 16, 2)]
    compiling._settled.clear()  # as in the next process
    pipe.generate("a star", height=24, **FAST)
    assert len(started) == 3, "the model was compiled before"
    pipe.warmup(guidance=False)
    assert sizes()[3:] == [(64, 64, 1)]


def test_what_was_asked_costs_no_file(started: list[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = drawing(monkeypatch)
    pipe.generate("a star", height=16, **FAST)
    monkeypatch.setattr(compiling, "stamp", None)
    pipe.generate("a star", height=16, **FAST)
    assert len(started) == 1


@pytest.mark.parametrize(
    ("size", "images", "message"),
    [
        ((62, 64), 1, "height: 62 is not a multiple of 4"),
        ((64, "64"), 1, "width"),
        ((0, 64), 1, "height: 0"),
        ((64, [64]), 1, "width"),
        ((8192, 8192), 1, "budget"),
        ((64, 64), 257, "num_images_per_prompt: 257"),
    ],
)
def test_a_size_that_is_refused_is_not_compiled(
    size: tuple[Any, Any], images: int, message: str, started: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParameterError, match=message):
        drawing(monkeypatch).warmup([size], num_images_per_prompt=images)
    assert started == []


@pytest.mark.parametrize(
    ("ops", "device", "major", "interpret"),
    [("triton", "cpu", 9, 0), ("reference", "cuda", 9, 0), ("triton", "cuda", 7, 0), ("triton", "cuda", 9, 1)],
)
def test_elsewhere_nothing_is_compiled(
    ops: str, device: str, major: int, interpret: int, started: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs, by the reference, on a GPU that is not known, in the interpreter."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", bool(interpret))
    drawing(monkeypatch, ops, device).warmup([(16, 16)], guidance=True)
    assert started == []


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

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ParameterError, match="TRITON_INTERPRET"):
        compiling.check_target("sm_90", preset="sd15")
