"""Whole nets on the Triton ops, against the reference and an fp64 truth; in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from fastsd.backends import triton_ops
from fastsd.config import SD15, TINY
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.ops import REFERENCE, Ops
from tests.kernels.case import DEVICE, DTYPES, draw
from tests.measured import measured
from tests.oracle import relative_l2
from tests.tolerances import COSINE, UNET_STEP

Net = TypeVar("Net", bound=nn.Module)

HALF = (torch.float16, torch.bfloat16)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_net(
    name: str, make: Callable[..., Net], run: Callable[[Net, torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    """The same random weights, rounded to the dtype, in three nets: Triton, plain PyTorch, and the truth in fp64."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        plain, truth, triton = make(REFERENCE).to(dtype), make(REFERENCE).double(), make(triton_ops()).to(dtype)
    plain.requires_grad_(False)
    for parameter in plain.parameters():
        if parameter.ndim == 1:  # norms' and biases' default 1 and 0 would hide a mix-up
            parameter.add_(0.2 * torch.randn_like(parameter))
    for net in (truth, triton):
        net.load_state_dict(plain.state_dict())
        net.requires_grad_(False)
    expected = run(truth, torch.float64)
    found, reference = run(triton, dtype), run(plain, dtype)
    assert found.isfinite().all(), f"{name}: not finite"
    error, limit = relative_l2(found, expected), 2 * relative_l2(reference, expected) + 1e-6
    measured("relative L2", error, min(limit, UNET_STEP[dtype]))
    assert error <= UNET_STEP[dtype], f"{name} {dtype}: relative L2 error {error:.1e} > {UNET_STEP[dtype]:.0e}"
    assert error <= limit, f"{name} {dtype}: error {error:.1e}, plain PyTorch's allows {limit:.1e}"
    cosine = torch.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0)
    assert cosine >= COSINE[dtype], f"{name} {dtype}: cosine {cosine:.6f}"


@by_dtype
@torch.no_grad()
def test_text_encoder(dtype: torch.dtype) -> None:
    ids = torch.randint(0, TINY.text_encoder.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check_net("CLIP", lambda ops: CLIPText(TINY.text_encoder, ops), lambda net, _: net(ids), dtype)


@by_dtype
@pytest.mark.parametrize(
    ("height", "width", "masked"), [(8, 8, False), (5, 6, True)], ids=["even", "odd, masked context"]
)
@torch.no_grad()
def test_unet_step(dtype: torch.dtype, height: int, width: int, masked: bool) -> None:
    """Two images at timesteps of their own, as guidance has them."""
    config = TINY.unet
    x, context = (
        draw(2, height, width, 4, seed=1, dtype=dtype),
        draw(2, 77, config.cross_attention_dim, seed=2, dtype=dtype),
    )
    timesteps = torch.tensor([980.0, 21.0], device=DEVICE)
    mask = torch.arange(77, device=DEVICE) < torch.tensor([[9], [77]], device=DEVICE) if masked else None
    mask = None if mask is None else mask[:, None, None]

    def run(net: UNet, dtype: torch.dtype) -> Tensor:
        return net(x.to(dtype), net.project_time(timesteps), net.project_context(context.to(dtype)), mask)

    check_net("UNet", lambda ops: UNet(config, ops), run, dtype)


@by_dtype
@torch.no_grad()
def test_vae_decode(dtype: torch.dtype) -> None:
    z = draw(1, 4, 3, 4, seed=1, dtype=dtype)
    check_net("VAE decode", lambda ops: VAE(TINY.vae, ops), lambda net, dtype: net.decode(z.to(dtype)), dtype)


@by_dtype
@torch.no_grad()
def test_vae_encode(dtype: torch.dtype) -> None:
    """Odd at the second level: the asymmetric padding meets its edge."""
    image = draw(1, 10, 14, 3, seed=1, dtype=dtype, scale=0.5)
    check_net("VAE encode", lambda ops: VAE(TINY.vae, ops), lambda net, dtype: net.encode(image.to(dtype)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 56)], ids=["512x512", "576x448"])
@torch.no_grad()
def test_full_size_unet_step(dtype: torch.dtype, height: int, width: int) -> None:
    x, context = draw(2, height, width, 4, seed=1, dtype=dtype), draw(2, 77, 768, seed=2, dtype=dtype)
    timesteps = torch.tensor([980.0, 21.0], device=DEVICE)

    def run(net: UNet, dtype: torch.dtype) -> Tensor:
        return net(x.to(dtype), net.project_time(timesteps), net.project_context(context.to(dtype)))

    check_net("UNet", lambda ops: UNet(SD15.unet, ops), run, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_full_size_vae(dtype: torch.dtype) -> None:
    z, image = draw(1, 64, 64, 4, seed=1, dtype=dtype), draw(1, 512, 512, 3, seed=2, dtype=dtype, scale=0.5)

    def make(ops: Ops) -> VAE:
        return VAE(SD15.vae, ops)

    check_net("VAE decode", make, lambda net, dtype: net.decode(z.to(dtype)), dtype)
    check_net("VAE encode", make, lambda net, dtype: net.encode(image.to(dtype)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_full_size_text_encoder(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check_net("CLIP", lambda ops: CLIPText(SD15.text_encoder, ops), lambda net, _: net(ids), dtype)
