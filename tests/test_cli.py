"""The command line: with a stand-in pipeline (what it is asked, what becomes of its answer), then as a process of its own."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import fastsd
import fastsd.environment
from fastsd import cli
from fastsd.errors import CheckpointError, NumericsError, ParameterError, PromptError
from fastsd.pipeline import BUNDLED
from fastsd.sampling import SAMPLERS, canonical_sampler, canonical_schedule
from tests.small_model import SMALL_MODEL

SOURCE = Path(fastsd.__file__).parents[1]


class StandIn:
    """Answers as a Pipeline does, at once, and notes what it was asked."""

    made: list[dict[str, Any]] = []  # noqa: RUF012
    asked: list[dict[str, Any]] = []  # noqa: RUF012
    failure: Exception | None = None
    on_generate: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, **options: Any) -> None:
        self.made.append({"model": None, **options})

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> "StandIn":
        made = cls(**options)
        cls.made[-1]["model"] = model
        return made

    def generate(self, prompt: str, callback_on_step_end: Any, **options: Any) -> Any:
        self.asked.append({"prompt": prompt, **options})
        for step in range(options["num_inference_steps"]):
            callback_on_step_end(self, step, 999.0 - step, {"num_steps": options["num_inference_steps"]})
        if self.failure:
            raise self.failure
        self.on_generate()
        count, first = options["num_images_per_prompt"], options["seed"]
        seeds = [(41 if first is None else first) + index for index in range(count)]
        logging.getLogger("fastsd").warning("mind the gap")
        return SimpleNamespace(
            images=[Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds],
            seeds=seeds,
            timings={"text": 1.2, "total": 3.4},
            parameters=[f"{prompt}\nSteps: 1, Seed: {seed}" for seed in seeds],
            warnings=["mind the gap"],
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    """Replaces fastsd.Pipeline; the command runs in an empty folder."""
    fresh = type("Fresh", (StandIn,), {"made": [], "asked": []})
    monkeypatch.setattr(fastsd, "Pipeline", fresh)
    monkeypatch.chdir(tmp_path)
    return fresh


def invoke(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def assert_one_line_error(stderr: str, message: str) -> None:
    lines = stderr.splitlines()
    assert lines[-1].startswith("fastsd: error: "), stderr
    assert message in lines[-1], stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr


def text_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def test_defaults(stand_in: type[StandIn]) -> None:
    result = invoke("generate", "-p", "a red circle")
    assert result.exit_code == 0, result.output
    assert stand_in.made == [
        {
            "model": None,
            "device": "auto",
            "dtype": "auto",
            "backend": "auto",
            "variant": None,
            "revision": None,
            "vae": None,
            "use_ema": False,
            "prediction_type": None,
            "allow_pickle": False,
        }
    ]
    assert stand_in.asked == [
        {
            "prompt": "a red circle",
            "negative_prompt": "",
            "height": None,
            "width": None,
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "num_images_per_prompt": 1,
            "eta": None,
            "seed": None,
            "sampler": None,
            "schedule": None,
            "clip_skip": None,
            "prompt_style": "a1111",
            "rng": "cpu",
            "step_noise": "independent",
        }
    ]
    assert result.stdout == "out.png\tseed 41\n", "a random seed is told"
    assert text_of(Path("out.png")) == "a red circle\nSteps: 1, Seed: 41"


def test_every_option_arrives(stand_in: type[StandIn]) -> None:
    result = invoke(
        *("generate", "--prompt", "p", "--negative-prompt", "n", "--model", "owner/name", "--steps", "3"),
        *("--cfg-scale", "4.5", "--seed", "18446744073709551615", "--width", "72", "--height", "80", "--batch", "1"),
        *("--sampling-method", "Euler a", "--scheduler", "karras", "--clip-skip", "3", "--eta", "0.5"),
        *("--prompt-style", "plain"),
        *("--output", "x.webp", "--device", "cuda:1", "--dtype", "bf16", "--backend", "reference"),
        *("--variant", "fp16", "--revision", "main", "--vae", "v.safetensors", "--allow-pickle", "--debug", "--quiet"),
        *("--use-ema", "--prediction-type", "epsilon", "--guidance-rescale", "0.7", "--timesteps", "900,500.5, 3"),
    )
    assert result.exit_code == 0, result.output
    assert stand_in.made == [
        {
            "model": "owner/name",
            "device": "cuda:1",
            "dtype": "bf16",
            "backend": "reference",
            "variant": "fp16",
            "revision": "main",
            "vae": "v.safetensors",
            "use_ema": True,
            "prediction_type": "epsilon",
            "allow_pickle": True,
        }
    ]
    (asked,) = stand_in.asked
    assert asked == {
        "prompt": "p",
        "negative_prompt": "n",
        "height": 80,
        "width": 72,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "num_images_per_prompt": 1,
        "eta": 0.5,
        "guidance_rescale": 0.7,
        "timesteps": [900.0, 500.5, 3.0],
        "seed": 2**64 - 1,
        "sampler": "Euler a",
        "schedule": "karras",
        "clip_skip": 2,  # diffusers' count
        "prompt_style": "plain",
        "rng": "cpu",
        "step_noise": "independent",
    }


def test_levels_of_the_noise_are_numbers(stand_in: type[StandIn]) -> None:
    assert invoke("generate", "-p", "x", "--sigmas", "14.6,1,0.03").exit_code == 0
    assert stand_in.asked[0]["sigmas"] == [14.6, 1.0, 0.03]
    for option in ("--timesteps", "--sigmas"):
        result = invoke("generate", "-p", "x", option, "3;2")
        assert result.exit_code == 2
        assert_one_line_error(result.stderr, f"{option}: '3;2' must be numbers with commas between")


def options_of(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path} {parameter.name}", parameter) for parameter in command.params)
    for name, inner in getattr(command, "commands", {}).items():
        yield from options_of(inner, f"{path} {name}")


def test_every_option_has_a_help_text() -> None:
    found = dict(options_of(typer.main.get_command(cli.app), "fastsd"))
    assert len(found) > 80, "the commands were not walked through"
    silent = [path for path, parameter in found.items() if not getattr(parameter, "help", None)]
    assert not silent, f"without a help text: {', '.join(silent)}"


def test_short_options_are_the_long_ones(stand_in: type[StandIn]) -> None:
    short = ["-p", "x", "-n", "y", "-m", "m", "-s", "-1", "-W", "64", "-H", "72", "-b", "2", "-o", "o.png", "-q"]
    long = [
        "--prompt",
        "x",
        "--negative-prompt",
        "y",
        "--model",
        "m",
        "--seed",
        "-1",
        "--width",
        "64",
        "--height",
        "72",
    ]
    assert invoke("generate", *short).exit_code == 0
    assert invoke("generate", *long, "--batch", "2", "--output", "o.png", "--quiet").exit_code == 0
    assert stand_in.asked[0] == stand_in.asked[1]
    assert stand_in.made[0] == stand_in.made[1]
    assert stand_in.asked[0]["seed"] is None, "-1 is random"


def test_a_batch_is_numbered(stand_in: type[StandIn]) -> None:
    result = invoke("generate", "-p", "x", "-b", "3", "-s", "7", "-o", "some.name.jpg")
    assert result.stdout == "some.name-0.jpg\tseed 7\nsome.name-1.jpg\tseed 8\nsome.name-2.jpg\tseed 9\n"
    assert sorted(path.name for path in Path().iterdir()) == ["some.name-0.jpg", "some.name-1.jpg", "some.name-2.jpg"]


def test_progress_goes_to_stderr_and_quiet_silences_it(stand_in: type[StandIn]) -> None:
    loud = invoke("generate", "-p", "x", "--steps", "5")
    assert "5/5" in loud.stderr
    assert "text 1 ms, total 3 ms" in loud.stderr
    quiet = invoke("generate", "-p", "x", "--steps", "5", "-q")
    assert quiet.stderr == "fastsd: warning: mind the gap\n", "a warning is told all the same, and once"
    assert quiet.stdout == loud.stdout


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [(b"from a pipe\n", "from a pipe"), ("two\nlines é 😀\n\n".encode(), "two\nlines é 😀\n"), (b"", "")],
)
def test_a_dash_reads_the_prompt_from_stdin(stand_in: type[StandIn], stdin: bytes, prompt: str) -> None:
    assert invoke("generate", "-p", "-", stdin=stdin).exit_code == 0
    assert stand_in.asked[0]["prompt"] == prompt


def test_a_prompt_on_stdin_must_be_utf8_and_is_never_cut(stand_in: type[StandIn]) -> None:
    result = invoke("generate", "-p", "-", stdin=b"caf\xe9")
    assert result.exit_code == 2
    assert_one_line_error(result.stderr, "not UTF-8")
    assert stand_in.made == []
    invoke("generate", "-p", "-", stdin=b"x" * 3_000_000)
    assert len(stand_in.asked[0]["prompt"]) == 1_000_001, "one over the limit, for the tokenizer to refuse"


USAGE_ERRORS = {
    "no command": ([], "Missing command"),
    "unknown command": (["frobnicate"], "No such command 'frobnicate'"),
    "no prompt": (["generate"], "'--prompt'"),
    "misspelt option": (["generate", "-p", "x", "--stpes", "3"], "--stpes"),
    "a stray argument": (["generate", "-p", "x", "a red circle"], "a red circle"),
    "steps not a number": (["generate", "-p", "x", "--steps", "many"], "'--steps'"),
    "steps not whole": (["generate", "-p", "x", "--steps", "2.5"], "'--steps'"),
    "seed not whole": (["generate", "-p", "x", "-s", "1.5"], "'--seed'"),
    "cfg not a number": (["generate", "-p", "x", "--cfg-scale", "high"], "'--cfg-scale'"),
    "batch 0": (["generate", "-p", "x", "-b", "0"], "'--batch'"),
    "clip skip 0": (["generate", "-p", "x", "--clip-skip", "0"], "'--clip-skip'"),
    "output of another kind": (["generate", "-p", "x", "-o", "out.gif"], ".png, .jpg, .jpeg, .webp"),
    "output without a name": (["generate", "-p", "x", "-o", ""], "--output"),
    "output nowhere": (["generate", "-p", "x", "-o", "no/such/out.png"], "create it first"),
    "output nowhere, a batch": (["generate", "-p", "x", "-b", "2", "-o", "no/such/out.png"], "create it first"),
    "info takes nothing": (["info", "x"], "x"),
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors_are_one_line_and_exit_2_before_a_model_is_loaded(case: str, stand_in: type[StandIn]) -> None:
    arguments, message = USAGE_ERRORS[case]
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert_one_line_error(result.stderr, message)
    assert result.stdout == ""
    assert stand_in.made == []
    assert list(Path().iterdir()) == []


FAILURES = [
    (ParameterError("num_inference_steps: 0 is out of range"), 2, "error: --steps: 0 is out of range"),
    (ParameterError("guidance_scale: nan"), 2, "error: --cfg-scale: nan"),
    (ParameterError("unknown sampler 'x'; known: a, b"), 2, "error: unknown sampler 'x'; known: a, b"),
    (PromptError("prompt 0 is too long"), 2, "prompt 0 is too long"),
    (CheckpointError("model.safetensors: truncated"), 1, "model.safetensors: truncated"),
    (NumericsError("unet: non-finite"), 1, "unet: non-finite"),
    (RuntimeError("two\nlines"), 1, "RuntimeError: two lines; --debug shows the traceback"),
    (MemoryError(), 1, "MemoryError"),
    (CheckpointError("odd name \x1b[31m\x07 \udcff"), 1, r"odd name \x1b[31m\x07 \udcff"),
]


@pytest.mark.parametrize(
    ("failure", "code", "message"), FAILURES, ids=lambda value: str(value)[:12].encode("ascii", "replace")
)
def test_failures_are_one_line(stand_in: type[StandIn], failure: Exception, code: int, message: str) -> None:
    stand_in.failure = failure
    result = invoke("generate", "-p", "x", "-q")
    assert result.exit_code == code
    assert_one_line_error(result.stderr, message)
    assert result.stdout == ""
    assert list(Path().iterdir()) == []
    stand_in.failure = None
    assert invoke("generate", "-p", "x").exit_code == 0


def test_debug_shows_the_traceback(stand_in: type[StandIn]) -> None:
    stand_in.failure = RuntimeError("broken")
    result = invoke("generate", "-p", "x", "-q", "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "in generate" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastsd: error: RuntimeError: broken")


def test_a_file_that_cannot_be_written_after_all_exits_1(stand_in: type[StandIn], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    stand_in.on_generate = staticmethod(folder.rmdir)
    result = invoke("generate", "-p", "x", "-q", "-o", "folder/out.png")
    assert result.exit_code == 1
    assert "create it first" in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_samplers_lists_every_name_and_each_works() -> None:
    result = invoke("samplers")
    assert result.exit_code == 0
    _, *lines = result.stdout.split("\n\n")[0].splitlines()
    assert len(lines) == len(SAMPLERS)
    for line, (name, known) in zip(lines, SAMPLERS.items(), strict=True):
        shown = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert shown[0] == name
        spellings = (*shown[:3], *(known.aliases and shown[3].split(", ")))
        for spelling in (one for one in spellings if one != "-"):
            assert canonical_sampler(spelling)[0] == name
    schedules = result.stdout.split("schedules: ")[1].replace("(", ", ").replace(")", "").split(", ")
    assert {canonical_schedule(schedule.strip()) for schedule in schedules} >= {"uniform", "karras"}


def rows_of(stdout: str) -> dict[str, str]:
    return {line[:17].strip(): line[17:].strip() for line in stdout.splitlines()}


def test_info_on_this_machine() -> None:
    result = invoke("info")
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert rows["fastsd"] == fastsd.__version__
    assert rows["torch"] == torch.__version__
    assert rows["numpy"] == np.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert f"{os.cpu_count()} logical cores, {torch.get_num_threads()} threads" in rows["cpu"]
    assert rows["bundled model"] == str(BUNDLED)
    assert {"auto", "reference"} <= set(rows["backends"].split(", "))
    assert rows["auto"].endswith(fastsd.Pipeline().ops.name)
    assert "HF_HOME" in rows["cache"]


def test_info_follows_hf_home(tmp_path: Path) -> None:
    result = run("info", cwd=tmp_path, env={"HF_HOME": str(tmp_path / "cache")})
    assert rows_of(result.stdout)["cache"].startswith(f"{tmp_path / 'cache'} (HF_HOME)")


@pytest.mark.parametrize("smi", ["#!/bin/sh\necho 575.57.08\n", "#!/bin/sh\nexit 9\n", None])
def test_info_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smi: str | None) -> None:
    gpu = SimpleNamespace(name="NVIDIA Test", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    if smi is not None:
        (tmp_path / "nvidia-smi").write_text(smi)
        (tmp_path / "nvidia-smi").chmod(0o755)
    (row,) = fastsd.environment.gpus()
    driver = "575.57.08" if smi and "echo" in smi else "unknown"
    assert row == f"cuda:0 NVIDIA Test, compute capability 9.0, 80.0 GiB, CUDA {torch.version.cuda}, driver {driver}"


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"fastsd {fastsd.__version__}\n"
    assert {"generate", "info", "samplers"} <= set(invoke("--help").stdout.split())
    options = invoke("generate", "--help").stdout
    for option in ("-p, --prompt", "-s, --seed", "-W, --width", "--sampling-method", "--scheduler", "-q, --quiet"):
        assert option in options
    for command in ("generate", "replay", "verify"):
        assert "Also read pickles: .bin, .ckpt, .pt" in " ".join(invoke(command, "--help").stdout.split())
    assert "with -replay behind it" in " ".join(invoke("replay", "--help").stdout.split())


# --- as a process -----------------------------------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    # One thread: several of these at a time on a small machine would only wait for one another.
    return {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastsd", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**env or {}), capture_output=True, text=True, timeout=120)


def test_the_process_draws_what_the_library_draws(tmp_path: Path) -> None:
    prompt = "a small red circle above a large blue square 😀"
    command = ("generate", "-p", prompt, "-n", "green", "--steps", "4", "-s", "11", "--cfg-scale", "5", "-b", "2")
    result = run(*command, "--sampling-method", "Euler a", "--clip-skip", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "out-0.png\tseed 11\nout-1.png\tseed 12\n"
    assert "4/4" in result.stderr
    expected = fastsd.Pipeline().generate(
        prompt,
        negative_prompt="green",
        num_inference_steps=4,
        guidance_scale=5.0,
        num_images_per_prompt=2,
        seed=11,
        sampler="Euler a",
        clip_skip=1,
    )
    for index in range(2):
        path = tmp_path / f"out-{index}.png"
        with Image.open(path) as image:
            difference = np.abs(np.asarray(image, int) - np.asarray(expected.images[index], int))
        assert difference.max() <= 1, "the threads of two processes may round apart by a level"
        assert text_of(path) == expected.parameters[index]
        assert f"Seed: {11 + index}," in text_of(path)
        assert "Clip skip: 2" in text_of(path)


@pytest.mark.parametrize("method", ["plms", "euler_ancestral"])
def test_the_same_command_writes_the_same_bytes(tmp_path: Path, method: str) -> None:
    command = ("generate", "-p", "a red circle", "--steps", "2", "-s", "5", "-q", "-m", str(SMALL_MODEL))
    command += ("--sampling-method", method)
    for name in ("a.png", "b.png"):
        result = run(*command, "-o", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "x", "-W", "63"], 2, "--width: 63"),
        (["-p", "x", "--sampling-method", "frob"], 2, "dpmpp_2m"),
        (["-p", "x", "-m", "no-such-folder/"], 1, "no-such-folder"),
        ([b"-p", b"latin-1: \xe9"], 2, "surrogate"),
    ],
)
def test_the_process_refuses_in_one_line(tmp_path: Path, arguments: list[Any], code: int, message: str) -> None:
    command = [sys.executable, "-m", "fastsd", "generate", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    assert_one_line_error(result.stderr, message)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_mid_generation_exits_130_and_leaves_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsd", "generate", "-p", "a red circle", "--steps", "1000"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job starts with it ignored
    )
    assert process.stderr is not None
    seen = b""
    while b"/1000" not in seen:  # the bar appears with the first step
        read = os.read(process.stderr.fileno(), 4096)
        assert read, f"ended before a step was taken: {seen.decode()}"
        seen += read
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    assert stdout == b""
    assert stderr.decode().splitlines()[-1] == "fastsd: interrupted"
    assert b"Traceback" not in stderr
    assert b"1000/1000" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_hangs_up_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m fastsd samplers | true"
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
