"""The convolution kernels against fp64, and against plain PyTorch in the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsd.kernels import conv2d, conv2d_norm, groupnorm_silu
from fastsd.kernels.gemm import Config
from fastsd.ops import REFERENCE, Shortcut
from tests.kernels.case import DTYPES, Output, draw

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SAME = (1, 1, 1, 1)
CONVS = {
    # batch, height, width, in, out, window, stride, pad
    "stride 1": (2, 5, 7, 20, 33, 3, 1, SAME),
    "stride 2 of the UNet": (1, 8, 6, 32, 24, 3, 2, SAME),
    "stride 2 of the UNet, odd size": (2, 7, 5, 16, 16, 3, 2, SAME),
    "stride 2 of the VAE": (1, 8, 6, 24, 32, 3, 2, (0, 1, 0, 1)),
    "stride 2 of the VAE, odd size": (2, 7, 5, 16, 20, 3, 2, (0, 1, 0, 1)),
    "lopsided": (1, 5, 4, 16, 16, 3, 1, (2, 0, 0, 1)),
    "no padding": (1, 5, 4, 16, 16, 3, 1, (0, 0, 0, 0)),
    "1x1": (2, 3, 5, 20, 70, 1, 1, (0, 0, 0, 0)),
    "1x1, stride 2": (1, 6, 5, 16, 16, 1, 2, (0, 0, 0, 0)),
    "conv_in": (2, 6, 6, 4, 40, 3, 1, SAME),
    "conv_in of pictures": (1, 6, 6, 3, 16, 3, 1, SAME),
    "conv_out": (2, 6, 6, 40, 4, 3, 1, SAME),
    "one pixel": (1, 1, 1, 48, 16, 3, 1, SAME),
    "one row": (1, 1, 9, 16, 16, 3, 1, SAME),
}


def wide(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def draw_weights(n: int, c: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draw(n, c, r, r, seed=1, dtype=dtype, scale=(c * r * r) ** -0.5), draw(n, seed=2, dtype=dtype)


@by_dtype
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)
def test_conv2d(dtype: torch.dtype, case: tuple) -> None:
    batch, height, width, c, n, r, stride, pad = case
    x = draw(batch, height, width, c, seed=0, dtype=dtype)
    w, b = draw_weights(n, c, r, dtype)
    truth = REFERENCE.conv2d(*wide((x, w, b)), stride, pad)
    out = Output(*truth.shape, dtype=dtype)
    conv2d.conv2d(x, w, b, stride, pad, out=out.tensor)
    out.check("conv2d", truth, REFERENCE.conv2d(x, w, b, stride, pad))


CONFIGS = {
    "chosen": None,
    "whole": Config(32, 32, 16, 4, 2),
    "a split that divides nothing": Config(16, 16, 16, 4, 2, 5),
    "parts that stay empty": Config(16, 32, 32, 4, 2, 15),
    "a tile of several images": Config(64, 32, 16, 4, 2),
}


@by_dtype
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("skip_channels", [None, 0, 24], ids=["residual", "shortcut", "shortcut of two"])
def test_epilogue(dtype: torch.dtype, config: Config | None, skip_channels: int | None) -> None:
    """Bias, each image's own time row (a slice of a longer one), and the ResBlock's other branch, in one rounding."""
    x, (w, b) = draw(3, 4, 4, 40, seed=0, dtype=dtype), draw_weights(36, 40, 3, dtype)
    time = draw(3, 100, seed=3, dtype=dtype)[:, 20:56]
    residual, shortcut = None, None
    if skip_channels is None:
        residual = draw(3, 4, 4, 36, seed=4, dtype=dtype)
    else:
        more = draw(3, 4, 4, 20, seed=5, dtype=dtype)
        skip = draw(3, 4, 4, skip_channels, seed=6, dtype=dtype) if skip_channels else None
        shortcut = Shortcut(more, skip, *draw_weights(36, 20 + skip_channels, 1, dtype))
    double = None if shortcut is None else Shortcut(*wide(shortcut))
    x64, w64, b64, time64, residual64 = wide((x, w, b, time, residual))
    out = Output(3, 4, 4, 36, dtype=dtype)
    conv2d.conv2d(x, w, b, 1, SAME, time, residual, shortcut, out=out.tensor, config=config)
    truth = REFERENCE.conv2d(x64, w64, b64, 1, SAME, time64, residual64, double)
    out.check("conv2d", truth, REFERENCE.conv2d(x, w, b, 1, SAME, time, residual, shortcut))


@by_dtype
@pytest.mark.parametrize("size", [None, (9, 8), (10, 7), (9, 7)])
@pytest.mark.parametrize("config", [None, Config(16, 16, 16, 4, 2, 3)], ids=["chosen", "split"])
def test_upsample_conv2d(dtype: torch.dtype, size: tuple[int, int] | None, config: Config | None) -> None:
    x, (w, b) = draw(2, 5, 4, 24, seed=0, dtype=dtype), draw_weights(20, 24, 3, dtype)
    truth = REFERENCE.upsample_conv2d(*wide((x, w, b)), size)
    out = Output(*truth.shape, dtype=dtype)
    conv2d.upsample_conv2d(x, w, b, size, out=out.tensor, config=config)
    out.check("conv2d", truth, REFERENCE.upsample_conv2d(x, w, b, size))


def test_phase_weights_are_summed_in_fp32() -> None:
    """2048 and three ones are 2051, which fp16 rounds to 2052; one by one they would stay 2048."""
    w = torch.ones(1, 1, 3, 3, dtype=torch.float16)
    w[0, 0, 1, 1] = 2048.0
    phases = conv2d.pack_phases(w).flatten(1).tolist()
    assert phases == [[1, 2, 2, 2052], [2, 1, 2052, 2], [2, 2052, 1, 2], [2052, 2, 2, 1]]


NORMS = {
    # batch, height, width, in, out, groups, config
    "statistics in the epilogue": (2, 8, 8, 24, 40, 4, Config(32, 32, 16, 4, 2)),
    "one kernel that adds a split and normalises": (2, 8, 8, 40, 48, 8, Config(32, 16, 16, 4, 2, 5)),
    "the same, pixels and channels masked": (2, 5, 7, 24, 40, 4, Config(32, 32, 16, 4, 2, 3)),
    "statistics where a split is added": (2, 16, 16, 16, 128, 1, Config(64, 64, 16, 4, 2, 2)),
    "an image that tiles do not divide": (2, 5, 7, 24, 40, 4, Config(32, 32, 16, 4, 2)),
    "so many chunks that they are condensed": (1, 16, 16, 8, 16, 4, Config(16, 16, 16, 4, 2)),
    "a group over two tiles of channels": (1, 4, 4, 16, 60, 3, Config(16, 16, 16, 4, 2)),
    "chosen": (2, 8, 8, 32, 64, 32, None),
}


@by_dtype
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_conv2d_norm(dtype: torch.dtype, case: tuple, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias carries the mean: a hundred times the deviation, taken off again by the norm."""
    monkeypatch.setattr(groupnorm_silu, "MERGED", 4)
    batch, height, width, c, n, groups, config = case
    x, (w, b) = draw(batch, height, width, c, seed=0, dtype=dtype), draw_weights(n, c, 3, dtype)
    b = b + mean
    time, norm = draw(batch, n, seed=3, dtype=dtype), [draw(n, seed=seed, dtype=dtype) for seed in (4, 5)]
    out = Output(batch, height, width, n, dtype=dtype)
    conv2d_norm.conv2d_norm(x, w, b, time, *norm, groups, 1e-5, out=out.tensor, config=config)
    truth = REFERENCE.conv2d_norm(*wide((x, w, b, time, *norm)), groups, 1e-5)
    plain = REFERENCE.conv2d_norm(x, w, b, time, *norm, groups, 1e-5)
    if (
        dtype == torch.float16 and mean
    ):  # the convolution's output is rounded to 1/16 beside 100: only as good as PyTorch
        error, limit = ((one - truth).norm() for one in (out.tensor, plain))
        assert out.tensor.isfinite().all()
        assert error <= 2 * limit, f"error {error:.1e}, plain PyTorch's is {limit:.1e}"
    else:
        out.check("conv2d_norm", truth, plain)


@pytest.mark.parametrize("config", [None, Config(16, 16, 16, 4, 2, 2)], ids=["whole", "split"])
def test_a_norm_without_time_row(config: Config | None) -> None:
    x, (w, b), norm = draw(1, 4, 4, 16, seed=0), draw_weights(16, 16, 3, torch.float32), draw(2, 16, seed=3)
    y = conv2d_norm.conv2d_norm(x, w, b, None, norm[0], norm[1], 4, 1e-5, config=config)
    torch.testing.assert_close(y, REFERENCE.conv2d_norm(x, w, b, None, norm[0], norm[1], 4, 1e-5))


def test_weights_in_channels_last() -> None:
    """So the pipeline holds them: PyTorch's convolutions on NHWC want that, and packing copies nothing."""
    x, (w, b) = draw(1, 4, 4, 16, seed=0), draw_weights(16, 16, 3, torch.float32)
    last = w.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv2d.conv2d(x, last, b, pad=SAME), REFERENCE.conv2d(x, w, b, 1, SAME))
    assert conv2d.pack_cached(last).data_ptr() == last.data_ptr()


def test_runs_twice_to_the_same_bits() -> None:
    x, (w, b) = draw(1, 8, 8, 128, seed=0, dtype=torch.float16), draw_weights(32, 128, 3, torch.float16)
    assert conv2d.choose_config(64, 32, 128, 9, 1, torch.float16, 90).split_k > 1
    assert torch.equal(conv2d.conv2d(x, w, b, pad=SAME), conv2d.conv2d(x, w, b, pad=SAME))


def test_a_changed_weight_is_packed_again_into_the_same_memory() -> None:
    x, (w, b) = draw(1, 4, 4, 16, seed=0), draw_weights(16, 16, 3, torch.float32)
    conv2d.conv2d(x, w, b, pad=SAME)
    address = conv2d.pack_cached(w).data_ptr()
    w.mul_(2)
    torch.testing.assert_close(conv2d.conv2d(x, w, b, pad=SAME), REFERENCE.conv2d(x, w, b, 1, SAME))
    assert conv2d.pack_cached(w).data_ptr() == address


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    c=st.integers(1, 40),
    n=st.integers(1, 40),
    stride=st.integers(1, 2),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
    split=st.integers(1, 4),
)
def test_any_shape(size: tuple[int, int], c: int, n: int, stride: int, pad: tuple[int, ...], split: int) -> None:
    pad = tuple(max(side, 1) for side in pad) if min(size) < 3 else pad
    x, (w, b) = draw(2, *size, c, seed=c), draw_weights(n, c, 3, torch.float32)
    truth = REFERENCE.conv2d(*wide((x, w, b)), stride, pad)
    out = Output(*truth.shape, dtype=torch.float32)
    conv2d.conv2d(x, w, b, stride, pad, out=out.tensor, config=Config(16, 16, 16, 4, 2, split))
    out.check("conv2d", truth)


X, W, B = draw(2, 4, 4, 8, seed=0), draw(6, 8, 3, 3, seed=1), draw(6, seed=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": X.double()}, "fp16, bf16 or fp32"),
        ({"w": W.half()}, "as x"),
        ({"w": W[:, :7]}, "w must be contiguous"),
        ({"x": X.transpose(1, 2)}, "x must be contiguous"),
        ({"x": X[:0]}, "x must be"),
        ({"b": B[:5]}, "b must be"),
        ({"pad": (0, 0, 0, -1)}, "x must be"),
        ({"x": X[:, :1].contiguous()}, "does not fit"),
        ({"channel_bias": draw(2, 5, seed=3)}, "channel_bias must be"),
        ({"channel_bias": draw(6, 2, seed=3).T}, "contiguous rows"),
        ({"residual": draw(2, 2, 2, 5, seed=3)}, "residual must be"),
        ({"shortcut": (draw(2, 2, 2, 4, seed=3), None, draw(6, 5, 1, 1, seed=4), B)}, "the shortcut's w"),
        ({"out": draw(2, 2, 2, 7, seed=3)}, "out must be"),
    ],
)
def test_what_it_does_not_serve_it_refuses(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        conv2d.conv2d(**({"x": X, "w": W, "b": B} | change))


def test_other_sizes_than_twice_or_one_less_are_refused() -> None:
    with pytest.raises(ValueError, match="neither twice"):
        conv2d.upsample_conv2d(X, W, B, (8, 6))


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="6 channels"):
        conv2d_norm.conv2d_norm(X, W, B, None, B, B, 4, 1e-5)
