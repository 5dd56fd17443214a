"""The device kit: how time is shared out, that no stage can stop the next, and a rehearsal; the profile's sums."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device, kernels, latency, machine, profile_step
from bench.device import CONFIGS, ROOT, WEIGHTS, Report, Stage, deadlines, planned, run_stage, run_stages
from bench.device import arguments_of as device_arguments
from bench.profile_step import LAUNCHES, report, summary

SLEEP = "import time; time.sleep(60)"
STUBBORN = (  # with a child of its own, as bench.kernels has; neither heeds an interrupt
    "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    f"child = subprocess.Popen([sys.executable, '-c', '{SLEEP}']);"
    "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); print('at work', flush=True); time.sleep(60)"
)


def stage(name: str, code: str, *arguments: Any, weight: float = 1, **options: Any) -> Stage:
    return Stage(name, weight, lambda box: [sys.executable, "-c", code, *map(str, arguments)], **options)


def writing(path: Path, content: str = "{}") -> str:
    return f"import pathlib; pathlib.Path({str(path)!r}).write_text({content!r})"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_time_is_shared_out_by_weight() -> None:
    assert deadlines([1, 2, 1], 40) == [10, 30, 40]
    assert deadlines([5], 60) == [60]
    ends = deadlines(list(WEIGHTS.values()), 540)
    assert ends == sorted(ends)
    assert ends[-1] == 540


def test_what_one_stage_leaves_over_goes_to_the_next(tmp_path: Path) -> None:
    boxes = []

    def command(box: float) -> list[str]:
        boxes.append(box)
        return [sys.executable, "-c", "pass"]

    stages = [Stage(name, 1, command) for name in ("first", "second", "third")]
    assert run_stages(stages, 90, Report(tmp_path, {}, stages), os.environ)
    assert boxes[0] == pytest.approx(30, abs=0.5)
    assert 50 < boxes[1] < 60
    assert boxes[1] + 20 < boxes[2] < 90


def test_failing_and_hanging_stages_are_told_of_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And after each, the summary says how far it came."""
    seen: list[list[str]] = []

    def look() -> None:
        seen.append([row["status"] for row in read(tmp_path)["stages"]])

    good, child = tmp_path / "good.json", tmp_path / "child"
    stages = [
        stage("hanging", STUBBORN, child, before=look, weight=0.5),
        stage("failing", "print('a reason'); raise SystemExit(3)", before=look),
        stage("missing", "pass", result=tmp_path / "missing.json", before=look),
        stage("broken", writing(tmp_path / "broken.json", "{"), result=tmp_path / "broken.json", before=look),
        Stage("absent", 1, lambda box: ["no-such-program"], before=look),
        stage("good", writing(good), result=good, before=look),
        stage("inline", writing(tmp_path / "inline", '{"a": 1}'), result=tmp_path / "inline", inline=True, before=look),
    ]
    assert not run_stages(stages, 39, Report(tmp_path, {"minutes": 9}, stages), os.environ)
    found = read(tmp_path)
    assert (found["minutes"], found["ok"]) == (9, False)
    rows = {row["stage"]: row for row in found["stages"]}
    assert [rows[name]["status"] for name in ("failing", "hanging", "missing", "broken", "good", "inline")] == [
        *(
            "failed: exit code 3",
            "timed out",
            "failed: wrote no missing.json",
            "failed: wrote no broken.json",
            "ok",
            "ok",
        )
    ]
    assert rows["absent"]["status"].startswith("failed: ")
    assert "no-such-program" in rows["absent"]["status"]
    assert rows["failing"]["log_tail"] == ["a reason"]
    assert rows["hanging"]["log_tail"] == ["at work"]
    assert rows["hanging"]["seconds"] == pytest.approx(rows["hanging"]["box_s"], abs=1)
    assert (rows["good"]["result"], rows["inline"]["result"]) == ("good.json", {"a": 1})
    assert [row.count("waiting") for row in seen] == list(range(len(stages), 0, -1))
    assert seen[-1][:2] == ["timed out", "failed: exit code 3"]
    printed = capsys.readouterr().out
    for line in ("failing: failed: exit code 3", "    a reason", "hanging: timed out", "good: ok"):
        assert f"\n{line}" in f"\n{printed}"
    assert (tmp_path / "log.txt").read_text().count("===== ") == 2 * len(stages)
    assert gone(int(child.read_text())), "what a stage started ends with it"


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and not yet collected by whoever adopted it
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background"])
def test_an_interrupted_stage_may_still_write_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    """As pytest does with --results. Half of the time each: a busy machine may need seconds to start and to write."""
    monkeypatch.setattr(device, "GRACE_SHARE", 0.5)
    before = signal.signal(signal.SIGINT, handler)
    path = tmp_path / "partial.json"
    code = f"import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    {writing(path)}"
    stages = [stage("tests", code, result=path)]
    told = Report(tmp_path, {}, stages)
    try:
        run_stage(stages[0], 8, told, os.environ)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told.rows["tests"] | {"status": "timed out", "result": "partial.json"} == told.rows["tests"]


def test_a_result_of_an_earlier_run_is_none(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text("{}")
    stages = [stage("kernels", "raise SystemExit(1)", result=path)]
    assert not run_stages(stages, 30, Report(tmp_path, {}, stages), os.environ)
    assert read(tmp_path)["stages"][0]["result"] is None
    assert path.exists(), "and it stays"


def test_a_terminated_kit_takes_its_stage_with_it(tmp_path: Path) -> None:
    """The stage is pip, made to wait for ever by a named pipe in place of a wheel."""
    os.mkfifo(tmp_path / "a-1-py3-none-any.whl")
    command = [
        sys.executable,
        "-m",
        "bench.device",
        "--dry-run",
        "--stage",
        "environment",
        "--out",
        str(tmp_path / "o"),
    ]
    with subprocess.Popen([*command, "--wheels", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as kit:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not running(tmp_path / "o"):
            time.sleep(0.1)
        stages = children(kit.pid)
        kit.send_signal(signal.SIGTERM)
        assert kit.wait(20) == 128 + signal.SIGTERM
    assert stages
    assert all(gone(pid) for pid in stages)
    assert [row["status"] for row in read(tmp_path / "o")["stages"]] == ["running", "waiting"]


def running(folder: Path) -> bool:
    return (folder / "summary.json").exists() and any(row["status"] == "running" for row in read(folder)["stages"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_rehearsal(tmp_path: Path) -> None:
    """Two stages from end to end; their commands on a GPU are shown with their time."""
    before = sorted(CONFIGS.iterdir())
    command = [sys.executable, "-m", "bench.device", "--dry-run", "--minutes", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stage", "environment", "--stage", "profile", "--size", "768"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile, 90 s: " in done.stdout
    assert "bench.profile_step --model sd15 --size 768" in done.stdout
    found = read(tmp_path)
    environment, profile = found["stages"]
    assert (found["ok"], found["dry_run"], profile["status"]) == (True, True, "ok")
    assert {"versions", "commit", "devices", "driver", "gpus"} <= environment["result"].keys()
    assert json.loads((tmp_path / profile["result"]).read_text())["launches"] > 100
    assert "aten::conv2d" in (tmp_path / "profile.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.txt",
        "profile.json",
        "profile.txt",
        "summary.json",
    ]
    assert sorted(CONFIGS.iterdir()) == before, "a rehearsal leaves the checkout as it is"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.device", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (2, "", 1)
    assert "--dry-run" in done.stdout
    assert not (tmp_path / "out").exists()


def test_tuned_configs_are_in_the_checkout_before_they_are_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.device.CONFIGS", tmp_path / "checkout")
    args = device_arguments(["--out", str(tmp_path), "--model", "sd21"])
    stages = {one.name: one for one in planned(args, tmp_path / "scratch", "sm_90.json")}
    assert list(stages) == list(WEIGHTS)
    assert all(stages[name].before is None for name in ("environment", "tests", "tune", "kernels"))
    stages["latency"].before()  # nothing was tuned: nothing to copy
    assert not (tmp_path / "checkout").exists()
    stages["tune"].result.parent.mkdir()
    stages["tune"].result.write_text("tuned")
    stages["profile"].before()
    assert (tmp_path / "checkout" / "sm_90.json").read_text() == "tuned"
    latency = stages["latency"].command(100)
    assert latency[latency.index("--minutes") + 1] == "1.2"
    assert latency[latency.index("--model") + 1] == "sd21"


def test_the_commands_for_a_gpu_are_understood(tmp_path: Path) -> None:
    """No machine without one ever runs them."""
    args = device_arguments(["--out", str(tmp_path), "--size", "768"])
    argv = {one.name: list(one.command(100))[3:] for one in planned(args, tmp_path / "scratch", "sm_90.json")}
    tune, table = kernels.arguments_of(argv["tune"]), kernels.arguments_of(argv["kernels"])
    assert (tune.tune, tune.configs, table.tune, table.configs) == (
        True,
        tmp_path / "configs",
        False,
        tmp_path / "configs",
    )
    pictures = latency.arguments(argv["latency"])
    assert (pictures.device, pictures.size, pictures.against, pictures.ladder) == ("cuda", [768], "diffusers", True)
    profiled = profile_step.arguments_of(argv["profile"])
    assert (profiled.device, profiled.backend, profiled.batch, profiled.dtype) == ("cuda", "triton", 2, "fp16")
    assert {tune.size, table.size, profiled.size} == {768}
    assert argv["tests"].index("tests/test_gpu.py") < argv["tests"].index("tests/kernels")


def test_wheels_come_first_and_alone_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").touch()
    args = device_arguments(["--out", str(tmp_path), "--wheels", str(tmp_path), "--stage", "tests"])
    first, second = planned(args, tmp_path / "scratch", "sm_90.json")
    command = first.command(5)
    assert (first.name, second.name) == ("wheels", "tests")
    assert {"--no-index", "--no-deps", str(tmp_path / "a-1-py3-none-any.whl")} <= set(command)
    assert command[command.index("--target") + 1] == str(tmp_path / "scratch" / "packages")


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--stage", "all"], ["--wheels", "."]])
def test_what_cannot_be_run_is_refused(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refusal:
        device_arguments(["--out", str(tmp_path), *wrong])
    assert refusal.value.code == 2


def event(category: str, name: str, start: float, microseconds: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": microseconds}


def test_launches_are_summed_by_name() -> None:
    events = [
        event("kernel", "conv", 100, 30),
        event("kernel", "norm", 140, 10),
        event("gpu_memcpy", "copy", 150, 2),
        event("kernel", "conv", 160, 40),
        event("cuda_runtime", "cudaLaunchKernel", 90, 5),
        {"ph": "M", "name": "process_name"},
    ]
    found = summary(events, 2, LAUNCHES["cuda"])
    assert (found["launches"], found["busy_ms"], found["span_ms"]) == (2, 0.041, 0.05)
    assert [row["name"] for row in found["rows"]] == ["conv", "norm", "copy"]
    assert found["rows"][0] == {"name": "conv", "count": 1, "us": 35, "us_each": 35, "share": 0.8537}
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1, abs=1e-3)
    table = report(
        {**found, "model": "sd15", "size": 512, "batch": 2, "dtype": "fp16", "backend": "triton", "gpus": ["G"]}
    )
    assert "2 launches, 0.041 ms busy of 0.050 ms" in table
    with pytest.raises(ValueError, match="saw no launch"):
        summary(events[-2:], 2, LAUNCHES["cuda"])


def test_an_op_inside_another_is_not_counted_twice() -> None:
    events = [event("cpu_op", "aten::inner", 2, 5), event("cpu_op", "aten::outer", 1, 9)]
    assert summary(events, 1, LAUNCHES["cpu"])["rows"] == [
        {"name": "aten::outer", "count": 1, "us": 9, "us_each": 9, "share": 1}
    ]


def test_the_driver_is_read_by_the_names_of_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program.write_text(f"#!/bin/sh\necho '{', '.join(f'<{name}>' for name in machine.QUERY)}'\n")
    program.chmod(0o755)
    assert machine.driver() == [{name: f"<{name}>" for name in machine.QUERY}]
    program.write_text("#!/bin/sh\necho 'Field is not valid'; exit 2\n")
    assert machine.driver() == "nvidia-smi: Field is not valid"
