"""Pictures whose edges meet: against circular padding in PyTorch and diffusers; what it means; what is kept."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.backends import onednn_ops
from fastsd.denoise import Denoiser
from fastsd.errors import ParameterError
from fastsd.graph import Graphs
from fastsd.hires import UPSCALERS, enlarge
from fastsd.jobs import check_job, check_requests
from fastsd.kernels import onednn
from fastsd.metadata import parse_parameters
from fastsd.models.unet import UNet
from fastsd.ops import REFERENCE, Ops, Wrap, upsample
from fastsd.replay import read_replay
from fastsd.result import Result
from fastsd.seamless import WRAPS, seamless
from fastsd.vae_tiles import tiled
from tests import oracle
from tests.oracle import assert_same_picture, psnr
from tests.small_model import SMALL_MODEL
from tests.test_graph import StandIn
from tests.tolerances import NET

PROMPT = "a large red circle in the center on a white background"
BOTH: Wrap = (True, True)
TILINGS = [True, "x", "y"]
OP_SETS = [REFERENCE, *([onednn_ops()] if onednn.available() else [])]
by_tiling = pytest.mark.parametrize("tiling", TILINGS)
by_ops = pytest.mark.parametrize("ops", OP_SETS, ids=lambda ops: ops.name)


def padded(x: Tensor, beside: int, above: int, wrap: Wrap) -> Tensor:
    """x [B, C, H, W] as PyTorch pads it, one direction after the other."""
    for pad, meets in (((beside, beside, 0, 0), wrap[0]), ((0, 0, above, above), wrap[1])):
        x = F.pad(x, pad, mode="circular" if meets and any(pad) else "constant")
    return x


def circular(net: nn.Module, wrap: Wrap) -> nn.Module:
    """diffusers' net with every convolution's padding set to circular; one direction alone has no such switch."""
    for conv in (part for part in net.modules() if isinstance(part, nn.Conv2d)):
        if all(wrap):
            conv.padding_mode = "circular"
        else:

            def forward(x: Tensor, conv: nn.Conv2d = conv) -> Tensor:
                above, beside = conv.padding
                return F.conv2d(padded(x, int(beside), int(above), wrap), conv.weight, conv.bias, conv.stride)

            conv.forward = forward
    return net


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The ops.


@by_ops
@by_tiling
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d(ops: Ops, tiling: bool | str, stride: int) -> None:
    x, w, b, wrap = draw(2, 7, 6, 16, seed=0), draw(8, 16, 3, 3, seed=1) / 12, draw(8, seed=2), WRAPS[tiling]
    y = ops.conv2d(x, w, b, stride, (1, 1, 1, 1), wrap=wrap)
    oracle.assert_close(oracle.nchw(y), F.conv2d(padded(oracle.nchw(x), 1, 1, wrap), w, b, stride), NET, "conv2d")


@by_ops
def test_padding_that_differs_from_side_to_side_stays_zeros(ops: Ops) -> None:
    """The VAE's downsample: there diffusers pads by itself, whatever its convolutions' padding_mode."""
    x, w = draw(2, 6, 6, 16, seed=0), draw(8, 16, 3, 3, seed=1)
    pads = ops.conv2d(x, w, None, 2, (0, 1, 0, 1), wrap=BOTH)
    assert torch.equal(pads, ops.conv2d(x, w, None, 2, (0, 1, 0, 1)))
    one_way = F.conv2d(F.pad(padded(oracle.nchw(x), 1, 0, BOTH), (0, 0, 0, 1)), w, None, 2)
    oracle.assert_close(oracle.nchw(ops.conv2d(x, w, None, 2, (1, 1, 0, 1), wrap=BOTH)), one_way, NET, "one way")


@by_ops
@by_tiling
@pytest.mark.parametrize("size", [None, (9, 8)])
def test_upsample_conv2d(ops: Ops, tiling: bool | str, size: tuple[int, int] | None) -> None:
    x, w, b = draw(1, 5, 4, 16, seed=0), draw(8, 16, 3, 3, seed=1) / 12, draw(8, seed=2)
    large = F.interpolate(oracle.nchw(x), size or (10, 8), mode="nearest")
    expected = F.conv2d(padded(large, 1, 1, WRAPS[tiling]), w, b)
    oracle.assert_close(oracle.nchw(ops.upsample_conv2d(x, w, b, size, WRAPS[tiling])), expected, NET, "upsample")


@by_ops
@by_tiling
def test_conv2d_norm(ops: Ops, tiling: bool | str) -> None:
    x, w, b, time = draw(2, 4, 6, 16, seed=0), draw(8, 16, 3, 3, seed=1) / 12, draw(8, seed=2), draw(2, 8, seed=3)
    y = F.conv2d(padded(oracle.nchw(x), 1, 1, WRAPS[tiling]), w, b) + time[:, :, None, None]
    expected = F.silu(F.group_norm(y, 4, b, b, 1e-5))
    found = ops.conv2d_norm(x, w, b, time, b, b, 4, 1e-5, WRAPS[tiling])
    oracle.assert_close(oracle.nchw(found), expected, NET, "conv2d_norm")


# The nets.


@pytest.fixture(scope="module")
def random_pipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fastsd.Pipeline]:
    path = oracle.save_random_model(tmp_path_factory.mktemp("seamless"), "sd1")
    return path, fastsd.Pipeline(path, device="cpu", backend="reference")


@by_tiling
@pytest.mark.parametrize("size", [(16, 24), (10, 18)], ids=["even", "odd on the way"])
@torch.inference_mode()
def test_unet_equals_diffusers(
    random_pipe: tuple[Path, fastsd.Pipeline], tiling: bool | str, size: tuple[int, int]
) -> None:
    path, pipe = random_pipe
    theirs = circular(diffusers.UNet2DConditionModel.from_pretrained(path / "unet"), WRAPS[tiling])
    x, context = draw(1, 4, *size, seed=0), draw(1, 77, 48, seed=1)
    time = torch.tensor([301.0])

    def ours(unet: UNet) -> Tensor:
        return oracle.nchw(unet(oracle.nhwc(x), unet.project_time(time), unet.project_context(context)))

    expected = theirs(x, time, context).sample
    oracle.assert_close(ours(seamless(pipe.unet, WRAPS[tiling])), expected, NET, f"UNet, {tiling}")
    assert (ours(pipe.unet) - expected).abs().max() > 100 * NET, "the edges change nothing, so this compares nothing"


@by_tiling
@torch.inference_mode()
def test_vae_equals_diffusers(random_pipe: tuple[Path, fastsd.Pipeline], tiling: bool | str) -> None:
    path, pipe = random_pipe
    theirs = circular(diffusers.AutoencoderKL.from_pretrained(path / "vae"), WRAPS[tiling])
    ours, image = seamless(pipe.vae, WRAPS[tiling]), draw(1, 3, 48, 32, seed=0).clamp(-1, 1)
    mean, _ = ours.moments(oracle.nhwc(image))
    expected = theirs.encode(image).latent_dist.mean
    oracle.assert_close(oracle.nchw(mean), expected, NET, f"mean, {tiling}")
    decoded = ours.decode(oracle.nhwc(expected * ours.config.scaling_factor))
    oracle.assert_close(oracle.nchw(decoded), theirs.decode(expected).sample, NET, f"image, {tiling}")


def test_a_net_and_its_seamless_twin_are_one_in_their_weights() -> None:
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")
    twin = seamless(pipe.unet, BOTH)
    assert seamless(pipe.unet, BOTH) is twin, "it is made anew at each call"
    assert seamless(pipe.unet, (False, False)) is pipe.unet
    assert twin is not seamless(pipe.unet, (True, False))
    assert all(a is b for a, b in zip(pipe.unet.parameters(), twin.parameters(), strict=True))
    pipe.unet.conv_out.weight = nn.Parameter(torch.zeros_like(pipe.unet.conv_out.weight), requires_grad=False)
    assert seamless(pipe.unet, BOTH).conv_out.weight is pipe.unet.conv_out.weight, "a replaced weight is not seen"
    gone = weakref.ref(seamless(pipe.unet, BOTH))
    del pipe, twin
    gc.collect()
    assert gone() is None, "the twin outlives its net"


# Pictures.


@by_tiling
def test_pictures_equal_diffusers(pipe: fastsd.Pipeline, small_model: Path, tiling: bool | str) -> None:
    theirs = oracle.load_pipeline(small_model)
    for net in (theirs.unet, theirs.vae):
        circular(net, WRAPS[tiling])
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "height": 48, "width": 56}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(5), **given).images
    assert_same_picture(pipe.generate(PROMPT, seed=5, tiling=tiling, **given).images, expected, f"tiling {tiling}")
    plain = pipe.generate(PROMPT, seed=5, **given).images
    assert psnr(plain, expected) < 40, "the edges change nothing, so this compares nothing"


def test_random_weights_equal_diffusers(random_pipe: tuple[Path, fastsd.Pipeline]) -> None:
    path, pipe = random_pipe
    theirs = oracle.load_pipeline(path)
    for net in (theirs.unet, theirs.vae):
        circular(net, BOTH)
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "height": 64, "width": 64}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(5), **given).images
    assert_same_picture(pipe.generate(PROMPT, seed=5, tiling=True, **given).images, expected, "random weights")


def test_image_to_image_equals_diffusers(pipe: fastsd.Pipeline, small_model: Path) -> None:
    """The encoder too has edges that meet."""
    theirs = diffusers.StableDiffusionImg2ImgPipeline(
        **oracle.load_pipeline(small_model).components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    for net in (theirs.unet, theirs.vae):
        circular(net, BOTH)
    image = np.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    given: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 6, "output_type": "np"}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(5), **given).images
    assert_same_picture(pipe.generate(PROMPT, seed=5, tiling=True, **given).images, expected, "image to image")


@by_tiling
def test_turning_the_noise_turns_the_picture(pipe: fastsd.Pipeline, tiling: bool | str) -> None:
    """Where edges meet, a picture has no place of its own: its edges can be drawn in its middle, and nothing changes.

    It is turned by a multiple of the UNet's stride, 4 latents of 4 pixels.
    """
    given: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "seed": 1, "output_type": "np"}
    noise, (across, down) = draw(1, 4, 16, 16, seed=7), WRAPS[tiling]
    other = noise.roll((8 * down, 8 * across), (2, 3))
    still, turned = (pipe.generate(PROMPT, latents=x, tiling=tiling, **given).images for x in (noise, other))
    assert_same_picture(turned, np.roll(still, (32 * down, 32 * across), (1, 2)), f"turned, {tiling}")
    still, turned = (pipe.generate(PROMPT, latents=x, **given).images for x in (noise, other))
    apart = psnr(turned, np.roll(still, (32 * down, 32 * across), (1, 2)))
    assert apart < 40, "it holds for any picture, so this shows nothing"


@by_tiling
@pytest.mark.parametrize("upscaler", UPSCALERS)
def test_a_second_pass_begins_from_edges_that_meet(pipe: fastsd.Pipeline, tiling: bool | str, upscaler: str) -> None:
    """What is enlarged by 1.5 turns as well: an edge's neighbours are those beyond the opposite one."""
    options = {"prompt": PROMPT, "hires_scale": 1.5, "hires_upscaler": upscaler, "tiling": tiling}
    [asked] = check_requests([options], fastsd.Pipeline.generate)
    job = check_job(pipe.config, pipe.noise_schedule, asked)
    assert job.hires is not None
    latents, (across, down) = draw(1, 16, 16, 4, seed=7).clamp(-1, 1), WRAPS[tiling]

    def pictures(x: Tensor) -> Tensor:
        return enlarge(job.hires, job.request, x, lambda z: upsample(upsample(z))[..., :3])[1].pictures

    unit = 1 if upscaler != "lanczos" else 4
    still, turned = pictures(latents), pictures(latents.roll((8 * down, 8 * across), (1, 2)))
    expected = still.roll((12 * unit * down, 12 * unit * across), (1, 2))
    oracle.assert_close(turned, expected, NET, f"enlarged, {tiling}")
    assert turned.shape[1:3] == (24 * unit, 24 * unit)


# What goes on beside it.


def test_pictures_of_every_kind_in_one_batch_and_after_each_other(pipe: fastsd.Pipeline) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3, "output_type": "np"}
    given |= {"height": 32, "width": 32}
    alone = {tiling: pipe.generate(tiling=tiling, **given).images for tiling in WRAPS}
    assert np.array_equal(pipe.generate(**given).images, alone[False]), "what wraps was left behind"
    together = pipe.generate_batch([{"tiling": tiling, **given} for tiling in WRAPS])
    for tiling, result in zip(WRAPS, together, strict=True):
        assert isinstance(result, Result), repr(result)
        assert_same_picture(result.images, alone[tiling], f"tiling {tiling} in a batch")


def test_captured_graphs_do_not_mix_them_up(pipe: fastsd.Pipeline) -> None:
    replayed, api = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference"), StandIn()
    replayed.graphs = Graphs(api, 10_000)
    replayed._denoiser = Denoiser(replayed.unet, replayed.ops, replayed.graphs)
    given: dict[str, Any] = {"num_inference_steps": 1, "seed": 3, "output_type": "np", "height": 16, "width": 16}
    expected = {tiling: pipe.generate(PROMPT, tiling=tiling, **given).images for tiling in (False, True)}
    for turn in range(3):
        for tiling in expected:
            drawn = replayed.generate(PROMPT, tiling=tiling, **given).images
            assert_same_picture(drawn, expected[tiling], f"{tiling}, turn {turn}")
    assert api.replays >= 2 * 2 * 2, "steps and decodes of the second and third turn are not replayed"


def test_weights_that_change_are_seen() -> None:
    """As adapters change them: in place, and packed copies with them."""
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu")
    given: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "output_type": "np", "tiling": True}
    first = pipe.generate(PROMPT, **given).images
    weight = pipe.unet.conv_in.weight
    before = weight.clone()
    weight.mul_(0.5)
    assert psnr(pipe.generate(PROMPT, **given).images, first) < 40
    weight.copy_(before)
    assert np.array_equal(pipe.generate(PROMPT, **given).images, first)


@pytest.mark.parametrize("size", [(18, 24), (14, 24), (12, 24)])
@torch.inference_mode()
def test_a_vae_in_tiles(pipe: fastsd.Pipeline, size: tuple[int, int]) -> None:
    """At the edges it is as near to the whole VAE as it is elsewhere; between zeros it is two or three times as far."""
    latents = draw(1, *size, 4, seed=0)
    whole = seamless(pipe.vae, BOTH).decode(latents)

    def error(decode: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        difference = decode(latents) - whole
        edges = torch.cat([difference[:, [0, -1]].flatten(), difference[:, :, [0, -1]].flatten()])
        return edges.pow(2).mean().sqrt().item(), difference.pow(2).mean().sqrt().item()

    edges, everywhere = error(tiled(pipe.vae, 16, BOTH).decode)
    assert edges <= 1.2 * everywhere, f"{edges:.3f} at the edges, {everywhere:.3f} everywhere"
    apart, _ = error(tiled(pipe.vae, 16).decode)
    assert apart > 2 * edges, f"{apart:.3f} where edges do not meet, so this shows nothing"


def test_a_picture_in_tiles_is_told_of_its_edges(pipe: fastsd.Pipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 1, "seed": 3, "output_type": "np", "height": 96, "width": 80}
    whole, in_tiles = (pipe.generate(PROMPT, tiling=True, vae_tiling=vae, **given).images for vae in (False, True))
    latents = pipe.generate(PROMPT, tiling=True, **given | {"output_type": "latent"}).images
    apart = pipe.decode_latents(latents, "np", vae_tiling=True)
    edges = [np.abs(x - whole)[:, :, [0, -1]].mean() for x in (in_tiles, apart)]
    assert 0 < edges[0] < edges[1] / 2, (
        f"{edges[0]:.1e} from the whole VAE's picture; where edges do not meet {edges[1]:.1e}"
    )


def test_half_precision_that_overflows_is_repeated_with_the_same_edges() -> None:

    def overflowing(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        y = REFERENCE.conv2d(x, *arguments, **options)
        return y * torch.inf if y.dtype == torch.bfloat16 else y

    half = fastsd.Pipeline(SMALL_MODEL, device="cpu", dtype="bfloat16", backend=replace(REFERENCE, conv2d=overflowing))
    x, notes = draw(1, 8, 8, 4, seed=0), list[str]()
    with torch.no_grad():
        decoded = half._finite("decode", [x], notes, wrap=BOTH)
        full = copy.deepcopy(half.vae).float()
        expected, plain = seamless(full, BOTH).decode(x), full.decode(x)
    assert notes == ["vae: non-finite values in torch.bfloat16; computed again in float32"]
    oracle.assert_close(decoded, expected, NET, "the picture in fp32")
    assert (decoded - plain).abs().max() > 100 * NET, "the edges change nothing, so this compares nothing"


@pytest.mark.parametrize("wrong", [1, 0, None, "both", "X", ("x", "y"), float("nan")])
def test_other_values_are_refused(pipe: fastsd.Pipeline, wrong: Any) -> None:
    with pytest.raises(ParameterError, match="tiling: must be True, False, 'x' or 'y', not"):
        pipe.generate(PROMPT, tiling=wrong)


def test_a_part_of_a_picture_has_no_edges_that_meet(pipe: fastsd.Pipeline) -> None:
    image, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255)
    with pytest.raises(ParameterError, match="tiling: the edges of a part do not meet"):
        pipe.generate(PROMPT, image=image, mask_image=mask, padding_mask_crop=8, tiling="x")


# Files and the command line.


@pytest.mark.parametrize("tiling", WRAPS)
def test_a_file_says_so(pipe: fastsd.Pipeline, tiling: bool | str) -> None:
    [text] = pipe.generate(PROMPT, num_inference_steps=1, seed=3, tiling=tiling).parameters
    assert (f"Tiling: {tiling}," in text) == bool(tiling)
    assert parse_parameters(text).get("tiling", False) == tiling
    assert read_replay(text).arguments.get("tiling", False) == tiling


def test_what_the_web_ui_writes_is_replayed() -> None:
    asked = read_replay(
        "a stone wall\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Tiling: True, RNG: CPU"
    )
    assert asked.arguments["tiling"] is True
    assert not asked.lost
    other = read_replay("a stone wall\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Tiling: maybe")
    assert "tiling" not in other.arguments
    assert "Tiling: maybe" in other.lost


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    given = ["-p", "a", "--steps", "1", "-s", "3", "-W", "16", "-H", "16", "--tiling", "both", "-o", str(path), "-q"]
    done = CliRunner().invoke(cli.app, ["generate", *given])
    assert done.exit_code == 0, done.output
    with Image.open(path) as image:
        assert "Tiling: True," in image.info["parameters"]
    done = CliRunner().invoke(cli.app, ["generate", "-p", "a", "--tiling", "z"])
    assert done.exit_code == 2
    assert "'z' is not one of 'x', 'y', 'both'" in done.output
