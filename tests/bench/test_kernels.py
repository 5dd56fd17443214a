"""The kernel benchmark's whole way, on a tiny model in the interpreter: tables, files, tuning, and what it refuses."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from bench import kernels, record
from bench.kernel_calls import KERNELS, Kernel
from bench.kernels import main, measured_before
from bench.shapes import STAGES, Call, trace
from fastsd.config import TINY, ModelConfig
from fastsd.kernels import gemm, tuned

OTHER = tuned.Entry("conv2d", "fp16", 64, "w 1x1x3x3", "library", None, None, 3.0)
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a path for machines without a GPU")


def thinned(config: ModelConfig, pixels: int) -> dict[str, Counter[Call]]:
    """One call of each op in each stage: the interpreter is slow."""
    stages = trace(config, pixels)
    return {
        stage: Counter({call: calls[call] for call in {call.op: call for call in calls}.values()})
        for stage, calls in stages.items()
    }


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr(kernels, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(kernels, "trace", thinned)
    return ["--model", "tiny", "--size", "8", "--device", "cpu", "--configs", str(tmp_path), "--workers", "1"]


@interpreted
def test_every_op_with_a_kernel_is_timed(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result.json"
    assert main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "no measurement" in result["device"]
    assert {"commit", "versions", "gpus"} <= result.keys()
    assert {row["op"] for row in result["rows"] if "us" in row} == KERNELS.keys()
    for row in result["rows"]:
        assert ("us" in row) == (row["op"] in KERNELS)
        assert row["library_us"]["p20"] <= row["library_us"]["p50"] <= row["library_us"]["p80"]
        assert row["floor_us"] > 0
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert list(stages) == [f"tiny {stage}" for stage in STAGES]
    step = stages["tiny step"]
    assert step["calls"] == sum(thinned(TINY, 8)["step"].values())
    assert 0 < step["floor_ms"] < step["best_ms"] <= min(step["ours_ms"], step["pytorch_ms"])
    assert "tiny decode" in capsys.readouterr().out


@interpreted
def test_a_wrong_kernel_has_no_time(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = KERNELS["geglu"]
    monkeypatch.setitem(KERNELS, "geglu", Kernel(lambda **given: 1.01 * right.run(**given), *right[1:]))
    out = tmp_path / "result.json"
    assert main([*arguments, "--op", "geglu", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert all("us" not in row and "relative L2 error" in row["wrong"] for row in result["rows"])
    assert result["stages"] == [{"stage": "tiny step", "calls": 1, "wrong": 1}]
    assert "WRONG" in capsys.readouterr().out


@interpreted
def test_tuning_leaves_what_lookup_reads(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The fastest is wrong and the next one only as fast as PyTorch: that one is written, read back and then run."""
    right = KERNELS["geglu"]
    wrong, fast = (64, 64, 64, 4, 3, 1), (64, 64, 64, 4, 4, 1)
    microseconds = {wrong: 1.0, fast: 10.0}
    used: list[Any] = [None]

    def run(config: Any, **given: Any) -> torch.Tensor:
        used.append(config)
        return right.run(**given, config=config) * (1.1 if config == wrong else 1.0)

    def time(setting: kernels.Setting, timed: Any, milliseconds: int = 20) -> kernels.Times:
        return kernels.Times(*[microseconds.get(timed.keywords.get("config"), 10.0 if timed.func != run else 20.0)] * 3)

    monkeypatch.setitem(KERNELS, "geglu", Kernel(run, *right[1:]))
    monkeypatch.setattr(kernels.Setting, "time", time)
    device = kernels._device_name(torch.device("cpu"))
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    tuned.write(tmp_path / "sm_90.json", about, [OTHER])
    assert main([*arguments, "--op", "geglu", "--tune"]) == 0
    assert f"{wrong} is left out: relative L2 error" in capsys.readouterr().out
    written, entries = tuned.read(tmp_path / "sm_90.json")
    assert written == about | {"commit": record.commit()}
    assert entries.pop(0) == OTHER, "what another run measured stays"
    x, w, b = (torch.empty(size, dtype=torch.float16, device="meta") for size in ((2, 4, 64), (512, 64), (512,)))
    problem = tuned.problem("geglu", x, w, b)
    assert tuned.lookup(problem, 90, tmp_path) == tuned.Entry(*problem, "kernel", fast, 10.0, 10.0)
    assert len(entries) == 1
    assert used[-1] == gemm.Config(*fast)
    used.clear()
    assert main([*arguments, "--op", "geglu", "--tune-only"]) == 0
    assert used == [], "what is measured is measured again: a tuning that is stopped would never end"
    assert main([*arguments, "--op", "geglu", "--tune-only", "--again"]) == 0
    assert len(used) > 1


def test_entries_of_another_device_or_version_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, about = tmp_path / "sm_90.json", {"device": "a GPU", "torch": "2", "triton": "3"}
    assert measured_before(path, about) == {}
    tuned.write(path, about | {"commit": "0"}, [OTHER])
    assert measured_before(path, about) == {OTHER.problem: OTHER}
    assert capsys.readouterr().out == ""
    for key in about:
        assert measured_before(path, about | {key: "another"}) == {}
        assert "its 1 entries are dropped" in capsys.readouterr().out


@interpreted
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    for refused in (["--tune"], ["--dtype", "bf16"]):  # into fastsd's own configs; what the interpreter cannot do
        with pytest.raises(SystemExit):
            main(["--device", "cpu", *refused])
