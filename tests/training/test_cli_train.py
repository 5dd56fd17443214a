"""`fastsd train`: what it runs, what it prints, and one line with an exit code for whatever goes wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastsd import cli
from tests.training.builders import (
    FIT,
    LORA,
    TEXT,
    checkpoint,
    differing,
    files,
    logged,
    picture_folder,
    recipe_file,
)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


def assert_fails(result: Result, code: int, message: str) -> None:
    """The losses logged before it are lines of their own on stderr."""
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("text ", "lora "))]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith(f"fastsd: error: {message}"), errors[0]
    assert (result.exit_code, result.stdout) == (code, "")


@pytest.fixture
def config(new_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages on a tiny model; its output is `runs` in the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    stages = TEXT + TEXT.replace('name = "text"', 'name = "more"')
    return recipe_file(tmp_path / "recipe.toml", stages, f"base = {json.dumps(str(new_folder))}")


def test_the_same_command_goes_on_to_the_same_files(config: Path, tmp_path: Path) -> None:
    whole = invoke("--config", config, "--output", "whole")
    assert (whole.exit_code, whole.stdout) == (0, "whole\n"), whole.output
    said = [invoke("-c", config, "--stop-after", "2").stdout for _ in range(3)]
    assert said == ["stopped; the same command goes on (runs)\n"] * 2 + ["runs\n"]
    for pattern in ("*.safetensors", "*.jsonl", "*.json"):
        assert files(tmp_path / "runs", pattern) == files(tmp_path / "whole", pattern), pattern
    for stage in ("text", "more"):
        assert not differing(checkpoint(tmp_path / "runs" / stage), checkpoint(tmp_path / "whole" / stage))
    assert files(tmp_path / "whole" / "model"), "there is no model"


def test_losses_are_told_on_the_way(config: Path, tmp_path: Path) -> None:
    lines = invoke("-c", config, "--stop-after", "2").stderr.splitlines()
    first = logged(tmp_path / "runs" / "text")[0]
    assert len(lines) == 2
    assert lines[0].startswith(f"text 1/3 loss {first['loss']:.4g} read {first['read']:.4g} norm "), lines[0]
    assert lines[1].endswith("min left")


def test_mistakes_in_the_config_are_the_user_s(config: Path) -> None:
    assert_fails(invoke("-c", "missing.toml"), 2, "config: 'missing.toml' cannot be read")
    config.write_text(config.read_text().replace("steps = 3", "stepz = 3", 1))
    assert_fails(invoke("-c", config), 2, "config.stages[0].fit: unknown 'stepz'; it knows steps, batch_size")


@pytest.mark.parametrize("arguments", [(), ("-c", "recipe.toml", "--stop-after", "0")])
def test_mistakes_in_the_options_are_the_user_s(arguments: tuple[str, ...], config: Path) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("fastsd: error: ")
    assert not (config.parent / "runs").exists()


def test_another_config_for_the_same_output_is_the_user_s(config: Path) -> None:
    assert invoke("-c", config, "--stop-after", "1").exit_code == 0
    config.write_text(config.read_text().replace("learning_rate = 1e-3", "learning_rate = 1e-2"))
    assert_fails(invoke("-c", config), 2, "output: text/ was begun with another config or other data; remove it")


def test_a_damaged_checkpoint_is_not_the_user_s(config: Path, tmp_path: Path) -> None:
    assert invoke("-c", config, "--stop-after", "1").exit_code == 0
    (tmp_path / "runs" / "text" / "checkpoint.pt").write_bytes(b"\0" * 100)
    assert_fails(invoke("-c", config), 1, "checkpoint.pt: is damaged, or not one of fastsd's; remove it to start anew")


def test_numbers_that_overflow_are_not_the_user_s(config: Path) -> None:
    """A rate of nearly 1 in fp16 and a decay as large: the weights leave what fp16 holds within some steps."""
    fit = (
        FIT.replace("steps = 3", "steps = 400").replace("1e-3", "0.99").replace("warmup_steps = 1", "warmup_steps = 0")
    )
    fit += ', precision = "fp16", clip_norm = 0.0, betas = [0.0, 0.0]'
    config.write_text(config.read_text().replace(FIT, fit))
    assert_fails(invoke("-c", config), 1, "training: the loss is not finite at step ")


def test_an_error_in_one_of_two_processes_is_one_line_too(trained_folder: Path, tmp_path: Path) -> None:
    """Only the processes find out that the captions of a folder state nothing."""
    head = f'base = {json.dumps(str(trained_folder))}\nprocesses = 2\nthreads = 1\noutput = "unused"'
    pictures = f"path = {json.dumps(str(picture_folder(tmp_path / 'pictures')))}"
    config = recipe_file(tmp_path / "recipe.toml", TEXT, head, pictures)
    config.write_text(config.read_text().replace('output = "unused"\n', ""))
    result = invoke("-c", config, "-o", tmp_path / "runs")
    assert_fails(result, 2, "config.stages.text: the data set does not say what its captions state")


def test_a_lora_of_layers_that_there_are_not(config: Path) -> None:
    config.write_text(config.read_text().split("[[stages]]")[0] + LORA.replace('"out_proj"', '"proj_out"'))
    assert_fails(
        invoke("-c", config), 2, "text_layers: no layer of the text_encoder is named proj_out; e.g. encoder.layers"
    )
