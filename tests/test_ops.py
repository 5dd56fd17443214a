"""The reference ops against formulas written out in fp64, and oneDNN's against the reference."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor

from fastsd.backends import onednn_ops
from fastsd.kernels import onednn
from fastsd.ops import REFERENCE, Ops, Shortcut, StepRow
from tests.measured import measured
from tests.oracle import nchw, nhwc, relative_l2
from tests.tolerances import OPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OP_SETS = [REFERENCE, onednn_ops()]
by_ops = pytest.mark.parametrize("ops", OP_SETS, ids=lambda ops: ops.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + mean).to(dtype)


def check(name: str, value: Tensor, truth: Tensor, plain: Tensor | None = None) -> None:
    """value within its dtype's gate of the fp64 truth, and no worse than twice plain PyTorch's error."""
    error, gate = relative_l2(value, truth), OPS[name][value.dtype]
    measured("relative L2", error, gate)
    assert error <= gate, f"{name} {value.dtype}: relative L2 error {error:.1e} > {gate:.0e}"
    if plain is not None:
        limit = 2 * relative_l2(plain, truth) + 1e-6
        assert error <= limit, f"{name} {value.dtype}: error {error:.1e}, plain PyTorch's allows {limit:.1e}"


@by_ops
@by_dtype
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "quick_gelu"])
def test_linear(ops: Ops, dtype: torch.dtype, activation: str | None) -> None:
    x, w, b = (
        draw(2, 77, 48, seed=0, dtype=dtype),
        draw(80, 48, seed=1, dtype=dtype, scale=0.1),
        draw(80, seed=2, dtype=dtype),
    )
    residual = draw(2, 77, 80, seed=3, dtype=dtype)
    y = x.double() @ w.double().T + b.double()
    truth = {
        None: y,
        "silu": y / (1 + torch.exp(-y)),
        "gelu": 0.5 * y * (1 + torch.erf(y / 2**0.5)),
        "quick_gelu": y / (1 + torch.exp(-1.702 * y)),
    }[activation]
    check("linear", ops.linear(x, w, b, residual, activation), truth + residual.double())


@by_ops
@by_dtype
def test_linear_bare(ops: Ops, dtype: torch.dtype) -> None:
    """No bias, no residual; a single row; an input that is not contiguous."""
    w = draw(24, 48, seed=1, dtype=dtype)
    for x in (draw(1, 48, seed=0, dtype=dtype), draw(48, 5, seed=0, dtype=dtype).T):
        check("linear", ops.linear(x, w), x.double() @ w.double().T, F.linear(x, w))


@by_ops
@by_dtype
def test_linear_large_enough_for_onednn(ops: Ops, dtype: torch.dtype) -> None:
    x, w, b = (
        draw(2, 100, 160, seed=0, dtype=dtype),
        draw(320, 160, seed=1, dtype=dtype),
        draw(320, seed=2, dtype=dtype),
    )
    assert onednn.pays(x, w)
    assert not onednn.pays(x[:, :1], w)
    check("linear", ops.linear(x, w, b), x.double() @ w.double().T + b.double(), F.linear(x, w, b))
    value, gate = F.linear(x, w, b).chunk(2, -1)
    truth, truth_gate = F.linear(x.double(), w.double(), b.double()).chunk(2, -1)
    check("geglu", ops.geglu(x, w, b), truth * F.gelu(truth_gate), value * F.gelu(gate))


@by_ops
@by_dtype
def test_geglu(ops: Ops, dtype: torch.dtype) -> None:
    """Value first, gate second, as diffusers' GEGLU; exact erf."""
    theirs = GEGLU(32, 64).to(torch.float64)
    x = draw(2, 50, 32, seed=0, dtype=dtype)
    w, b = (p.detach().to(dtype) for p in (theirs.proj.weight, theirs.proj.bias))
    theirs.load_state_dict({"proj.weight": w.double(), "proj.bias": b.double()})
    value, gate = F.linear(x, w, b).chunk(2, -1)
    check("geglu", ops.geglu(x, w, b), theirs(x.double()), value * F.gelu(gate))


@by_dtype
@pytest.mark.parametrize(("heads", "width"), [(8, 5), (1, 64), (3, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dtype: torch.dtype, heads: int, width: int, causal: bool) -> None:
    q, k, v = (draw(2, 77, heads, width, seed=seed, dtype=dtype) for seed in range(3))
    allowed = torch.ones(77, 77, dtype=torch.bool).tril() if causal else None
    check("attention", REFERENCE.attention(q, k, v, causal=causal), naive_attention(q, k, v, allowed))


def test_attention_masks() -> None:
    """Boolean and additive masks say the same; other keys than queries; a row that may attend nowhere is 0, not NaN."""
    q, k, v = draw(2, 9, 4, 16, seed=0), draw(2, 13, 4, 16, seed=1), draw(2, 13, 4, 16, seed=2)
    mask = draw(2, 1, 9, 13, seed=3) > 0
    mask[0, 0, 4] = False
    boolean = REFERENCE.attention(q, k, v, mask)
    check("attention", boolean, naive_attention(q, k, v, mask).nan_to_num(0.0))
    additive = REFERENCE.attention(q, k, v, torch.where(mask, 0.0, float("-inf")))
    torch.testing.assert_close(additive, boolean)
    assert (boolean[0, 4] == 0).all()
    bias = draw(2, 1, 9, 13, seed=4)
    check("attention", REFERENCE.attention(q, k, v, bias), naive_attention(q, k, v, bias=bias))


def test_attention_scores_beyond_fp16() -> None:
    """q·k reaches 200,000, three times the largest fp16: the scores must be kept in fp32."""
    q, k = draw(1, 40, 2, 64, seed=0, scale=60).half(), draw(1, 40, 2, 64, seed=1, scale=60).half()
    v = draw(1, 40, 2, 64, seed=2).half()
    assert torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()).abs().max() > 65504
    check("attention", REFERENCE.attention(q, k, v), naive_attention(q, k, v))


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("blnd,bmnd->bnlm", q, k) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias.double()
    scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v)


@by_dtype
def test_layer_norm(dtype: torch.dtype) -> None:
    x, w, b = draw(3, 7, 80, seed=0, dtype=dtype, mean=3), draw(80, seed=1, dtype=dtype), draw(80, seed=2, dtype=dtype)
    wide = x.double()
    normal = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    check("layer_norm", REFERENCE.layer_norm(x, w, b, 1e-5), normal * w.double() + b.double())


@by_dtype
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm(dtype: torch.dtype, silu: bool, mean: float) -> None:
    x, skip = draw(2, 5, 3, 24, seed=0, dtype=dtype, mean=mean), draw(2, 5, 3, 8, seed=1, dtype=dtype)
    w, b = draw(32, seed=2, dtype=dtype), draw(32, seed=3, dtype=dtype)
    grouped = torch.cat((x, skip), -1).double().unflatten(-1, (4, 8))
    centred = grouped - grouped.mean((1, 2, 4), keepdim=True)
    normal = centred / (grouped.var((1, 2, 4), keepdim=True, unbiased=False) + 1e-5).sqrt()
    truth = normal.flatten(-2) * w.double() + b.double()
    truth = truth * torch.sigmoid(truth) if silu else truth
    check("group_norm", REFERENCE.group_norm(x, w, b, 4, 1e-5, silu, skip=skip), truth)


CONVS = {
    "same": (3, 1, (1, 1, 1, 1)),
    "UNet down": (3, 2, (1, 1, 1, 1)),
    "VAE down": (3, 2, (0, 1, 0, 1)),
    "1x1": (1, 1, (0, 0, 0, 0)),
    "lopsided": (3, 1, (2, 0, 0, 1)),
}


@by_ops
@by_dtype
@pytest.mark.parametrize(("kernel", "stride", "pad"), CONVS.values(), ids=CONVS)
def test_conv2d(ops: Ops, dtype: torch.dtype, kernel: int, stride: int, pad: tuple[int, int, int, int]) -> None:
    x, w, b = (
        draw(2, 9, 7, 20, seed=0, dtype=dtype),
        draw(24, 20, kernel, kernel, seed=2, dtype=dtype, scale=0.1),
        draw(24, seed=3, dtype=dtype),
    )
    truth = nhwc(F.conv2d(F.pad(nchw(x).double(), pad), w.double(), b.double(), stride))
    channel_bias = draw(2, 24, seed=4, dtype=dtype)
    residual = draw(*truth.shape, seed=5, dtype=dtype)
    truth = truth + channel_bias.double()[:, None, None] + residual.double()
    check("conv2d", ops.conv2d(x, w, b, stride, pad, channel_bias, residual), truth)


@by_ops
@by_dtype
@pytest.mark.parametrize("skip_channels", [0, 8], ids=["no skip", "skip"])
def test_conv2d_adds_a_shortcut(ops: Ops, dtype: torch.dtype, skip_channels: int) -> None:
    x, w, b = draw(2, 4, 3, 20, seed=0, dtype=dtype), draw(24, 20, 3, 3, seed=1, dtype=dtype, scale=0.1), None
    wide = draw(2, 4, 3, 12 + skip_channels, seed=2, dtype=dtype)
    skip = wide[..., 12:].contiguous() if skip_channels else None
    w_wide = draw(24, 12 + skip_channels, 1, 1, seed=3, dtype=dtype, scale=0.1)
    shortcut = Shortcut(wide[..., :12].contiguous(), skip, w_wide, draw(24, seed=4, dtype=dtype))
    truth = nhwc(F.conv2d(nchw(x).double(), w.double(), padding=1))
    truth = truth + wide.double() @ w_wide[..., 0, 0].double().T + shortcut.b.double()
    check("conv2d", ops.conv2d(x, w, b, 1, (1, 1, 1, 1), shortcut=shortcut), truth)


@by_ops
@by_dtype
def test_conv2d_norm(ops: Ops, dtype: torch.dtype) -> None:
    x, w = draw(2, 5, 4, 16, seed=0, dtype=dtype), draw(24, 16, 3, 3, seed=1, dtype=dtype, scale=0.1)
    b, norm_w, norm_b = (draw(24, seed=seed, dtype=dtype) for seed in (2, 3, 4))
    channel_bias = draw(2, 24, seed=5, dtype=dtype)
    y = nhwc(F.conv2d(nchw(x).double(), w.double(), b.double(), padding=1)) + channel_bias.double()[:, None, None]
    grouped = y.unflatten(-1, (4, 6))
    centred = grouped - grouped.mean((1, 2, 4), keepdim=True)
    y = (centred / (centred.square().mean((1, 2, 4), keepdim=True) + 1e-5).sqrt()).flatten(-2)
    y = y * norm_w.double() + norm_b.double()
    value = ops.conv2d_norm(x, w, b, channel_bias, norm_w, norm_b, 4, 1e-5)
    check("conv2d_norm", value, y / (1 + torch.exp(-y)))


@by_ops
@by_dtype
@pytest.mark.parametrize("biased", [False, True])
def test_project_heads(ops: Ops, dtype: torch.dtype, biased: bool) -> None:
    """Three layers of one input, and what attention makes of heads that are stored wider than they are."""
    x = draw(2, 7, 48, seed=0, dtype=dtype)
    weights = [draw(40, 48, seed=1 + i, dtype=dtype, scale=0.1) for i in range(3)]
    biases = [draw(40, seed=4 + i, dtype=dtype) for i in range(3)] if biased else None
    heads = ops.project_heads(x, weights, biases, 4)
    for i, one in enumerate(heads):
        truth = x.double() @ weights[i].double().T + (0.0 if biases is None else biases[i].double())
        check("linear", one, truth.unflatten(-1, (4, 10)))
    wide = [F.pad(one, (0, 6)) for one in heads]
    torch.testing.assert_close(ops.attention(*wide, head_dim=10), ops.attention(*heads))


@by_ops
@by_dtype
@pytest.mark.parametrize("size", [None, (9, 7), (10, 7)])
def test_upsample_conv2d(ops: Ops, dtype: torch.dtype, size: tuple[int, int] | None) -> None:
    x, w, b = (
        draw(2, 5, 4, 16, seed=0, dtype=dtype),
        draw(8, 16, 3, 3, seed=1, dtype=dtype),
        draw(8, seed=2, dtype=dtype),
    )
    large = x.double().repeat_interleave(2, 1).repeat_interleave(2, 2)
    large = large if size is None else large[:, : size[0], : size[1]]
    truth = nhwc(F.conv2d(nchw(large), w.double(), b.double(), padding=1))
    check("conv2d", ops.upsample_conv2d(x, w, b, size), truth)


@by_dtype
def test_step_input(dtype: torch.dtype) -> None:
    """The counter's row of each image's weights; what is shared by the two sides of guidance is laid down twice."""
    state, weights, time_bias = draw(3, 2, 4, 5, 4, seed=0), draw(6, 2, 3, seed=1), draw(7, 32, seed=2, dtype=dtype)
    time_rows = torch.tensor([[0, 6], [1, 5], [2, 4], [3, 3], [4, 2], [5, 1]], dtype=torch.int32)
    counter = torch.tensor([4, 0, 6, 6], dtype=torch.int32)
    x, time = REFERENCE.step_input(state, weights, time_bias, time_rows, counter, copies=2)
    truth = torch.stack([(weights[4, b, :, None, None, None].double() * state[:, b].double()).sum(0) for b in (0, 1)])
    check("step_input", x, truth.repeat(2, 1, 1, 1))
    assert torch.equal(time, time_bias[[4, 2, 4, 2]])


def test_sampler_step() -> None:
    """Each image of the batch has its own row and guidance; half-precision outputs are guided in fp32."""
    state, noise = draw(3, 2, 4, 4, 4, seed=0), draw(2, 4, 4, 4, seed=1)
    out = draw(4, 4, 4, 4, seed=2).half()
    row = StepRow(draw(2, 3, 5, seed=3), torch.tensor([7.5, 1.5]))
    uncond, cond = out.double().chunk(2)
    guided = uncond + row.guidance.double().view(2, 1, 1, 1) * (cond - uncond)
    for noisy in (True, False):
        expected = torch.zeros(3, 2, 4, 4, 4, dtype=torch.float64)
        for image in range(2):
            for new in range(3):
                terms = [*state[:, image].double(), guided[image], noise[image].double() * noisy]
                expected[new, image] = sum(c.double() * t for c, t in zip(row.update[image, new], terms, strict=True))
        check("sampler_step", REFERENCE.sampler_step(state, out, noise if noisy else None, row), expected)


def test_sampler_step_without_guidance_takes_the_output_as_it_is() -> None:
    state, out = draw(1, 2, 4, 4, 4, seed=0), draw(2, 4, 4, 4, seed=1)
    row = StepRow(torch.tensor([[[0.5, 2.0, 0.0]]]).expand(2, -1, -1), torch.tensor([99.0, 99.0]))
    check("sampler_step", REFERENCE.sampler_step(state, out, None, row), 0.5 * state.double() + 2.0 * out.double())


def test_guidance_rescale_equals_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    state, out = draw(1, 2, 8, 8, 4, seed=0), draw(4, 8, 8, 4, seed=1)
    uncond, cond = out.chunk(2)
    expected = rescale_noise_cfg(nchw(uncond + 7.5 * (cond - uncond)), nchw(cond), guidance_rescale=0.7)
    keep_output = torch.tensor([[[0.0, 1.0, 0.0]]]).expand(2, -1, -1)
    row = StepRow(keep_output, torch.full((2,), 7.5), torch.full((2,), 0.7))
    torch.testing.assert_close(REFERENCE.sampler_step(state, out, None, row)[0], nhwc(expected))


def test_reference_ops_have_gradients() -> None:
    """Training runs on them."""
    with torch.enable_grad():
        x = draw(2, 4, 4, 8, seed=0).requires_grad_()
        w = draw(8, 8, 3, 3, seed=1).requires_grad_()
        y = REFERENCE.group_norm(x, torch.ones(8), torch.zeros(8), 2, 1e-5, True)
        y = REFERENCE.conv2d(y, w, torch.zeros(8), 2, (0, 1, 0, 1), residual=None)
        REFERENCE.attention(*[y.flatten(1, 2)[:, :, None]] * 3).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert w.grad is not None
    assert w.grad.abs().max() > 0


def test_onednn_is_what_auto_uses_on_this_cpu() -> None:
    """The suite would not exercise the packed ops on a machine that lacks them: say so by failing."""
    assert onednn.available()
    w = draw(8, 8, seed=0)
    assert onednn.supports(w, w)
    assert not onednn.supports(w.half(), w.half()), "fp16 has no fast path in oneDNN without AVX512-FP16 or AMX"


def test_packed_weight_follows_the_weight() -> None:
    """In-place changes (a LoRA merged and taken out again) and replaced storage are seen at the next call."""
    ops, x = onednn_ops(), draw(1, 6, 6, 16, seed=0)
    w = torch.nn.Parameter(draw(16, 16, 3, 3, seed=1), requires_grad=False)
    first = ops.conv2d(x, w, pad=(1, 1, 1, 1))
    w += 1.0
    torch.testing.assert_close(ops.conv2d(x, w, pad=(1, 1, 1, 1)), REFERENCE.conv2d(x, w, pad=(1, 1, 1, 1)))
    w.data = draw(16, 16, 3, 3, seed=1)
    assert torch.equal(ops.conv2d(x, w, pad=(1, 1, 1, 1)), first), "the old weight must give the old bits"


def test_packed_weight_serves_any_size_of_input() -> None:
    ops, w = onednn_ops(), draw(16, 16, 3, 3, seed=1)
    for size in ((4, 4), (9, 5), (1, 1), (4, 4)):
        x = draw(2, *size, 16, seed=0)
        torch.testing.assert_close(ops.conv2d(x, w, pad=(1, 1, 1, 1)), REFERENCE.conv2d(x, w, pad=(1, 1, 1, 1)))


def test_two_sizes_take_turns_without_packing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[object] = []
    pack = onednn._pack
    monkeypatch.setattr(onednn, "_pack", lambda w, geometry: packs.append(geometry) or pack(w, geometry))
    ops, w = onednn_ops(), draw(16, 16, 3, 3, seed=1)
    for size in (4, 8, 4, 8, 4, 8):
        ops.conv2d(draw(1, size, size, 16, seed=0), w, pad=(1, 1, 1, 1))
    assert len(packs) == 2, f"packed {len(packs)} times for two sizes"
    for size in range(2, 12):
        ops.conv2d(draw(1, size, size, 16, seed=0), w, pad=(1, 1, 1, 1))
    assert len(onednn._weights._packed[w]) == onednn.GEOMETRIES, "copies pile up"


def test_weights_made_in_inference_mode_are_not_packed() -> None:
    """They do not count their changes, so a packed copy could be out of date."""
    with torch.inference_mode():
        w = draw(16, 16, 3, 3, seed=1)
        x = draw(1, 6, 6, 16, seed=0)
        onednn_ops().conv2d(x, w, pad=(1, 1, 1, 1))
        w.mul_(0.5)
        after = onednn_ops().conv2d(x, w, pad=(1, 1, 1, 1))
        torch.testing.assert_close(after, REFERENCE.conv2d(x, w, pad=(1, 1, 1, 1)))


def test_packed_weights_go_with_their_weights() -> None:
    ops, x = onednn_ops(), draw(1, 4, 4, 8, seed=0)
    gc.collect()
    before = len(onednn._weights._packed)
    weights = [draw(8, 8, 3, 3, seed=seed) for seed in range(5)]
    for w in weights:
        ops.conv2d(x, w, pad=(1, 1, 1, 1))
    assert len(onednn._weights._packed) == before + 5
    del w, weights
    gc.collect()
    assert len(onednn._weights._packed) == before


def test_threads_of_different_sizes_share_a_packed_weight() -> None:
    ops, w = onednn_ops(), draw(32, 32, 3, 3, seed=1)
    inputs = [draw(1, size, size, 32, seed=size) for size in (4, 8, 12, 16)]
    expected = [ops.conv2d(x, w, pad=(1, 1, 1, 1)) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.conv2d(inputs[index], w, pad=(1, 1, 1, 1)), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"inputs {sorted(set(wrong))} came out differently beside other threads"


def test_packed_ops_leave_training_to_the_reference() -> None:
    """There is no backward through a packed weight; with gradients asked for, plain PyTorch computes."""
    with torch.enable_grad():
        w = draw(4, 8, seed=0).requires_grad_()
        onednn_ops().linear(draw(3, 8, seed=1), w).sum().backward()
    torch.testing.assert_close(w.grad, draw(3, 8, seed=1).sum(0).expand(4, 8))
