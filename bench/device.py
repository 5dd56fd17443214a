"""`python -m bench.device --out DIR --minutes 9`: all that a GPU is needed for, on a bare machine, by one command.

The stages run in turn, each a process of its own in its share of the time; what one leaves over goes to the next. A stage that
fails or outlasts its share is told of, and the next one starts. In DIR: summary.json, brought up to date before and after each
stage (the environment is in it), log.txt with what the stages print, a JSON file for each stage's result, and configs/ with the
tuned configs, to which a second run adds. They are also put into this checkout, so that what is measured after them runs on them.

--dry-run prints the stages' commands and runs each in a small form on the CPU. The exit code is 1 if any stage did not end well.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

# Nothing of fastsd's is imported: what it needs may be in the wheels that the first stage unpacks.
ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "fastsd" / "kernels" / "configs"

WEIGHTS = {"environment": 3, "tests": 22, "tune": 34, "kernels": 12, "latency": 20, "profile": 9}
"""The stages in their order, and how the time is shared out among those that run."""
GRACE = 10.0
"""How many seconds before its end a stage is interrupted: pytest then still writes its results."""
GRACE_SHARE = 0.1
"""And how much of its time that may be at most."""


@dataclass(frozen=True)
class Stage:
    name: str
    weight: float
    command: Callable[[float], Sequence[str]]
    """The argv, from the seconds it may take."""
    result: Path | None = None
    """The JSON file that it writes: without it the stage has failed."""
    inline: bool = False
    """The result's content goes into the summary, not its name."""
    before: Callable[[], None] | None = None
    """What is done first, here."""


def deadlines(weights: Sequence[float], seconds: float) -> list[float]:
    """When each stage has to have ended, in seconds from the start: the shares, summed. What a stage does not use its next one
    has, and what one overran its next one lacks."""
    return [seconds * total / sum(weights) for total in accumulate(weights)]


class Report:
    """summary.json and log.txt. The summary is replaced whole, so that it can be read whenever the run is killed."""

    def __init__(self, folder: Path, about: Mapping[str, Any], stages: Sequence[Stage]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.about = dict(about)
        self.rows: dict[str, dict[str, Any]] = {
            stage.name: {"stage": stage.name, "status": "waiting"} for stage in stages
        }
        self.save()

    @property
    def ok(self) -> bool:
        return all(row["status"] == "ok" for row in self.rows.values())

    def note(self, stage: str, **what: Any) -> None:
        self.rows[stage] |= what
        self.save()

    def save(self) -> None:
        whole = self.folder / "summary.tmp"
        content = self.about | {"ok": self.ok, "stages": list(self.rows.values())}
        whole.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        whole.replace(self.folder / "summary.json")

    def tail(self, start: int, lines: int = 15) -> list[str]:
        """The last lines that were logged after a place."""
        with self.log.open("rb") as log:
            log.seek(start)
            return [line[:400] for line in log.read().decode("utf-8", "replace").splitlines()[-lines:]]


def run_stages(stages: Sequence[Stage], seconds: float, report: Report, environment: Mapping[str, str]) -> bool:
    """Whether all ended well."""
    start = time.monotonic()
    for stage, end in zip(stages, deadlines([stage.weight for stage in stages], seconds), strict=True):
        run_stage(stage, end - (time.monotonic() - start), report, environment)
    return report.ok


def run_stage(stage: Stage, box: float, report: Report, environment: Mapping[str, str]) -> None:
    """One stage in so many seconds; how it went goes into the report."""
    start, result, old = time.monotonic(), None, modified(stage.result)
    with report.log.open("ab") as log:
        place = log.tell()
        try:
            if stage.before is not None:
                stage.before()
            command = list(stage.command(box))
            report.note(stage.name, status="running", box_s=round(box, 1), command=shlex.join(command))
            log.write(f"===== {stage.name}, {box:.0f} s: {shlex.join(command)}\n".encode())
            log.flush()
            place = log.tell()
            code = execute(command, box, log, environment)
            status = "timed out" if code is None else "ok" if code == 0 else f"failed: exit code {code}"
        except OSError as error:
            status = f"failed: {error}"
        if stage.result is not None:
            content = read(stage.result) if modified(stage.result) != old else None
            if content is not None:
                result = content if stage.inline else str(stage.result.relative_to(report.folder))
            elif status == "ok":
                status = f"failed: wrote no {stage.result.name}"
        tail = [] if status == "ok" else report.tail(place)
        took = time.monotonic() - start
        log.write(f"===== {stage.name}: {status} after {took:.1f} s\n\n".encode())
    told = {"log_tail": tail} if tail else {}
    report.note(stage.name, status=status, seconds=round(took, 1), result=result, **told)
    print("\n    ".join([f"{stage.name}: {status}, {took:.0f} s of {box:.0f} s", *tail]), flush=True)


def read(path: Path) -> Any:
    """The JSON, or None where it is broken off or missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def modified(path: Path | None) -> int | None:
    """When, or None where there is no such file."""
    return path.stat().st_mtime_ns if path is not None and path.exists() else None


def execute(command: Sequence[str], box: float, log: Any, environment: Mapping[str, str]) -> int | None:
    """The exit code, or None where the time was up: the process is interrupted a little before, and at last killed with all
    that it started."""
    # A shell's background job ignores interrupts, and so would the stage.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A group of its own, not a session: it goes with this command where the machine ends that.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
    )
    grace = min(GRACE, box * GRACE_SHARE)
    late = False
    try:
        try:
            process.wait(max(0.0, box - grace))
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, grace))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a stage that ended has left running
        process.wait()
    return None if late else process.returncode


def python(module: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def commands(args: argparse.Namespace, scratch: Path) -> dict[str, Callable[[float], list[str]]]:
    """What each stage runs on the GPU."""
    out, work = args.out, ("--model", args.model, "--size", args.size)
    configs, pytest = ("--configs", out / "configs"), pytest_arguments(out)
    return {
        "environment": lambda box: python("bench.machine", "--out", scratch / "environment.json"),
        # -vv: a line for each test, which tells how far it came if it is killed.
        "tests": lambda box: python(*pytest, "-vv", *(("-n", args.test_workers) if args.test_workers > 1 else ())),
        # Its own table would be measured again by the next stage: it is not kept.
        "tune": lambda box: python("bench.kernels", *work, "--tune-only", *configs),
        "kernels": lambda box: python("bench.kernels", *work, *configs, "--out", out / "kernels.json"),
        "latency": lambda box: python(
            *("bench.latency", "--device", "cuda", *work, "--against", "diffusers", "--ladder"),
            # It starts nothing new after that, and what it is at has to end as well.
            *("--minutes", f"{0.75 * box / 60:.1f}", "--out", out / "latency.json"),
        ),
        "profile": lambda box: python("bench.profile_step", *work, "--out", out / "profile.json"),
    }


def rehearsals(args: argparse.Namespace, scratch: Path) -> dict[str, Callable[[float], list[str]]]:
    """The same on the CPU and small: the same modules, options and files."""
    out = args.out
    small = ("--device", "cpu", "--model", args.model, "--size", 64, "--op", "sampler_step", "--workers", 1)
    configs = ("--configs", out / "configs")
    tiny = ("--device", "cpu", "--model", "tiny", "--size", 16, "--dtype", "fp32", "--backend", "reference")
    return {
        "environment": lambda box: python("bench.machine", "--out", scratch / "environment.json"),
        "tests": lambda box: python(*pytest_arguments(out), "--collect-only"),
        "tune": lambda box: python("bench.kernels", *small, "--tune-only", *configs),
        "kernels": lambda box: python("bench.kernels", *small, *configs, "--out", out / "kernels.json"),
        "latency": lambda box: python(
            *("bench.latency", "--device", "cpu", "--model", "bundled", "--steps", 1, "--runs", 1, "--minutes", 0.3),
            *("--out", out / "latency.json"),
        ),
        "profile": lambda box: python("bench.profile_step", *tiny, "--steps", 2, "--out", out / "profile.json"),
    }


def pytest_arguments(out: Path) -> list[Any]:
    """Pipelines first, the kernels' many cases last: all are compiled here, and the time may not do."""
    top = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").glob("test_*.py"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").glob("*/test_*.py")}
    places = [*top, *sorted(folders, key=lambda folder: (folder.name == "kernels", folder))]
    return ["pytest", "-m", "gpu", "-p", "no:cacheprovider", "--results", out / "gpu-tests.json", *places]


def planned(args: argparse.Namespace, scratch: Path, config: str) -> list[Stage]:
    """The chosen stages, the wheels before them. config: the name of the tuned configs' file."""
    results = {
        "environment": scratch / "environment.json",
        "tests": args.out / "gpu-tests.json",
        "tune": args.out / "configs" / config,
        "kernels": args.out / "kernels.json",
        "latency": args.out / "latency.json",
        "profile": args.out / "profile.json",
    }
    run = (rehearsals if args.dry_run else commands)(args, scratch)
    put = partial(copy_config, args.out / "configs" / config, CONFIGS)
    before = {} if args.dry_run else dict.fromkeys(("latency", "profile"), put)
    stages = [
        Stage(name, weight, run[name], results[name], name == "environment", before.get(name))
        for name, weight in WEIGHTS.items()
        if not args.stage or name in args.stage
    ]
    if args.wheels:
        wheels = sorted(args.wheels.glob("*.whl"))
        pip = python("pip", "install", "--quiet", "--no-index", "--no-deps", "--target", scratch / "packages", *wheels)
        stages.insert(0, Stage("wheels", 3, lambda box: pip))
    return stages


def print_plan(args: argparse.Namespace, scratch: Path, stages: Sequence[Stage]) -> None:
    """Each stage's command on a GPU and its time, and what stands in for it here."""
    real, begin = commands(args, scratch), 0.0
    for stage, end in zip(stages, deadlines([stage.weight for stage in stages], 60 * args.minutes), strict=True):
        box, begin = end - begin, end
        print(f"{stage.name}, {box:.0f} s: {shlex.join(real.get(stage.name, stage.command)(box))}")
        print(f"    rehearsed by: {shlex.join(stage.command(box))}")
    print(flush=True)


def copy_config(path: Path, folder: Path) -> None:
    """If there is such a file."""
    if path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def compute_capability() -> int | None:
    """As 90 for 9.0; None without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (default 9)")
    parser.add_argument("--stage", choices=WEIGHTS, action="append", help="again for another; default all")
    parser.add_argument("--model", choices=["sd15", "sd21", "sdxl"], default="sd15", help="default sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--test-workers", type=int, default=1, help="tests at a time, by pytest-xdist (default 1)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the stages need and the machine lacks")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes: must be above 0")
    if args.wheels and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: no wheels in {args.wheels}")
    args.out = args.out.resolve()
    args.wheels = args.wheels and args.wheels.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments_of(argv)
    arch = 90 if args.dry_run else compute_capability()  # what the interpreter stands in for
    if arch is None:
        print("bench.device: no CUDA device; --dry-run rehearses the stages on the CPU")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage at work ends too
    config = f"sm_{arch}.json"
    about = {"dry_run": args.dry_run, "minutes": args.minutes, "model": args.model, "size": args.size}
    with tempfile.TemporaryDirectory(prefix="fastsd-") as folder:
        scratch = Path(folder)
        stages = planned(args, scratch, config)
        if args.dry_run:
            print_plan(args, scratch, stages)
        elif not (args.out / "configs" / config).exists():
            copy_config(CONFIGS / config, args.out / "configs")
        report = Report(args.out, about, stages)
        paths = [str(scratch / "packages"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if args.dry_run:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # also where there is a GPU
        ok = run_stages(stages, 60 * args.minutes, report, environment)
    print(f"{'all stages ended well' if ok else 'NOT all stages ended well'}: {args.out / 'summary.json'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
