"""Flash attention against the fp64 truth on the quantised inputs, on shapes chosen for their edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsd import ops
from fastsd.kernels.flash_attn import (
    Config,
    attention,
    candidates,
    choose_config,
    in_one_pass,
    plan_attention,
    shared_bytes,
    split,
    tiles,
)
from tests.measured import measured
from tests.tolerances import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
Case = tuple[Tensor, Tensor, Tensor]


def inputs(
    length: int, keys: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 1, scale: float = 1.0
) -> Case:
    generator = torch.Generator().manual_seed(length * 1000 + keys * 10 + dim)
    q, k, v = (torch.randn(batch, n, heads, dim, generator=generator) for n in (length, keys, keys))
    return (q * scale).to(DEVICE, dtype), (k * scale).to(DEVICE, dtype), v.to(DEVICE, dtype)


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """fp64, spelled out: nothing of it is shared with the kernel or with PyTorch's attention."""
    s = torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(q.dtype).double()
    return torch.einsum("bnlm,bmnd->blnd", s.softmax(-1).nan_to_num(), v.double())


def error(y: Tensor, true: Tensor) -> float:
    return ((y.double() - true).norm() / true.norm()).item()


def surrounded(q: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and in the midst of it the view of q's shape: what is not written stays NaN, and so must the rest."""
    batch, length, heads, dim = q.shape
    buffer = torch.full((batch + 2, length + 2, heads + 2, dim + 16), torch.nan, dtype=q.dtype, device=q.device)
    return buffer, buffer[1:-1, 1:-1, 1:-1, 8:-8]


def padded(case: Case, width: int) -> Case:
    """The same heads, stored in `width` columns."""
    q, k, v = (torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in case)
    return q, k, v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    config: Config | None = None,
    head_dim: int | None = None,
) -> Tensor:
    """Within the gates, every element written, none beside; config overrides the launcher's own choice."""
    buffer, out = surrounded(q[..., :head_dim])
    attention(q, k, v, mask, causal, out, head_dim, config)
    q, k, v = (tensor[..., :head_dim] for tensor in (q, k, v))
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} of {out.numel()} values not written, or not finite"
    assert buffer.isfinite().sum() == out.numel(), "written beside the output"
    true = truth(q, k, v, mask, causal)
    ours, torchs = error(out, true), error(ops.attention(q, k, v, mask, causal), true)
    measured("relative L2", ours, OPS["attention"][q.dtype])
    assert ours <= OPS["attention"][q.dtype], f"relative error {ours:.2e}"
    assert ours <= 2 * torchs + 1e-6, f"relative error {ours:.2e}, PyTorch's {torchs:.2e}"
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "keys", "heads", "dim"),
    [
        (64, 64, 2, 40),  # SD 1.x: a head of 32 + 8; every tile full
        (66, 290, 1, 80),  # 64 + 16; two queries in the last tile; more keys than one pass takes
        (64, 64, 1, 160),  # 128 + 32
        (33, 300, 1, 64),  # no tail; the last tile of keys ragged
        (35, 77, 3, 40),  # cross-attention: 77 keys are 64 + 13; odd heads
        (129, 78, 1, 40),  # one query in the last tile
        (78, 154, 1, 40),  # a long prompt: 128 + 26
        (76, 231, 1, 8),  # longer still; the smallest head
        (1, 1, 1, 40),  # one query, one key: the value itself
        (1, 129, 5, 24),  # one query; a head that is all one masked part; 128 + 1 keys
        (129, 1, 1, 160),
        (20, 35, 1, 512),  # the VAE's head: value columns shared among programs
    ],
)
def test_parity(length: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    check(*inputs(length, keys, heads, dim, dtype))


@pytest.mark.parametrize(
    "config",
    [
        Config(32, 64, 4, 1, 16, one_pass=True),
        Config(32, 128, 4, 1, one_pass=True),  # more keys than there are
        Config(64, 16, 4, 1),  # tiles of keys smaller than those of queries, and larger
        Config(16, 64, 4, 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_through_the_kernel(config: Config, dtype: torch.dtype, causal: bool) -> None:
    check(*inputs(50, 77, 1, 40, dtype), causal=causal, config=config)


@pytest.mark.parametrize(
    ("length", "keys", "dim", "width", "causal"),
    [
        (64, 64, 40, 48, False),  # SD 1.x as its packed QKV projection stores it: 32 + 16, no masked loads
        (35, 77, 40, 48, False),
        (33, 300, 40, 48, True),  # tile by tile
        (35, 77, 24, 48, False),  # the head ends in the main part: of the tail nothing is stored
        (17, 40, 72, 77, False),  # a stored width that is itself loaded under a mask
        (20, 35, 300, 512, False),  # it ends in the second program's columns
        (20, 35, 120, 512, False),  # the second program stores nothing
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_stored_wider(length: int, keys: int, dim: int, width: int, causal: bool, dtype: torch.dtype) -> None:
    case = padded(inputs(length, keys, 2, dim, dtype), width)
    out = check(*case, causal=causal, head_dim=dim)
    own = attention(*case, causal=causal, head_dim=dim)
    assert own.is_contiguous()
    assert torch.equal(own, out)


@pytest.mark.parametrize("keys", [154, 231, 308])
@pytest.mark.parametrize(("dim", "width"), [(40, 48), (64, 64), (80, 80), (160, 160)])
def test_long_prompts(dim: int, width: int, keys: int) -> None:
    case = padded(inputs(37, keys, 1, dim, torch.float16), width)
    config = choose_config(37, keys, width, torch.float16, SHARED[90])
    assert config.one_pass == (keys <= 240)
    check(*case, config=config, head_dim=dim)
    if keys == 308:
        check(*case, config=in_one_pass(64, 32, keys), head_dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 76, 77, 78, 129])
def test_causal(length: int, dtype: torch.dtype) -> None:
    check(*inputs(length, length, 1, 64, dtype), causal=True)


@pytest.mark.parametrize(("length", "keys"), [(40, 290), (290, 40), (70, 290)])
def test_causal_counts_from_the_first_key_where_lengths_differ(length: int, keys: int) -> None:
    check(*inputs(length, keys, 1, 16, torch.float16), causal=True)
    check(*inputs(length, keys, 1, 16, torch.float16), causal=True, config=Config(32, 32, 4, 1))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (1, 40), (2, 1, 20, 40), (2, 3, 20, 40), (2, 1, 20, 1), (1, 3, 1, 1)])
def test_mask_broadcast(shape: tuple[int, ...], additive: bool) -> None:
    case = inputs(20, 40, 3, 16, torch.float16, batch=2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = noise * 3 if additive else noise > -0.5
    check(*case, mask)  # one pass
    check(*case, mask, config=Config(32, 32, 4, 1))  # rescaled tile by tile


@pytest.mark.parametrize("config", [Config(32, 64, 4, 1, 16, one_pass=True), Config(32, 16, 4, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_row_that_may_attend_nowhere_is_zero(additive: bool, config: Config) -> None:
    mask = torch.ones(35, 77, dtype=torch.bool, device=DEVICE)
    mask[[0, 17, 34]] = False
    mask[3, :70] = False  # nothing in its first tiles, something in the last
    mask[4, 10:] = False  # and the other way round
    if additive:
        mask = torch.where(mask, 0.0, -torch.inf)
    out = check(*inputs(35, 77, 1, 40, torch.float16), mask, config=config)
    assert (out[:, [0, 17, 34]] == 0).all()


@pytest.mark.parametrize("config", [Config(32, 64, 4, 1, 16, one_pass=True), Config(32, 16, 4, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_finite_mask_is_not_minus_infinity(dtype: torch.dtype, config: Config) -> None:
    # A row all of the lowest number still attends; times log2(e) it would be -inf and the row 0. Transformers' masks are such.
    mask = torch.zeros(35, 77, device=DEVICE)
    mask[:, 50:] = torch.finfo(dtype).min
    mask[5] = torch.finfo(dtype).min
    out = check(*inputs(35, 77, 1, 40, dtype, scale=1e-3), mask, config=config)
    assert (out[:, 5] != 0).any()


@pytest.mark.parametrize("config", [Config(32, 64, 4, 1, 16, one_pass=True), Config(32, 16, 4, 1)])
def test_scores_beyond_half_precision(config: Config) -> None:
    q, k, v = inputs(35, 77, 1, 40, torch.float16, scale=200.0)
    assert (torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / 40**0.5).abs().max() > 65504
    check(q, k, v, config=config)


def test_equal_large_scores_are_averaged() -> None:
    # 100,000 everywhere: exp2 of anything but a difference would overflow.
    q = torch.full((1, 20, 1, 64), 112.0, dtype=torch.float16, device=DEVICE)
    v = inputs(1, 300, 1, 64, torch.float16)[2]
    check(q, q[:, :1].expand(1, 300, 1, 64), v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 33, 3, 2, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    q, k, v = fused.unbind(2)  # a token's stride is 3·N·D
    check(q, k, v)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    check(*heads_first)
    check(q, k[:, :1].expand(-1, 20, -1, -1), v[:, :20])  # a token's stride is 0
    wide = torch.nn.functional.pad(fused, (0, 8))  # as the packed projection writes it: heads of 48 columns
    check(*wide.unbind(2), head_dim=40)
    check(*wide.unbind(2), causal=True, config=Config(32, 16, 4, 1), head_dim=40)


def test_last_axis_with_a_stride_is_refused() -> None:
    q, k, v = inputs(16, 16, 1, 32, torch.float16)
    with pytest.raises(ValueError, match="last axis of k"):
        attention(q, k.transpose(1, 3).contiguous().transpose(1, 3), v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k.float(), v), "fp16, bf16 or fp32"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "fp16, bf16 or fp32"),
        (lambda q, k, v: (q, k[:, :9], v), "v is"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), "k is"),
        (lambda q, k, v: (q[0], k[0], v[0]), "4 axes"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "no elements"),
        (lambda q, k, v: (q[..., :7], k[..., :7], v[..., :7]), "head dim 7"),
        (lambda q, k, v: tuple(t.repeat(1, 1, 1, 11) for t in (q, k, v)), "head dim 176"),
        (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), "not on meta"),
        (lambda q, k, v: (q, k, v.to("meta")), "one device"),
        (lambda q, k, v: (q, k, v, torch.ones(16, 15, dtype=torch.bool, device=DEVICE)), "does not broadcast"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 1, 1, 16, 16, device=DEVICE)), "does not broadcast"),
        (lambda q, k, v: (q, k, v, torch.ones(16, 16, dtype=torch.int32, device=DEVICE)), "mask must be"),
        (lambda q, k, v: (q, k, v, torch.ones(16, 16, device=DEVICE), True), "exclude each other"),
        (lambda q, k, v: (q, k, v, None, False, None, 17), "head_dim 17 must be from 8 to the 16 columns"),
        (lambda q, k, v: (q, k, v, None, False, None, 0), "head_dim 0"),
        (lambda q, k, v: (q, k, v, None, False, torch.empty_like(q), 12), "out is"),
        (lambda q, k, v: (q, k, v, None, False, q[..., :12].clone()), "out is"),
        (
            lambda q, k, v: (q, k, v, None, False, None, None, Config(16, 16, 4, 1, value_columns=12)),
            "value_columns 12",
        ),
    ],
)
def test_what_is_not_served_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*change(*inputs(16, 16, 1, 16, torch.float16)))


@pytest.mark.skipif(DEVICE == "cuda", reason="bf16 is refused by the interpreter alone")
def test_interpreter_refuses_bf16() -> None:
    with pytest.raises(ValueError, match="interpreter"):
        attention(*inputs(16, 16, 1, 16, torch.bfloat16))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 66),
    keys=st.integers(1, 320),
    heads=st.integers(1, 2),
    dim=st.integers(8, 160),
    pad=st.sampled_from([0, 1, 8, 32]),
    kind=st.sampled_from(["plain", "causal", "boolean", "additive"]),
    half=st.booleans(),
    pick=st.integers(0, 11),
)
def test_any_shape(length: int, keys: int, heads: int, dim: int, pad: int, kind: str, half: bool, pick: int) -> None:
    dtype = torch.float16 if half else torch.float32
    width = min(dim + pad, 160)
    noise = torch.randn(heads, length, keys, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = {"boolean": noise > 0, "additive": noise}.get(kind)
    configs = candidates(length, keys, width, dtype, SHARED[86])
    config = configs[pick] if pick < len(configs) else None
    check(*padded(inputs(length, keys, heads, dim, dtype), width), mask, kind == "causal", config, dim)


def test_same_bits_every_time() -> None:
    case = inputs(40, 300, 2, 40, torch.float16)
    assert torch.equal(attention(*case), attention(*case))


@pytest.mark.parametrize(
    ("width", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (77, (64, 16)), (80, (64, 16)), (112, (128, 0)),
     (129, (128, 16)), (154, (128, 32)), (160, (128, 32)), (231, (256, 0)), (512, (512, 0))],
)  # fmt: skip
def test_split(width: int, parts: tuple[int, int]) -> None:
    assert split(width) == parts


@pytest.mark.parametrize(
    ("config", "keys", "held"),
    [
        (in_one_pass(128, 128, 77), 77, (1, 16)),
        (in_one_pass(128, 128, 128), 128, (1, 0)),
        (in_one_pass(128, 128, 154), 154, (1, 32)),
        (in_one_pass(128, 64, 231), 231, (4, 0)),
        (in_one_pass(64, 32, 231), 231, (7, 16)),
        (in_one_pass(64, 32, 1), 1, (1, 0)),
        (Config(64, 64, 4, 1, 16, one_pass=True), 128, (2, 0)),  # nothing is left for the last tile
        (Config(64, 64, 4, 1, 16, one_pass=True), 100, (2, 0)),  # too much is
        (Config(64, 64, 4, 2), 77, (0, 0)),
    ],
)
def test_tiles(config: Config, keys: int, held: tuple[int, int]) -> None:
    assert tiles(config, keys) == held


LENGTHS = (1, 64, 77, 256, 257, 4096)
KEYS = (1, 64, 77, 154, 160, 161, 231, 240, 241, 257, 308, 4096)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dim", [8, 40, 48, 64, 80, 96, 160, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_some_config_fits_every_gpu(dim: int, arch: int, masked: bool) -> None:
    for length, keys in itertools.product(LENGTHS, KEYS):
        config = choose_config(length, keys, dim, torch.float16, SHARED[arch], masked)
        assert shared_bytes(config, dim, masked=masked) <= SHARED[arch]
        full, tail = tiles(config, keys)
        if config.one_pass:
            assert full * config.block_n - config.block_n < keys <= full * config.block_n + tail
            assert full * config.block_n < keys or not tail, "a tile without a key"
        elif keys <= 240 and dim <= 80 and not masked:
            pytest.fail(f"{keys} keys of {dim} columns are not one pass")


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dim", [8, 40, 48, 64, 80, 96, 160, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_candidates(dim: int, arch: int, dtype: torch.dtype) -> None:
    for length, keys in itertools.product(LENGTHS, KEYS):
        configs = candidates(length, keys, dim, dtype, SHARED[arch])
        assert configs[0] == choose_config(length, keys, dim, dtype, SHARED[arch])
        assert 1 <= len(set(configs)) == len(configs) <= 12
        assert all(shared_bytes(config, dim, dtype.itemsize) <= SHARED[arch] for config in configs)


def test_plan_needs_no_data() -> None:
    q, k, v = inputs(35, 77, 2, 40, torch.float16)
    launch, meta = (plan_attention(*(t.to(d) for t in (q, k, v)), None, False, q.to(d))[0] for d in ("cpu", "meta"))
    assert (launch.grid, launch.constants, launch.num_warps) == (meta.grid, meta.constants, meta.num_warps)
