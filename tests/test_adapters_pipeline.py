"""Adapters on a whole Pipeline: pictures change, and come back to the last byte; under live graphs; while others draw."""

import gc
import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.convert import convert
from fastsd.denoise import Denoiser
from fastsd.errors import ParameterError
from fastsd.graph import Graphs
from fastsd.metadata import parse_parameters
from fastsd.model_hash import ModelFile
from tests.adapter_builders import kohya_lora, save
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL
from tests.test_graph import StandIn

PROMPT = "a large red circle in the center on a white background"


@pytest.fixture
def own() -> fastsd.Pipeline:
    return fastsd.Pipeline(SMALL_MODEL, device="cpu")


@pytest.fixture
def ink(own: fastsd.Pipeline, tmp_path: Path) -> Path:
    return save(kohya_lora(own), tmp_path / "ink.safetensors")


def draw(pipe: fastsd.Pipeline, prompt: str = PROMPT, **options: Any) -> np.ndarray:
    given = {"num_inference_steps": 3, "seed": 2, "output_type": "np"} | options
    return np.asarray(pipe.generate(prompt, **given).images)


@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "graphs"])
def test_a_lora_comes_and_goes(own: fastsd.Pipeline, ink: Path, replayed: bool) -> None:
    if replayed:
        own.graphs = Graphs(StandIn(), 10_000)
        own._denoiser = Denoiser(own.unet, own.ops, own.graphs)
    first = [draw(own) for _ in range(3)][-1]
    captures = own.graphs.captures if own.graphs else 0
    own.load_lora_weights(ink, adapter_name="ink")
    full = draw(own)
    own.set_adapters("ink", 0.5)
    half = draw(own)
    assert not np.array_equal(full, first), "the LoRA is not seen"
    assert not np.array_equal(half, full), "nor its weight"
    own.disable_lora()
    assert np.array_equal(draw(own), first), "off is not what it was before"
    own.enable_lora()
    assert np.array_equal(draw(own), half)
    own.unload_lora_weights()
    assert np.array_equal(draw(own), first), "unloaded is not what it was before"
    assert (own.graphs.captures if own.graphs else 0) == captures, "captured again"


def test_a_word_comes_and_goes(own: fastsd.Pipeline, tmp_path: Path) -> None:
    prompt = "a <thing> on a white background"
    first = draw(own, prompt)
    width = own.text_encoder.config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_file({"<thing>": vectors}, tmp_path / "thing.safetensors")
    own.load_textual_inversion(tmp_path / "thing.safetensors")
    assert not np.array_equal(draw(own, prompt), first), "the word is not seen"
    own.unload_textual_inversion()
    assert np.array_equal(draw(own, prompt), first), "unloaded is not what it was before"


def test_who_is_drawing_keeps_the_old_weights(own: fastsd.Pipeline, ink: Path) -> None:
    first = draw(own)
    begun, pictures = threading.Event(), []

    def on_step(pipe: fastsd.Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        return {}

    thread = threading.Thread(
        target=lambda: pictures.append(draw(own, num_inference_steps=3, callback_on_step_end=on_step))
    )
    thread.start()
    assert begun.wait(60)
    own.load_lora_weights(ink)
    thread.join()
    assert np.array_equal(pictures[0], first), "the weights changed under a call"
    assert not np.array_equal(draw(own), first)


def test_a_callback_may_not_swap(own: fastsd.Pipeline, ink: Path) -> None:
    with pytest.raises(ParameterError):
        draw(own, callback_on_step_end=lambda *_: own.load_lora_weights(ink) and {})
    assert draw(own).shape == (1, 64, 64, 3), "the next call is served"


def test_the_command_line_takes_them(own: fastsd.Pipeline, ink: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    asked = ["generate", "-m", str(SMALL_MODEL), "-p", PROMPT, "--steps", "3", "-s", "2", "--lora", f"{ink}:0.5"]
    done = CliRunner().invoke(cli.app, [*asked, "-o", str(out)])
    assert done.exit_code == 0, done.output
    own.load_lora_weights(ink, adapter_name="ink")
    own.set_adapters("ink", 0.5)
    drawn = own.generate(PROMPT, prompt_style="a1111", num_inference_steps=3, seed=2)
    assert_equal(np.asarray(Image.open(out)), np.asarray(drawn.images[0]), "the picture")
    missing = CliRunner().invoke(cli.app, ["generate", "-p", "x", "--lora", "no/such.safetensors", "-o", str(out)])
    assert missing.exit_code == 1
    assert "such.safetensors" in missing.stderr


def test_a_dropped_pipeline_is_freed_at_once(ink: Path, tmp_path: Path) -> None:
    """Its memory does not wait for the garbage collector."""
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu")
    vectors = torch.ones(1, pipe.text_encoder.config.hidden_size)
    save_file({"<thing>": vectors}, tmp_path / "thing.safetensors")
    pipe.load_textual_inversion(tmp_path / "thing.safetensors")
    pipe.load_lora_weights(ink)
    pipe.generate(PROMPT, num_inference_steps=1, seed=0)
    weight = weakref.ref(pipe.unet.conv_in.weight)
    gc.disable()
    try:
        del pipe
        assert weight() is None, "something still holds the weights"
    finally:
        gc.enable()


def test_the_parameters_name_what_was_merged(own: fastsd.Pipeline, ink: Path, tmp_path: Path) -> None:
    def fields(prompt: str = PROMPT, **options: Any) -> dict[str, Any]:
        drawn = own.generate(prompt, num_inference_steps=1, seed=0, **options)
        return parse_parameters(drawn.parameters[0])

    save_file({"<thing>": torch.ones(1, own.text_encoder.config.hidden_size)}, tmp_path / "thing.safetensors")
    own.load_textual_inversion(tmp_path / "thing.safetensors")
    thing = hashlib.sha256((tmp_path / "thing.safetensors").read_bytes()).hexdigest()[:12]
    content = ink.read_bytes()
    hashed = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]
    plain = fields()
    assert plain["prompt"] == PROMPT
    assert not plain.keys() & {"lora_hashes", "ti_hashes", "model_hash"}, "nothing was used, and a folder has no hash"
    assert (
        fields("a <THING>")["ti_hashes"] == fields("x", negative_prompt="a <thing>")["ti_hashes"] == f"<thing>: {thing}"
    )
    own.load_lora_weights(ink, adapter_name="some name")
    assert fields() == plain | {"prompt": f"{PROMPT} <lora:ink:1>", "lora_hashes": f"ink: {hashed}"}
    own.set_adapters("some name", {"unet": 0.25})
    assert fields()["prompt"] == f"{PROMPT} <lora:ink:1:0.25>"
    own.set_adapters("some name", {"mid": 0.25})
    assert fields() == plain | {"lora_hashes": f"ink: {hashed}"}, "no tag can say what each block weighs"
    own.disable_lora()
    assert fields() == plain


def test_the_parameters_weigh_what_was_merged(own: fastsd.Pipeline, ink: Path) -> None:
    """What a prompt of the library's has of tags is text, and weighs nothing; a file that is merged twice weighs the sum."""

    def text(prompt: str) -> str:
        return own.generate(prompt, num_inference_steps=1, seed=0).parameters[0]

    own.load_lora_weights(ink, adapter_name="ink")
    own.set_adapters("ink", 0.8)
    fields = parse_parameters(text("a circle <lora:ink:0.3>"))
    assert fields["prompt"] == "a circle <lora:ink:0.3> <lora:ink:0.5>", "a reader adds them up"
    assert fields["made_with"] == "tags that were encoded as words"
    assert "made_with" not in parse_parameters(text("a circle"))
    assert text("x <lora:> <lora:a:b>").startswith("x <lora:> <lora:a:b> <lora:ink:0.8>\n")
    own.load_lora_weights(ink, adapter_name="again")
    own.set_adapters(["ink", "again"], [0.25, {"unet": 0.5, "text_encoder": 1}])
    fields = parse_parameters(text("a circle"))
    assert fields["prompt"] == "a circle <lora:ink:1.25:0.75>"
    assert fields["lora_hashes"].count("ink") == 1
    own.set_adapters(["ink", "again"], [0.25, {"mid": 0.5}])
    assert parse_parameters(text("a circle"))["prompt"] == "a circle"


def test_names_that_are_not_utf8_are_written(ink: Path, tmp_path: Path) -> None:
    odd, out = os.fsdecode(b"caf\xe9.safetensors"), tmp_path / "out.png"
    try:
        ink.rename(tmp_path / odd)
    except OSError:
        pytest.skip("this disk takes UTF-8 only")
    convert(SMALL_MODEL, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / f"model-{odd}")
    asked = ["generate", "-p", "x", "--steps", "1", "-q", "-o", str(out)]
    lora = ["-m", str(SMALL_MODEL), "--lora", str(tmp_path / odd)]
    for options in (lora, ["-m", str(tmp_path / f"model-{odd}")]):
        done = CliRunner().invoke(cli.app, [*asked, *options])
        assert done.exit_code == 0, done.output
        with Image.open(out) as image:
            assert "caf\ufffd" in image.info["parameters"]


def test_a_linked_model_has_the_name_of_the_link(tmp_path: Path) -> None:
    """The Hub's cache links what was downloaded to files that are called by their hashes."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").write_bytes(b"abc")
    (tmp_path / "some-model.safetensors").symlink_to(tmp_path / "blobs" / "0123abcd")
    model = ModelFile(tmp_path / "some-model.safetensors")
    assert (model.stem, model.name, model.hash()) == ("some-model", "some-model.safetensors", "ba7816bf8f")


def test_a_single_file_has_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    convert(SMALL_MODEL, path)
    drawn = fastsd.Pipeline(path, device="cpu").generate(PROMPT, num_inference_steps=1, seed=0)
    fields = parse_parameters(drawn.parameters[0])
    assert fields["model_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def test_a_hash_that_cannot_be_taken_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert ModelFile(tmp_path / "model.safetensors").hash() == "ba7816bf8f", "FIPS 180-2's example"

    def gone(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr("fastsd.model_hash.file_sha256", gone)
    assert ModelFile(tmp_path / "model.safetensors").hash() is None
