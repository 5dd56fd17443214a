"""`<lora:name:0.8>` in the prompts of the command line: what is encoded, what is loaded, what is written into the file."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.errors import PromptError
from fastsd.metadata import parse_parameters
from fastsd.prompt_tags import LoraTag, tag_name, take_tags, with_prompt, with_tags, without_tags
from tests.adapter_builders import kohya_lora, save
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a red circle", "a red circle", []),
        (" <cat> a < b > c <b> ", " <cat> a < b > c <b> ", []),  # no tags: not even the spaces are touched
        ("<lora:ink>", "", [("ink", 1, 1)]),
        ("a <lora:ink:0.8> circle", "a  circle", [("ink", 0.8, 0.8)]),
        ("a circle, <lora:ink:.5:1>", "a circle,", [("ink", 0.5, 1)]),
        ("a<lora:ink:-1>b", "ab", [("ink", -1, -1)]),
        ("<lora:ink:te=0.5:unet=0>", "", [("ink", 0.5, 0)]),
        ("<lora:ink:unet=2>", "", [("ink", 1, 2)]),
        ("<lora:ink:te=0.5>", "", [("ink", 0.5, 0.5)]),
        ("<lora:two words (v1.5)_a:1e-1><lyco:b>", "", [("two words (v1.5)_a", 0.1, 0.1), ("b", 1, 1)]),
        ("<lora:ink:0.5> and <lora:ink:0.25:1>", "and", [("ink", 0.75, 1.5)]),  # loaded twice, added twice
        ("<hypernet:old:1> x", "x", []),
        ("<LORA:ink:1> <lora> <lora:", "<LORA:ink:1> <lora> <lora:", []),
        ("<lora:a<lora:b:1>>", "<lora:a>", [("b", 1, 1)]),
    ],
)
def test_tags_are_taken_out(prompt: str, text: str, loras: list[tuple[str, float, float]]) -> None:
    tagged = take_tags(prompt)
    assert tagged.text == text
    assert tagged.loras == [LoraTag(*lora) for lora in loras]


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:ink:much>",
        "<lora:ink:>",
        "<lora:ink:1:1:1>",
        "<lora:ink:lbw=ALL>",
        "<lora::1>",
        "<lora:ink:nan>",
        "<lora:ink:1:inf>",
    ],
)
def test_tags_that_say_nothing_are_refused(tag: str) -> None:
    with pytest.raises(PromptError, match=r"<lora:name:0\.8>") as caught:
        take_tags(f"a {tag} b")
    assert tag in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["<lora:", "<lora:a:", "<lora:a:1>", "<", "<lora:a:1", ":" * 9])
def test_hostile_prompts_take_linear_time(unit: str) -> None:
    prompt = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    without_tags(prompt)
    if "1>" in unit or not unit.startswith("<lora:a"):
        take_tags(prompt)
    assert time.perf_counter() - start < 10, "a second is enough for a megabyte"


def test_tags_that_are_written_are_read_back() -> None:
    tags = [LoraTag("ink", 1.0, 1.0), LoraTag("b-2 (x)", 0.1 + 0.2, -2.5)]
    written = with_tags("a red circle", tags)
    assert written == "a red circle <lora:ink:1> <lora:b-2 (x):0.30000000000000004:-2.5>"
    assert take_tags(written) == ("a red circle", tags, [])
    assert with_tags(written, tags) == written, "named once"
    assert with_tags("", tags[:1]) == "<lora:ink:1>"
    assert with_tags("x", [LoraTag(name, 1, 1) for name in ("no:tag", " ", "", " ink", "ink ", "i\nk")]) == "x"


@pytest.mark.parametrize(
    ("prompt", "weights", "written"),
    [
        ("x <lora:ink:0.5>", (0.8, 0.8), "x <lora:ink:0.5> <lora:ink:0.3>"),
        ("x <lora:ink:0.3>", (0.8, 0.3), "x <lora:ink:0.3> <lora:ink:0.5:0>"),
        ("<lora:ink:1> <lora:ink:1>", (-0.5, 1.0), "<lora:ink:1> <lora:ink:1> <lora:ink:-2.5:-1>"),
        ("x <lora:ink:0.1>", (0.3, 0.1), "x <lora:ink:0.1> <lora:ink:0.19999999999999998:0>"),  # 0.1 + 0.2 is not 0.3
        ("x <lora:ink:1>", (0.0, 0.0), "x <lora:ink:1> <lora:ink:-1>"),
        ("x", (0.0, 0.0), "x <lora:ink:0>"),
        ("x <lora:> <lora:x:abc>", (0.5, 0.5), "x <lora:> <lora:x:abc> <lora:ink:0.5>"),
    ],
)
def test_the_tags_of_a_name_add_up_to_what_was_used(prompt: str, weights: tuple[float, float], written: str) -> None:
    used = LoraTag("ink", *weights)
    assert with_tags(prompt, [used]) == written
    if "abc" not in prompt:
        assert take_tags(written).loras == [used]


def test_what_diffusers_calls_every_lora_is_no_name() -> None:
    assert tag_name("ink.v2", "loras") == "ink.v2"
    assert tag_name("pytorch_lora_weights", "ink") == "ink"
    assert tag_name("pytorch_lora_weights", "") == "pytorch_lora_weights", "there is no other"


@pytest.mark.parametrize("prompt", ["x <lora:ink:abc>", "x <lora:>", "x <lora:gone:1>"])
def test_a_prompt_that_says_more_than_was_used_is_not_written(prompt: str) -> None:
    assert with_prompt("x\nSteps: 2", "x", prompt) == "x\nSteps: 2"
    assert with_prompt("x <lora:ink:1>\nSteps: 2", "x", prompt) == "x <lora:ink:1>\nSteps: 2"


@pytest.mark.parametrize("prompt", ["a circle <lora:x:abc>", "<lora:>", "<lora:ink:1> <lora::2>"])
def test_what_looks_like_a_tag_is_text_to_the_library(pipe: fastsd.Pipeline, prompt: str) -> None:
    drawn = pipe.generate(prompt, num_inference_steps=1, seed=1)
    assert drawn.parameters[0].startswith(f"{prompt}\nSteps: 1, ")
    several = pipe.generate_batch([{"prompt": one, "num_inference_steps": 1, "seed": 1} for one in ("a", prompt)])
    assert [type(one).__name__ for one in several] == ["Result", "Result"]
    assert several[1].parameters == drawn.parameters


@pytest.mark.parametrize("behind", ["\nNegative prompt: b\nSteps: 2", "\nSteps: 2"])
@pytest.mark.parametrize(
    ("prompt", "drawn", "written"),
    [
        ("a", "a", "a"),
        ("a <lora:ink:1> b", "a  b <lora:ink:1>", "a <lora:ink:1> b"),
        ("a <lora:ink:1>", "a <lora:ink:1> <lora:flag:2>", "a <lora:ink:1> <lora:flag:2>"),
        ("<lora:ink:1>", "<lora:ink:1>", "<lora:ink:1>"),
        ("x\n<lora:ink:1>, y\nz", "x\n, y\nz <lora:ink:1>", "x\n<lora:ink:1>, y\nz"),
    ],
)
def test_the_prompt_is_written_as_it_was_given(prompt: str, drawn: str, written: str, behind: str) -> None:
    assert with_prompt(drawn + behind, take_tags(prompt).text, prompt) == written + behind


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ink`, and `wash` in a folder of its own."""
    pipe, folder = fastsd.Pipeline(SMALL_MODEL, device="cpu"), tmp_path_factory.mktemp("loras")
    save(kohya_lora(pipe, ("to_q", "fc1")), folder / "ink.safetensors")
    (folder / "more").mkdir()
    save(kohya_lora(pipe, ("to_v", "conv1"), seed=1), folder / "more" / "wash.safetensors")
    return folder


def generate(out: Path, prompt: str, *arguments: str, **environment: str):
    asked = [
        "generate",
        "-p",
        prompt,
        "--steps",
        "2",
        "-s",
        "3",
        "-q",
        "-o",
        str(out),
        "-m",
        str(SMALL_MODEL),
        *arguments,
    ]
    return CliRunner(env=environment).invoke(cli.app, asked)


def text_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def test_tags_load_what_they_name(loras: Path, tmp_path: Path) -> None:
    prompt = "a (red:1.1) circle <lora:ink:0.5:0.25>, <lora:wash>"
    done = generate(tmp_path / "out.png", prompt, "--lora-dir", str(loras))
    assert done.exit_code == 0, done.output
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu")
    pipe.load_lora_weights(loras / "ink.safetensors", "ink")
    pipe.load_lora_weights(loras / "more" / "wash.safetensors", "wash")
    pipe.set_adapters(["ink", "wash"], [{"text_encoder": 0.5, "unet": 0.25}, 1.0])
    drawn = pipe.generate("a (red:1.1) circle ,", prompt_style="a1111", num_inference_steps=2, seed=3)
    assert_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(drawn.images[0]), "the picture")
    fields = parse_parameters(text_of(tmp_path / "out.png"))
    assert fields["prompt"] == prompt, "the tags stay where they were written"
    assert re.fullmatch("ink: [0-9a-f]{12}, wash: [0-9a-f]{12}", fields["lora_hashes"])
    assert parse_parameters(drawn.parameters[0])["prompt"] == "a (red:1.1) circle , <lora:ink:0.5:0.25> <lora:wash:1>"


def test_the_folder_may_be_in_the_environment(loras: Path, tmp_path: Path) -> None:
    done = generate(tmp_path / "out.png", "x <lora:wash:1>", FASTSD_LORA_DIR=str(loras))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("x <lora:oil:1>", ["--lora-dir", "{loras}"], "no LoRA is called 'oil'; known: ink, wash"),
        ("x <lora:ink:1>", [], "no LoRA is called 'ink'; say where with --lora-dir"),
        ("x <lora:ink:1>", ["--lora-dir", "{loras}/none"], "none' is no folder"),
        ("x <lora:ink:a lot>", ["--lora-dir", "{loras}"], "'a lot' is no weight"),
        ("x <lora:ink:1e9>", ["--lora-dir", "{loras}"], "must be a number from -1000 to 1000"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    loras: Path, tmp_path: Path, prompt: str, arguments: list[str], message: str
) -> None:
    done = generate(tmp_path / "out.png", prompt, *(one.format(loras=loras) for one in arguments), FASTSD_LORA_DIR="")
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_other_tags(loras: Path, tmp_path: Path) -> None:
    """Of a hypernetwork it is said that it is not run; in the plain style all is text."""
    done = generate(tmp_path / "hyper.png", "x <hypernet:old:1>")
    assert done.exit_code == 0
    assert done.stderr == "fastsd: warning: old: fastsd runs no hypernetworks; left out\n"
    plain = generate(tmp_path / "plain.png", "x <lora:ink:1>", "--prompt-style", "plain")
    assert plain.exit_code == 0, plain.output
    assert [parse_parameters(text_of(tmp_path / f"{name}.png"))["prompt"] for name in ("hyper", "plain")] == [
        "x",
        "x <lora:ink:1>",
    ]
