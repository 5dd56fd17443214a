"""The latency benchmark's whole way on the bundled model, and what it refuses to report."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastsd
from bench import contest, ladder, latency, peers, plot, random_model
from bench.contest import compared, figures, take_turns, work
from bench.ladder import ORDER, Engine
from bench.roofline import operations
from bench.shapes import trace
from bench.workloads import Case, Contender, Drawn, Inputs, picture_gate, step_gate
from fastsd.config import TINY
from fastsd.ops import REFERENCE, Ops
from tests.small_model import SMALL_MODEL

CASE = Case("toy", str(SMALL_MODEL), 64, steps=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOLD = {"peak_memory_mib": 7, "first_image": {"load_s": 1.0, "first_s": 2.0}}
PEERS = ["diffusers", "diffusers channels_last"]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets PyTorch's threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One real run, with one real process of its own."""
    alone, out = contest.alone, tmp_path_factory.mktemp("latency") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "alone", lambda case, key, n: alone(case, key, n) if key == "fastsd" else TOLD)
        arguments = "--model bundled --device cpu --steps 2 --runs 1 --against diffusers --ladder --plot --threads 2"
        assert latency.main([*arguments.split(), "--out", str(out)]) == 0
    return json.loads(out.read_text()), out


def test_every_figure_of_every_contender_is_there(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    assert {"date", "commit", "cpu", "gpus", "versions", "threads", "load_before"} <= result.keys()
    (row,) = result["rows"]
    assert row["name"] == "bundled model, 128x128, batch 1, 2 steps, fp32"
    assert "folder" not in row["case"]
    assert row["failed"] == {}
    everyone = {"fastsd", "fastsd reference", *PEERS}
    for part in ("milliseconds", "stages_ms", "speed", "peak_memory_mib", "first_image", "parity"):
        assert row[part].keys() == everyone, part
    assert row["milliseconds"]["fastsd"]["contender"] == f"fastsd {fastsd.Pipeline(SMALL_MODEL, device='cpu').ops.name}"
    for key in everyone:
        total, stage, speed = row["milliseconds"][key], row["stages_ms"][key], row["speed"][key]
        assert 0 < total["p20"] <= total["p50"] <= total["p80"]
        assert list(stage) == ["text", "step", "decode"]
        assert stage["text"]["p50"] + 2 * stage["step"]["p50"] + stage["decode"]["p50"] < 1.05 * total["p50"]
        assert speed["iterations_per_second"] == pytest.approx(1e3 / stage["step"]["p50"], rel=1e-2)
        assert 0 < speed["tflops"]["total"] < speed["tflops"]["step"] + speed["tflops"]["decode"]
        assert "of_floor" not in speed, "a CPU has none"
    assert row["oracle"] == "diffusers"
    assert row["parity"]["diffusers"]["psnr_db"] is None, "equal to itself"
    assert row["peak_memory_mib"]["fastsd"] > 100
    assert row["first_image"]["fastsd"]["load_s"] > 0
    assert row["best_diffusers"] == min(PEERS, key=lambda key: row["milliseconds"][key]["p50"])
    assert [rung["rung"] for rung in row["ladder"]] == ["reference", "onednn"]
    assert row["ladder"][0]["p50"] == row["milliseconds"]["fastsd reference"]["p50"], "the same contender, run once"


def test_the_plot_has_two_charts(
    run: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    result, out = run
    written = out.with_suffix(".png").read_bytes()
    assert written.startswith(SIGNATURE)
    width, height = struct.unpack(">II", written[16:24])
    assert width > 1000 < 2 * height

    seen: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k)))
    (row,) = result["rows"]
    larger = row | {"case": row["case"] | {"pixels": 128}, "name": "larger"}
    del larger["best_diffusers"]
    plot.draw(result | {"rows": [row, larger, {"name": "refused", "breaches": {}}]}, tmp_path / "two.png")
    left, right = seen[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["reference", "onednn", row["best_diffusers"]]
    assert [len(line.get_xdata()) for line in right.lines] == [2, 1], "fastsd at both sizes, diffusers at one"
    with pytest.raises(ValueError, match="no row has times"):
        plot.draw(result | {"rows": []}, tmp_path / "none.png")


def test_without_matplotlib_the_figures_are_kept(
    run: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(latency, "measure", lambda *_: run[0]["rows"][0])
    out = tmp_path / "result.json"
    assert latency.main(["--model", "bundled", "--device", "cpu", "--plot", "--out", str(out)]) == 2
    assert "rows" in json.loads(out.read_text())
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "bench.latency: --plot needs matplotlib: pip install 'fastsd[bench]'"
    )


def toy(value: float, step: float = 1.0, broken_after: int | None = None) -> Any:
    """A contender whose picture has one value; it fails at a run."""
    count = 0

    def run() -> Drawn:
        nonlocal count
        count += 1
        if broken_after is not None and count > broken_after:
            raise RuntimeError("out of luck\nand more")
        return Drawn(np.full((1, 2, 2, 3), value), {"text": 1e-6, "unet": 1e-6, "decode": 1e-6})

    return lambda: Contender("a toy", run, lambda: np.full(4, step))


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        (toy(0.6), "picture: PSNR 20.0 dB, 60 asked"),
        (toy(0.5, step=1.1), "UNet step: error 1.0e-01, 1e-04 allowed"),
        (toy(float("nan")), "picture: PSNR nan dB"),
    ],
    ids=["picture", "step", "nan"],
)
def test_no_speed_beside_a_breach_of_parity(
    ours: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    everyone = {"fastsd": ours, "fastsd reference": toy(0.5), "diffusers": toy(0.5)}
    monkeypatch.setattr(contest, "makers", lambda *_: everyone)
    monkeypatch.setattr(contest, "alone", lambda *_: TOLD)
    out = tmp_path / "result.json"
    arguments = ["--model", "bundled", "--device", "cpu", "--against", "diffusers", "--runs", "1", "--plot"]
    assert latency.main([*arguments, "--out", str(out)]) == 2, "nor anything to plot"
    assert latency.main([*arguments[:-1], "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert why in row["breaches"]["fastsd"]
    assert not {"milliseconds", "stages_ms", "speed", "first_image", "peak_memory_mib", "seconds"} & row.keys()
    said = capsys.readouterr().out
    assert "PARITY BREACH fastsd" in said
    assert "it/s" not in said


def test_a_peer_that_fails_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """At any time: alone in its process, when made, where its picture is wrong, in a later turn."""
    names = ["alone", "made", "wrong", "late", "fine"]
    everyone = {"fastsd": toy(0.5), "fastsd reference": toy(0.5), "diffusers": toy(0.5)}
    everyone |= {"diffusers alone": toy(0.5), "diffusers wrong": toy(0.4), "diffusers fine": toy(0.5)}
    everyone |= {"diffusers made": toy(0.5, broken_after=0), "diffusers late": toy(0.5, broken_after=contest.DRAWS + 1)}

    def alone(case: Case, key: str, threads: int) -> dict[str, Any]:
        if key == "diffusers alone":
            raise RuntimeError("killed")
        return TOLD

    monkeypatch.setattr(peers, "names", lambda _: ["diffusers", *(f"diffusers {name}" for name in names)])
    monkeypatch.setattr(contest, "makers", lambda *_: everyone)
    monkeypatch.setattr(contest, "alone", alone)
    out = tmp_path / "result.json"
    arguments = ["--model", "bundled", "--device", "cpu", "--against", "diffusers", "--runs", "2", "--out", str(out)]
    assert latency.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failed"] == {
        "diffusers alone": "killed",
        "diffusers made": "RuntimeError: out of luck",
        "diffusers wrong": "picture: PSNR 20.0 dB, 60 asked",
        "diffusers late": "RuntimeError: out of luck",
    }
    assert row["milliseconds"].keys() == {"fastsd", "fastsd reference", "diffusers", "diffusers fine"}
    assert row["best_diffusers"] in ("diffusers", "diffusers fine")
    assert row["first_image"].keys() == row["milliseconds"].keys()
    assert "FAILED diffusers late: RuntimeError: out of luck" in capsys.readouterr().out


def test_where_fastsd_fails_there_is_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    everyone = {"fastsd": toy(0.5, broken_after=contest.DRAWS + 1), "fastsd reference": toy(0.5)}
    monkeypatch.setattr(contest, "makers", lambda *_: everyone)
    monkeypatch.setattr(contest, "alone", lambda *_: TOLD)
    out = tmp_path / "result.json"
    assert latency.main(["--model", "bundled", "--device", "cpu", "--runs", "2", "--out", str(out)]) == 1
    assert "milliseconds" not in json.loads(out.read_text())["rows"][0]
    said = capsys.readouterr().out
    assert said.count("FAILED fastsd: RuntimeError: out of luck; no speed is reported") == 1
    assert "PARITY" not in said


def test_a_process_that_fails_gives_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: no such model\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match=r"^ValueError: no such model$"):
        contest.alone(CASE, "fastsd", 1)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def noted(key: str) -> Contender:
        return Contender(key, lambda: (order.append(key), Drawn(np.zeros(1)))[1])

    times = take_turns({key: noted(key) for key in "ABC"}, 3, {})
    assert order == list("ABC") * (contest.WARM_UP + 3)
    assert {key: len(taken) for key, taken in times.items()} == {"A": 3, "B": 3, "C": 3}


def test_gates_refuse_what_is_not_finite() -> None:
    fine, broken = np.ones(4), np.array([1.0, np.nan, 1.0, 1.0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert step_gate(fine, fine, dtype) is picture_gate(fine, fine, dtype) is None
        assert step_gate(broken, fine, dtype)
        assert picture_gate(broken, fine, dtype)


def test_the_ladder_climbs_one_op_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Ops("triton", *(lambda *_: None for _ in ORDER))
    monkeypatch.setattr(ladder, "triton_ops", lambda: kernels)
    assert sorted(ORDER) == sorted(field.name for field in fields(Ops) if field.name != "name")
    assert ORDER.index("conv2d") < ORDER.index("group_norm") < ORDER.index("attention") < ORDER.index("layer_norm")

    rungs = ladder.rungs(GPU)
    assert list(rungs) == ["reference", *(f"+ {op}" for op in ORDER), "+ CUDA graphs"]
    assert rungs.pop("reference").ops(GPU) is REFERENCE
    assert rungs.pop("+ CUDA graphs") == Engine("triton", graphs=True)
    for count, engine in enumerate(rungs.values(), 1):
        assert not engine.graphs
        mixed = engine.ops(GPU)
        for position, op in enumerate(ORDER, 1):
            assert getattr(mixed, op) is getattr(kernels if position <= count else REFERENCE, op), (count, op)
    assert list(ladder.rungs(CPU)) == ["reference", "onednn"]
    known = {"fastsd": Engine("triton", graphs=True), "fastsd reference": Engine("reference")}
    keys = {label: key for label, (key, _) in latency.rungs_of(known, GPU).items()}
    assert keys["reference"] == "fastsd reference"
    assert keys["+ CUDA graphs"] == "fastsd"
    assert keys["+ geglu"] == "ladder + geglu"


def test_graphs_are_asked_for_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(fastsd, "Pipeline", lambda folder, **options: asked.append(options))
        for device in ("cuda", "cpu"):
            Engine("reference", graphs=device == "cuda").pipeline("folder", device, "float16")
    assert [options.get("graphs") for options in asked] == [True, None]

    marked = replace(REFERENCE, geglu=lambda *arguments: REFERENCE.geglu(*arguments))
    monkeypatch.setattr(ladder, "triton_ops", lambda: marked)
    pipe = Engine("reference", ("geglu",)).pipeline(str(SMALL_MODEL), "cpu", "float32")
    assert pipe.ops == replace(REFERENCE, name="reference + 1 of triton's", geglu=marked.geglu)
    assert fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference").ops is REFERENCE, "and only for that one"


def stand_in(function: Any) -> Any:
    """For `fastsd.graph.capture`: a replay computes again, from the same tensors into the same."""
    output = function()
    return SimpleNamespace(output=output, replay=lambda: output[0].copy_(function()[0]))


def test_a_gpu_starts_with_empty_caches() -> None:
    before = {name: os.environ.get(name) for name in latency.CACHES}
    with latency.empty_caches(GPU):
        folders = {os.environ[name] for name in latency.CACHES}
        assert len(folders) == 2
        assert not any(Path(folder).exists() for folder in folders)
    with latency.empty_caches(CPU):
        assert {name: os.environ.get(name) for name in latency.CACHES} == before


def test_a_graphed_forward_reads_every_new_input(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Any] = []
    monkeypatch.setattr(peers, "capture", lambda function: (captured.append(function), stand_in(function))[1])
    graphed = peers.GraphedForward(lambda x, t, context, scale: (scale * x + t + context.sum(),))
    for size in (2, 3, 2):
        for value in (1.0, 5.0):
            x, t, context = torch.full((size,), value), torch.tensor(value), torch.full((3,), value)
            (out,) = graphed(x, t, encoder_hidden_states=context, scale=10.0)
            assert torch.equal(out, torch.full((size,), 14 * value))
    assert len(captured) == 2, "once for each shape"


@pytest.mark.parametrize("sampler", [None, "Euler a"])
def test_diffusers_draws_the_same_with_random_weights(
    sampler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with its UNet behind `GraphedForward`, the capture stood in for."""
    monkeypatch.setattr(peers, "capture", stand_in)
    folder = random_model.save(tmp_path / "model", TINY, torch.float32)
    case = Case("tiny", str(folder), 16, batch=2, steps=3, sampler=sampler)
    drawn = {}
    rivals = ["diffusers", "diffusers CUDA graph"]
    for key, make in contest.makers(case, {"fastsd": Engine("reference")}, rivals).items():
        contender = make()
        contender.run()
        made = contender.run()
        assert made.array.shape == (2, 16, 16, 3)
        assert made.calls == 3
        assert contender.step is not None
        drawn[key] = made.array, contender.step()
    assert np.std(drawn["fastsd"][0]) > 0.1, "a flat picture compares nothing"
    for key in ("fastsd", "diffusers CUDA graph"):
        assert compared(case, drawn[key], drawn["diffusers"])[1] is None, key
    assert Inputs(case).rows[0].shape == (4, 4, 8, 8)


def test_work_and_floor_are_the_rooflines() -> None:
    case = replace(CASE, pixels=16, batch=2)
    amount = work(TINY, case, 5, "NVIDIA H200")
    flop = {
        stage: sum(
            count * operations(call) for call, count in trace(TINY, 16, 4 if stage == "step" else 2)[stage].items()
        )
        for stage in ("text", "prompt", "step", "decode")
    }
    assert amount["step"]["tflop"] == pytest.approx(flop["step"] / 1e12)
    assert amount["decode"]["tflop"] == pytest.approx(2 * flop["decode"] / 1e12), "two images"
    least = flop["text"] + flop["prompt"] + 5 * flop["step"] + 2 * flop["decode"]
    assert least / 1e12 < amount["total"]["tflop"] < 1.1 * least / 1e12, "and the schedule's"
    for gpu in ("NVIDIA GeForce", None):
        assert all("floor_s" not in part for part in work(TINY, case, 5, gpu).values())

    half = {stage: 2 * amount[stage]["floor_s"] for stage in amount}
    row = figures({"seconds": {"fastsd": [half]}, "contenders": {"fastsd": "ours"}, "failed": {}}, amount)
    assert row["speed"]["fastsd"]["of_floor"]["total"] == pytest.approx(0.5, rel=0.05)


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result.json"
    common = ["--device", "cpu", "--out", str(out)]
    assert (
        latency.main([*common, "--minutes", "-1", "--size", "64", "--size", "128", "--batch", "1", "--batch", "4"]) == 0
    )
    rows = json.loads(out.read_text())["rows"]
    names = ["64x64, batch 1", "64x64, batch 4", "128x128, batch 1", "128x128, batch 4"]
    assert [row["name"] for row in rows] == [
        *(f"bundled model, {name}, 20 steps, fp32" for name in names),
        *(f"SD 1.5 UNet, batch 2, 256x256, {dtype}" for dtype in ("fp32", "bf16")),
    ]
    assert all("skipped" in row for row in rows)
    capsys.readouterr()
    for wrong in (["--size", "63"], ["--sampler", "none"], ["--model", str(tmp_path / "none")]):
        assert latency.main([*common, *wrong]) == 2
        assert capsys.readouterr().out.splitlines()[-1].startswith("bench.latency: ")
    if not torch.cuda.is_available():
        assert latency.main(["--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().out
