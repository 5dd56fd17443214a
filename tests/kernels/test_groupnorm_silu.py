"""The group norm kernels, two launches and one, against an fp64 truth, at most twice the reference's error."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsd.kernels.groupnorm_silu import Config, choose_chunks, choose_config, group_norm, plan_group_norm
from fastsd.ops import REFERENCE
from tests.kernels.case import DEVICE, DTYPES, Output, draw

# The interpreter computes masked lanes too, and exp(−y) of a large −y: infinities that nobody reads, or that SiLU divides by.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Width of a group: (C, C₂, groups). 4 to 80 are those of SD; some groups begin in x and end in the skip.
WIDTHS = {
    "1, instance norm": (5, 0, 5),
    "4": (128, 0, 32),
    "8": (64, 0, 8),
    "8, both of masked channels": (40, 24, 8),
    "10, 320 channels": (320, 0, 32),
    "10, one group in both": (35, 25, 6),
    "20, skip": (320, 320, 32),
    "30, one group in both": (70, 50, 4),
    "40, two masked tiles": (80, 0, 2),
    "60, one group in both": (160, 80, 4),
    "80, one group in both": (128, 112, 3),
    "all channels, one group": (48, 16, 1),
}


def norm(x: Tensor, groups: int, eps: float, w: Tensor, b: Tensor, silu: bool) -> Tensor:
    """fp64, from the definition."""
    grouped = x.double().unflatten(-1, (groups, -1))
    centred = grouped - grouped.mean((1, 2, 4), keepdim=True)
    normal = centred / (centred.square().mean((1, 2, 4), keepdim=True) + eps).sqrt()
    y = normal.flatten(-2) * w.double() + b.double()
    return y * torch.sigmoid(y) if silu else y


def check(
    x: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    skip: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """By both kernels, or as a config says."""
    both = x if skip is None else torch.cat((x, skip), -1)
    w = draw(both.shape[-1], seed=91, dtype=x.dtype, mean=1.0)
    b = draw(both.shape[-1], seed=92, dtype=x.dtype)
    truth, plain = norm(both, groups, eps, w, b, silu), REFERENCE.group_norm(x, w, b, groups, eps, silu, skip)
    batch, height, width, channels = x.shape
    rest = both.shape[-1] - channels
    chunks = choose_chunks(batch, height * width, channels, rest)
    for chosen in (None, chunks) if config is None else (config,):
        out = Output(*both.shape, dtype=x.dtype)
        assert group_norm(x, w, b, groups, eps, silu, skip, out.tensor, chosen) is out.tensor
        out.check("group_norm", truth, plain)


@by_dtype
@pytest.mark.parametrize(("channels", "skip_channels", "groups"), WIDTHS.values(), ids=WIDTHS)
def test_width_of_a_group(dtype: torch.dtype, channels: int, skip_channels: int, groups: int) -> None:
    x = draw(2, 3, 6, channels, seed=0, dtype=dtype, mean=2.0)
    skip = draw(2, 3, 6, skip_channels, seed=1, dtype=dtype, scale=3.0) if skip_channels else None
    check(x, groups, skip=skip, silu=groups % 2 == 0)


@by_dtype
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1),  # a pixel: each group has only its channels
        (1, 1, 17),  # one row, one pixel over a tile
        (1, 16, 16),  # no masks
        (1, 9, 7),  # 63 pixels, one short of whole tiles
        (3, 2, 1),  # fewer pixels than the smallest tile
    ],
    ids=str,
)
def test_size_of_an_image(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    check(draw(*size, 32, seed=2, dtype=dtype), groups=8)


# On small images the chooser gives neither several tiles a CTA nor several merges.
CONFIGS = {
    "4 tiles a CTA, the last of 1 pixel": (Config(16, 16, 4, 4), (7, 7)),
    "last chunk has fewer tiles": (Config(16, 32, 3, 4), (8, 10)),
    "one chunk for all": (Config(16, 32, 8, 4), (9, 10)),
    "two merges, the last chunk of one pixel": (Config(2, 32, 1, 4), (5, 5)),
    "one kernel, 4 tiles, the last of 1 pixel": (Config(16, 128, 0, 4), (7, 7)),
    "one kernel, a pixel a tile": (Config(1, 128, 0, 4), (3, 5)),
}


@by_dtype
@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_chunks(dtype: torch.dtype, config: Config, size: tuple[int, int]) -> None:
    """A drift over the image makes the chunks' means differ, so that a wrong merge shows."""
    drift = torch.linspace(-20, 20, size[0])[None, :, None, None].to(dtype)
    check(draw(1, *size, 80, seed=3, dtype=dtype) + drift.to(DEVICE), groups=1, silu=False, config=config)


@by_dtype
@pytest.mark.parametrize("mean", [100.0, -1000.0, 30000.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_mean_far_above_the_deviation(dtype: torch.dtype, mean: float, eps: float) -> None:
    """|mean| / std of 100 and 1000; 30,000 overflows fp16 in a square, and fp16 keeps only multiples of 16 there."""
    scale = 30.0 if mean == 30000.0 else 1.0
    x = draw(1, 9, 8, 40, seed=4, dtype=dtype, scale=scale, mean=mean)
    check(x, groups=4, eps=eps, silu=False)


@by_dtype
def test_means_that_differ_between_x_and_skip(dtype: torch.dtype) -> None:
    """One group lies in both: its pivot is of x, 500 away from the skip."""
    x, skip = draw(2, 6, 6, 48, seed=5, dtype=dtype, mean=500.0), draw(2, 6, 6, 16, seed=6, dtype=dtype)
    check(x, groups=2, skip=skip)


@by_dtype
def test_a_first_value_far_from_all_others(dtype: torch.dtype) -> None:
    """The pivot is then a bad one, at worst √N deviations from the mean."""
    x = draw(1, 16, 16, 32, seed=7, dtype=dtype)
    x[0, 0, 0, 0] = 1000.0
    check(x, groups=4, silu=False)


@by_dtype
def test_small_values_are_ruled_by_eps(dtype: torch.dtype) -> None:
    for eps in (1e-5, 1e-6):
        check(draw(1, 4, 5, 16, seed=8, dtype=dtype, scale=1e-3), groups=4, eps=eps, silu=False)


@by_dtype
def test_constant_input_gives_the_bias(dtype: torch.dtype) -> None:
    x, w, b = (
        torch.full((1, 5, 5, 16), 300.0, dtype=dtype),
        draw(16, seed=9, dtype=dtype),
        draw(16, seed=10, dtype=dtype),
    )
    y = group_norm(x.to(w.device), w, b, 4, 1e-6)
    assert torch.equal(y, b.expand_as(y)), f"off by {(y - b).abs().max():.1e}"


@by_dtype
def test_silu_of_large_values_is_finite(dtype: torch.dtype) -> None:
    """exp(−y) is infinite in fp32 from y = −89 on."""
    x, b = draw(1, 4, 4, 8, seed=11, dtype=dtype), torch.zeros(8, dtype=dtype)
    w = torch.full((8,), 200.0, dtype=dtype)
    out = Output(1, 4, 4, 8, dtype=dtype)
    group_norm(x, w.to(x.device), b.to(x.device), 2, 1e-5, silu=True, out=out.tensor)
    out.check("group_norm", norm(x, 2, 1e-5, w.to(x.device), b.to(x.device), silu=True))


@pytest.mark.parametrize("config", [None, choose_chunks(2, 9, 32)], ids=["one kernel", "two"])
def test_images_and_groups_do_not_mix(config: Config | None) -> None:
    """NaN in one group of one image stays there, though its tile holds other groups."""
    x = draw(2, 3, 3, 32, seed=12)
    x[1, 2, 2, 9] = float("nan")
    y = group_norm(x, torch.ones_like(x[0, 0, 0]), torch.zeros_like(x[0, 0, 0]), 4, 1e-5, config=config)
    poisoned = y.isnan()
    assert poisoned[1, :, :, 8:16].all()
    assert int(poisoned.sum()) == 9 * 8, f"{int(poisoned.sum())} elements are NaN, {9 * 8} are of the poisoned group"


def test_same_bits_again() -> None:
    x, w = draw(2, 6, 6, 64, seed=13, dtype=torch.float16), draw(64, seed=14, dtype=torch.float16)
    assert torch.equal(group_norm(x, w, w, 8, 1e-5, True), group_norm(x, w, w, 8, 1e-5, True))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, height, width = (data.draw(st.integers(1, top), label=name) for name, top in (("B", 2), ("H", 9), ("W", 9)))
    groups, group = (
        data.draw(st.integers(1, 6), label="groups"),
        data.draw(st.integers(2, 20), label="width of a group"),
    )
    channels = data.draw(st.integers(1, groups * group), label="channels of x")
    dtype, silu = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    x = draw(batch, height, width, channels, seed=15, dtype=dtype, mean=5.0)
    rest = groups * group - channels
    check(x, groups, silu=silu, skip=draw(batch, height, width, rest, seed=16, dtype=dtype) if rest else None)


# (B, H·W, C, C₂) of SD 1.5's UNet at batch 2 and its VAE, whose CTAs should fill a GPU of 132 SMs twice.
LARGE = [
    (2, 4096, 320, 0),
    (2, 4096, 320, 320),
    (2, 1024, 640, 0),
    (2, 1024, 1280, 640),
    (2, 256, 1280, 1280),
    (2, 64, 1280, 1280),
    (1, 4096, 512, 0),
    (1, 1024 * 1024, 128, 0),
]


@pytest.mark.parametrize(("batch", "pixels", "channels", "skip_channels"), LARGE)
def test_large_shapes_fill_the_gpu(batch: int, pixels: int, channels: int, skip_channels: int) -> None:
    x = torch.empty(batch, pixels, 1, channels, dtype=torch.float16, device="meta")
    skip = torch.empty(batch, pixels, 1, skip_channels, dtype=torch.float16, device="meta") if skip_channels else None
    w = torch.empty(channels + skip_channels, dtype=torch.float16, device="meta")
    out = torch.empty(batch, pixels, 1, channels + skip_channels, dtype=torch.float16, device="meta")
    config = choose_chunks(batch, pixels, channels, skip_channels)
    for launch in plan_group_norm(x, w, w, 32, 1e-5, True, skip, out, config):
        tiles, chunks, images = launch.grid
        assert 264 <= tiles * chunks * images <= 2048, f"{launch.grid} CTAs"
        assert (chunks - 1) * config.block_pixels * config.steps < pixels <= chunks * config.block_pixels * config.steps


def test_small_images_take_one_launch() -> None:
    x, w = torch.empty(2, 32, 32, 640, dtype=torch.float16, device="meta"), torch.empty(640, device="meta")
    assert len(plan_group_norm(x, w, w, 32, 1e-5, True, None, x)) == 1
    assert choose_config(2, 4096, 320, 32) == choose_chunks(2, 4096, 320)


REFUSED = {
    "NHWC view of NCHW": (lambda x, w: group_norm(x.permute(0, 2, 3, 1), w[:3], w[:3], 3, 1e-5), "contiguous"),
    "every other pixel": (lambda x, w: group_norm(x[:, ::2], w, w, 2, 1e-5), "contiguous"),
    "float64": (lambda x, w: group_norm(x.double(), w, w, 2, 1e-5), "fp16, bf16 or fp32"),
    "skip of another dtype": (lambda x, w: group_norm(x, w.repeat(2), w.repeat(2), 2, 1e-5, skip=x.half()), "as x"),
    "skip of another size": (lambda x, w: group_norm(x, w.repeat(2), w.repeat(2), 2, 1e-5, skip=x[:, :2]), "skip"),
    "weights of x alone": (lambda x, w: group_norm(x, w, w, 2, 1e-5, skip=x), "w must be"),
    "groups that do not divide": (lambda x, w: group_norm(x, w, w, 3, 1e-5), "groups"),
    "no pixels": (lambda x, w: group_norm(x[:, :0], w, w, 2, 1e-5), "elements"),
    "tokens": (lambda x, w: group_norm(x[0], w, w, 2, 1e-5), "B, H, W, C"),
    "another device": (lambda x, w: group_norm(x, w.to("meta"), w, 2, 1e-5), "meta"),
}


@pytest.mark.parametrize(("call", "why"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call(draw(1, 3, 4, 8, seed=17), draw(8, seed=18))
