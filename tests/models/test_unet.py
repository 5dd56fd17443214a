"""The UNet against diffusers' UNet2DConditionModel with the same weights."""

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from fastsd.backends import onednn_ops
from fastsd.config import UNetConfig
from fastsd.errors import CheckpointError
from fastsd.kernels import onednn
from fastsd.models.unet import UNet, sinusoid
from fastsd.ops import REFERENCE
from tests import oracle
from tests.measured import measured
from tests.tolerances import HOISTED, NET, SINUSOID, UNET_STEP

CONFIGS = {
    "sd1": oracle.SD1_UNET,
    "sd2": oracle.SD2_UNET,
    # Levels that differ in depth, in layers and in having attention; the VAE's padding; the other time embedding.
    "uneven": {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": (1, 3, 2),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": (1, 4, 2),
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "norm_eps": 1e-3,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "out_channels": 4,
    },
}
SIZES = {"square": (16, 16), "wide": (8, 24), "odd at every level": (17, 11)}


@pytest.fixture(scope="module", params=CONFIGS)
def nets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[diffusers.UNet2DConditionModel, UNet]:
    theirs = oracle.unet(CONFIGS[request.param])
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_json(dict(theirs.config)))
    return theirs, oracle.load(ours, theirs, "unet", tmp_path_factory.mktemp(request.param))


def inputs(unet: UNet, size: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, unet.config.in_channels, *size, generator=generator)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    return x, torch.tensor([981.0, 3.25][:batch]), context


def predict(unet: UNet, x: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """diffusers' calling convention, NCHW."""
    out = unet(oracle.nhwc(x), unet.project_time(timesteps), unet.project_context(context), mask)
    return oracle.nchw(out)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.inference_mode()
def test_equals_diffusers(nets: tuple[diffusers.UNet2DConditionModel, UNet], size: tuple[int, int]) -> None:
    theirs, ours = nets
    x, timesteps, context = inputs(ours, size)
    oracle.assert_close(
        predict(ours, x, timesteps, context), theirs(x, timesteps, context).sample, NET, f"UNet at {size}"
    )


@torch.inference_mode()
def test_context_mask_equals_diffusers(nets: tuple[diffusers.UNet2DConditionModel, UNet]) -> None:
    theirs, ours = nets
    x, timesteps, context = inputs(ours, (16, 16))
    mask = torch.arange(77)[None] < torch.tensor([[12], [40]])  # [B, L]
    expected = theirs(x, timesteps, context, encoder_attention_mask=mask).sample
    oracle.assert_close(predict(ours, x, timesteps, context, mask[:, None, None]), expected, NET, "masked UNet")
    unmasked = predict(ours, x, timesteps, context)
    assert (unmasked - expected).abs().max() > 100 * NET, (
        "the mask changes nothing, so this test would not see its loss"
    )


@torch.inference_mode()
def test_hoisting_computes_what_a_step_would(nets: tuple[diffusers.UNet2DConditionModel, UNet]) -> None:
    """A row of the schedule's projections is what its timestep alone gives, whatever stands beside it."""
    _, unet = nets
    timesteps = torch.tensor([999.0, 500.5, 1.0])
    together = unet.project_time(timesteps)
    alone = torch.cat([unet.project_time(one[None]) for one in timesteps])
    torch.testing.assert_close(together, alone, rtol=HOISTED, atol=HOISTED)
    assert together.shape == (3, sum(unet.time_widths))


@torch.inference_mode()
def test_images_of_a_batch_take_their_own_timestep_and_context(
    nets: tuple[diffusers.UNet2DConditionModel, UNet],
) -> None:
    _, unet = nets
    x, timesteps, context = inputs(unet, (16, 16))
    both = predict(unet, x, timesteps, context)
    for index in range(2):
        one = slice(index, index + 1)
        alone = predict(unet, x[one], timesteps[one], context[one])
        oracle.assert_close(both[one], alone, NET, f"image {index} of the batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_onednn_ops_equal_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = oracle.unet(oracle.SD1_UNET)
    outs = []
    packed_before = len(onednn._weights._packed)
    for ops in (REFERENCE, onednn_ops()):
        unet = UNet(UNetConfig.from_json(dict(theirs.config)), ops)
        unet.load_state_dict(theirs.state_dict())
        unet.to(dtype).requires_grad_(False)
        x, timesteps, context = inputs(unet, (16, 16))
        outs.append(predict(unet, x.to(dtype), timesteps, context.to(dtype)))
    assert len(onednn._weights._packed) > packed_before, "nothing was packed: the reference is compared with itself"
    x, timesteps, context = inputs(unet, (16, 16))
    truth = theirs.double()(x.to(dtype).double(), timesteps, context.to(dtype).double()).sample
    plain, packed = (oracle.relative_l2(out, truth) for out in outs)
    measured("relative L2", packed, min(UNET_STEP[dtype], 2 * plain + 1e-6))
    assert packed <= UNET_STEP[dtype], f"relative L2 error {packed:.1e}"
    assert packed <= 2 * plain + 1e-6, f"packed errs {packed:.1e}, plain PyTorch {plain:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_time_is_embedded_in_fp32(dtype: torch.dtype) -> None:
    """In bf16 the angle of t = 999 is off by up to 2 radians: the sinusoid must not follow the net's dtype."""
    expected = diffusers.models.embeddings.get_timestep_embedding(
        torch.tensor([999.0, 37.5]), 320, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(
        sinusoid(torch.tensor([999.0, 37.5]).to(dtype).float(), 320),
        sinusoid(torch.tensor([999.0, 37.5]).to(dtype), 320),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(sinusoid(torch.tensor([999.0, 37.5]), 320), expected, rtol=0, atol=SINUSOID)


@pytest.mark.slow
@torch.inference_mode()
def test_full_sd15_config_equals_diffusers(tmp_path: Path) -> None:
    """All 860 million parameters, once, at 16×16 latents."""
    theirs = oracle.unet({"cross_attention_dim": 768})
    assert sum(p.numel() for p in theirs.parameters()) == 859_520_964
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_json(dict(theirs.config)))
    oracle.load(ours, theirs, "unet", tmp_path)
    x, timesteps, context = inputs(ours, (16, 16))
    oracle.assert_close(predict(ours, x, timesteps, context), theirs(x, timesteps, context).sample, NET, "SD 1.5")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("addition_embed_type", "text_time", "SDXL"),
        ("down_block_types", ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"], "must be a list of 4"),
        ("down_block_types", ["KDownBlock2D"] * 4, "unknown block type 'KDownBlock2D'"),
        ("block_out_channels", [320, "640"], "must be positive multiples"),
        ("block_out_channels", [321, 640, 1280, 1280], "multiples of norm_num_groups"),
        ("attention_head_dim", [8, 8], "list of 4"),
        ("attention_head_dim", 7, "do not divide"),
        ("class_embed_type", "timestep", "does not run this architecture"),
        ("in_channels", True, "positive integer"),
        ("norm_eps", float("nan"), "finite number"),
        ("layers_per_block", -1, "positive integer"),
    ],
)
def test_a_config_that_cannot_run_says_why(key: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"unet/config.json: {key}.*{says}"):
        UNetConfig.from_json({key: value})
