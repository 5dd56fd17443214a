"""Convolutions of images whose edges meet: the kernels against fp64, and against plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd import backends
from fastsd.kernels import conv2d, conv2d_norm, gemm, tuned
from fastsd.kernels.gemm import Config
from fastsd.ops import REFERENCE, Pad, Shortcut, Wrap
from tests.kernels.case import DTYPES, Output, draw, run_compiled
from tests.kernels.test_conv2d import SAME, draw_weights

WRAPS: dict[str, Wrap] = {"x": (True, False), "y": (False, True), "both": (True, True)}
by_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def surrounded(x: Tensor, pad: Pad, wrap: Wrap) -> Tensor:
    """x [B, H, W, C] and its padding in fp64, found index by index, as nothing else here finds it."""
    x = x.double()
    for axis, before, after, wraps in ((2, *pad[:2], wrap[0]), (1, *pad[2:], wrap[1])):
        size = x.shape[axis]
        index = torch.arange(-before, size + after, device=x.device)
        inside = ((index >= 0) & (index < size)) | (wraps and before == after)
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        x = x.index_select(axis, index % size) * inside.view(shape)
    return x


def truth_of(x: Tensor, w: Tensor, b: Tensor, stride: int, pad: Pad, wrap: Wrap) -> Tensor:
    image = surrounded(x, pad, wrap).permute(0, 3, 1, 2)
    return F.conv2d(image, w.double(), b.double(), stride).permute(0, 2, 3, 1)


CONVS = {
    # batch, height, width, in, out, window, stride, pad, config
    "stride 1": (2, 4, 5, 20, 16, 3, 1, SAME, None),
    "stride 2 of the UNet": (2, 6, 4, 16, 16, 3, 2, SAME, None),
    "stride 2 of the UNet, odd size": (1, 7, 5, 16, 16, 3, 2, SAME, None),
    "stride 2 of the VAE, which pads by zeros": (1, 6, 4, 16, 16, 3, 2, (0, 1, 0, 1), None),
    "padded alike one way only": (1, 5, 4, 16, 16, 3, 1, (1, 1, 0, 1), None),
    "1x1": (1, 3, 5, 20, 16, 1, 1, (0, 0, 0, 0), None),
    "padding as wide as the image": (1, 3, 2, 16, 16, 5, 1, (2, 2, 2, 2), None),
    "one pixel": (1, 1, 1, 16, 16, 3, 1, SAME, None),
    "a split that divides nothing": (2, 3, 4, 20, 20, 3, 1, SAME, Config(16, 16, 16, 4, 2, 5)),
    "a tile of several images": (3, 3, 3, 16, 16, 3, 1, SAME, Config(32, 16, 16, 4, 2)),
}


@by_wrap
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)
def test_conv2d(case: tuple, wrap: Wrap) -> None:
    batch, height, width, c, n, r, stride, pad, config = case
    x, (w, b) = draw(batch, height, width, c, seed=0), draw_weights(n, c, r, torch.float32)
    truth = truth_of(x, w, b, stride, pad, wrap)
    out = Output(*truth.shape, dtype=torch.float32)
    conv2d.conv2d(x, w, b, stride, pad, wrap=wrap, out=out.tensor, config=config)
    out.check("conv2d", truth, REFERENCE.conv2d(x, w, b, stride, pad, wrap=wrap))


@by_dtype
@pytest.mark.parametrize("config", [None, Config(16, 32, 16, 4, 2, 3)], ids=["whole", "split"])
def test_what_is_added_does_not_wrap(dtype: torch.dtype, config: Config | None) -> None:
    """The time row, and a shortcut of two inputs, which are read at the pixel itself."""
    x, (w, b) = draw(2, 4, 4, 24, seed=0, dtype=dtype), draw_weights(20, 24, 3, dtype)
    time = draw(2, 20, seed=3, dtype=dtype)
    more = Shortcut(
        draw(2, 4, 4, 16, seed=4, dtype=dtype), draw(2, 4, 4, 8, seed=5, dtype=dtype), *draw_weights(20, 24, 1, dtype)
    )
    pixels = torch.cat((more.x, more.skip), -1)
    truth = truth_of(x, w, b, 1, SAME, (True, True)) + time.double()[:, None, None]
    truth += pixels.double() @ more.w[:, :, 0, 0].double().T + more.b.double()
    out = Output(*truth.shape, dtype=dtype)
    conv2d.conv2d(x, w, b, 1, SAME, time, None, more, (True, True), out=out.tensor, config=config)
    out.check("conv2d", truth, REFERENCE.conv2d(x, w, b, 1, SAME, time, None, more, (True, True)))


@by_wrap
@pytest.mark.parametrize("size", [None, (9, 8), (10, 7), (9, 7)])
def test_upsample_conv2d(size: tuple[int, int] | None, wrap: Wrap) -> None:
    """It is the enlarged image whose edges meet: in phases by source pixels, beside an odd skip by its own rows."""
    x, (w, b) = draw(1, 5, 4, 16, seed=0), draw_weights(8, 16, 3, torch.float32)
    height, width = size or (10, 8)
    enlarged = x.repeat_interleave(2, 1)[:, :height].repeat_interleave(2, 2)[:, :, :width]
    truth = truth_of(enlarged, w, b, 1, SAME, wrap)
    out = Output(*truth.shape, dtype=torch.float32)
    conv2d.upsample_conv2d(x, w, b, size, wrap, out=out.tensor, config=Config(32, 16, 16, 4, 2, 2))
    out.check("conv2d", truth, REFERENCE.upsample_conv2d(x, w, b, size, wrap))


NORMS = {
    "statistics in the epilogue": (4, 8, Config(32, 32, 16, 4, 2)),
    "one kernel that adds a split and normalises": (5, 7, Config(32, 32, 16, 4, 2, 3)),
    "an image that tiles do not divide": (5, 7, Config(32, 32, 16, 4, 2)),
}


@by_wrap
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_conv2d_norm(case: tuple, wrap: Wrap) -> None:
    height, width, config = case
    x, (w, b) = draw(2, height, width, 16, seed=0), draw_weights(24, 16, 3, torch.float32)
    time, norm_w, norm_b = draw(2, 24, seed=3), draw(24, seed=4), draw(24, seed=5)
    y = truth_of(x, w, b, 1, SAME, wrap) + time.double()[:, None, None]
    truth = REFERENCE.group_norm(y, norm_w.double(), norm_b.double(), 4, 1e-5, silu=True)
    out = Output(*truth.shape, dtype=torch.float32)
    conv2d_norm.conv2d_norm(x, w, b, time, norm_w, norm_b, 4, 1e-5, wrap, out=out.tensor, config=config)
    out.check("conv2d_norm", truth, REFERENCE.conv2d_norm(x, w, b, time, norm_w, norm_b, 4, 1e-5, wrap))


def test_more_than_once_round_is_refused() -> None:
    x, (w, b) = draw(1, 4, 2, 16, seed=0), draw_weights(16, 16, 3, torch.float32)
    with pytest.raises(ValueError, match="wrap more than once"):
        conv2d.conv2d(x, w, b, 1, (3, 3, 1, 1), wrap=(True, False))
    conv2d.conv2d(x, w, b, 1, (3, 3, 1, 1), wrap=(False, True))  # between zeros it is a padding like any other


@pytest.mark.parametrize("use", ["kernel", "library"])
def test_the_tuned_choice_holds_for_an_image_that_wraps(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config that was measured for the same convolution between zeros; or PyTorch, which wraps as well."""
    x, (w, b) = draw(1, 4, 4, 16, seed=0), draw_weights(16, 16, 3, torch.float32)
    config = (16, 16, 16, 4, 2, 2)
    asked, seen = [], []
    kernel = conv2d.conv2d

    def lookup(problem: tuned.Problem, arch: int) -> tuned.Entry:
        asked.append(problem)
        return tuned.Entry(*problem, use, config, 1.0, 2.0)

    monkeypatch.setattr(tuned, "lookup", lookup)
    monkeypatch.setattr(
        conv2d, "conv2d", lambda *args, **options: seen.append(options["config"]) or kernel(*args, **options)
    )
    ops = backends.triton_ops()
    ops.conv2d(x, w, b, 1, SAME)
    y = ops.conv2d(x, w, b, 1, SAME, wrap=(True, True))
    assert asked[0] == asked[1], "the wrap must not make another problem of it: none was measured"
    assert seen == ([gemm.Config(*config)] * 2 if use == "kernel" else [])
    torch.testing.assert_close(y, truth_of(x, w, b, 1, SAME, (True, True)).float(), rtol=1e-5, atol=1e-5)


def test_it_compiles_without_a_spill() -> None:
    """The interpreter takes what the compiler may not; one direction alone still masks the other."""
    code = (
        "import torch\n"
        "from bench import aot, shapes\n"
        "size = torch.Size\n"
        "x, w, b, large = size((2, 16, 16, 320)), size((320, 320, 3, 3)), size((320,)), size((2, 32, 32, 320))\n"
        "def compiled(op, arguments, wrap, result, arch):\n"
        "    call = shapes.Call(op, arguments, (('wrap', wrap),), result)\n"
        "    launch = aot.plan(call, arch, torch.float16)[0]\n"
        "    assert (launch.constants['WRAP_X'], launch.constants['WRAP_Y']) == wrap, launch.constants\n"
        "    breach = aot.compile_job(aot.Job(call, 0, arch, torch.float16, None), 1).breach\n"
        "    assert breach is None, (op, wrap, arch, breach)\n"
        "compiled('conv2d', (x, w, b, 1, (1, 1, 1, 1)), (True, False), x, 90)\n"
        "compiled('conv2d', (x, w, b, 1, (1, 1, 1, 1)), (True, True), x, 80)\n"
        "compiled('upsample_conv2d', (x, w, b), (True, True), large, 90)\n"
    )
    done = run_compiled("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
