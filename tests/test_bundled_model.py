"""The model that comes with fastsd: its size, its layout, that diffusers draws the same with it, and what it draws."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastsd
from bench.semantic import Way, draw, judge_pictures
from bench.semantic_prompts import make_prompts
from fastsd.pipeline import BUNDLED
from tests import oracle
from tests.tolerances import IMAGE_PSNR

GUIDANCE = 2.5
"""What `make image` asks for."""


@pytest.fixture(scope="module")
def bundled() -> fastsd.Pipeline:
    return fastsd.Pipeline(device="cpu", backend="reference")


def test_it_is_small_and_in_half_precision() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"unet", "vae", "text_encoder"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}, path  # noqa: SIM118


def test_its_card_says_what_it_is() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for part in ("Data and licence", "How it was made", "How well it draws", "make bundled-model"):
        assert part in card, f"the card lacks {part!r}"
    assert "@@" not in card, "a placeholder was left in the card"


@pytest.mark.parametrize("prompt", ["a large red circle in the center on a white background", "two green hearts"])
def test_diffusers_draws_the_same(bundled: fastsd.Pipeline, prompt: str) -> None:
    arguments = {"num_inference_steps": 20, "guidance_scale": GUIDANCE}
    ours = bundled.generate(prompt, seed=3, output_type="np", **arguments).images
    generator = torch.Generator().manual_seed(3)
    theirs = oracle.load_pipeline(BUNDLED)(prompt, generator=generator, output_type="np", **arguments).images
    assert oracle.psnr(ours, np.asarray(theirs)) >= IMAGE_PSNR


def test_it_draws_what_held_out_prompts_say(bundled: fastsd.Pipeline) -> None:
    """Twenty of the prompts of bench.semantic, which judges many more; at most two may fail."""
    prompts = make_prompts(20)
    verdicts = judge_pictures(list(draw(bundled, prompts, Way("ddim", 20, GUIDANCE, 10))), prompts)
    wrong = [f"{v.prompt.text}: {v.reading}" for v in verdicts if not v.right["all"]]
    assert len(wrong) <= 2, "\n".join(wrong)
