"""What training begins from: branches that add nothing yet, and the text encoder's deviations."""

from pathlib import Path

import pytest
import torch

from fastsd.config import CLIPConfig, UNetConfig
from fastsd.models.clip import CLIPText
from fastsd.models.layers import ResBlock
from fastsd.models.unet import Transformer, UNet
from fastsd.training.initial import initialise_text_encoder, initialise_unet
from fastsd.training.model import load_model
from tests.training.builders import CPU, UNET


def first_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_json(UNET))
    initialise_unet(unet)
    return unet


def test_at_first_every_branch_adds_nothing() -> None:
    """A block gives what it is given; a ResBlock that changes the width gives its shortcut."""
    unet, seen = first_unet(), 0
    for module in unet.modules():
        if isinstance(module, ResBlock):
            x = torch.randn(1, 4, 4, module.conv1.in_channels)
            time = torch.randn(1, module.conv1.out_channels)
            wanted = x if module.conv_shortcut is None else module.conv_shortcut(x)
            torch.testing.assert_close(module(x, time), wanted)
            seen += 1
        if isinstance(module, Transformer):
            x = torch.randn(1, 4, 4, module.proj_in.in_channels)
            keys = iter([block.attn2.project(torch.randn(1, 5, 16)) for block in module.transformer_blocks])
            assert torch.equal(module(x, keys), x)
            seen += 1
    assert seen == 8 + 4, (
        "ResBlocks: two on the way down, two in the middle, four on the way up; half of them with attention"
    )


def test_at_first_the_unet_predicts_zero() -> None:
    unet = first_unet()
    context = unet.project_context(torch.randn(2, 5, 16))
    out = unet(torch.randn(2, 16, 16, 4), unet.project_time(torch.tensor([3.0, 900.0])), context)
    assert not out.any()


def test_nothing_else_is_zero() -> None:
    """What is before the zeros has PyTorch's initial weights, or there would be no gradient at all after the first step."""
    last = ("conv2", "proj_out", "conv_out")
    for name, weight in first_unet().named_parameters():
        zero = name.rsplit(".", 1)[0].split(".")[-1] in last
        if zero or weight.ndim > 1:
            assert bool(weight.any()) is not zero, name


@pytest.fixture(scope="module")
def clip() -> CLIPText:
    """Wide enough that a deviation is known to within a few percent."""
    torch.manual_seed(0)
    clip = CLIPText(CLIPConfig(1000, 64, 256, 3, 4, 77))
    initialise_text_encoder(clip)
    return clip


@pytest.mark.parametrize(
    ("ending", "deviation"),
    [
        ("token_embedding", 0.02),
        ("position_embedding", 0.01),
        ("q_proj", 64**-0.5),
        ("k_proj", 64**-0.5),
        ("v_proj", 64**-0.5),
        ("out_proj", 64**-0.5 * 6**-0.5),
        ("fc1", 128**-0.5),
        ("fc2", 64**-0.5 * 6**-0.5),
    ],
)
def test_the_text_encoder_s_deviations_are_clip_s(ending: str, deviation: float, clip: CLIPText) -> None:
    """Those of transformers' CLIPPreTrainedModel too, whose initializer_factor is 1."""
    found = [p for name, p in clip.named_parameters() if name.endswith(f"{ending}.weight")]
    assert len(found) == (1 if "embedding" in ending else 3)
    for weight in found:
        assert weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(weight.mean().item()) < deviation / 10
    assert not any(p.any() for name, p in clip.named_parameters() if name.endswith(f"{ending}.bias"))


def test_a_new_model_begins_with_these_weights(new_folder: Path) -> None:
    model = load_model(new_folder, CPU)
    assert not model.unet.conv_out.weight.any()
    assert model.text_encoder.embeddings.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.requires_grad for p in model.text_encoder.parameters()), "nothing is trained unasked"
