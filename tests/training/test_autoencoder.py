"""The autoencoder's loss against plain formulas on what diffusers' AutoencoderKL computes, its crops, and its posterior."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastsd.config import VAEConfig
from fastsd.models.vae import VAE
from fastsd.training.autoencoder import (
    AutoencoderLoss,
    AutoencoderTask,
    Pictures,
    as_tensor,
    fix_posterior,
    reconstruction,
)
from fastsd.training.data import Caption, Draws, Share
from fastsd.training.loop import FitOptions, fit
from fastsd.training.model import Model
from tests.measured import measured
from tests.oracle import nchw, nhwc
from tests.tolerances import NET
from tests.training.builders import CPU, OPTIONS, RESOLUTION, differing, drawings, logged, state_of

ONLY = AutoencoderLoss(l1=0, l2=0, scales=0, gradients=0, kl=0)


def draws(count: int) -> Draws:
    return Draws(0, 0, Share(count, 0, count), CPU)


def pictures(count: int = 2) -> Tensor:
    return torch.stack([as_tensor(drawings().image(index)) for index in range(count)])


def saved(model: Model, path: Path) -> diffusers.AutoencoderKL:
    """The written VAE as diffusers reads it."""
    model.save(path)
    return diffusers.AutoencoderKL.from_pretrained(path / "vae").eval()


def pooled(image: Tensor, size: int) -> Tensor:
    """[B, H, W, C] averaged over squares, by reshaping."""
    b, h, w, c = image.shape
    return image.reshape(b, h // size, size, w // size, size, c).mean((2, 4))


def terms_by_hand(out: Tensor, image: Tensor) -> dict[str, float]:
    """In float64 and by index, to share nothing with the code but the docstrings."""
    e = (out - image).double().numpy()
    scales = [abs(pooled(torch.tensor(e), size)).mean().item() for size in (2, 4, 8)]
    return {
        "l1": abs(e).mean(),
        "l2": (e**2).mean(),
        "scales": sum(scales) / 3,
        "gradients": abs(np.diff(e, axis=2)).mean() + abs(np.diff(e, axis=1)).mean(),
    }


def test_the_terms_of_the_reconstruction() -> None:
    generator = torch.Generator().manual_seed(0)
    out, image = (torch.randn(2, 16, 24, 3, generator=generator) for _ in range(2))
    found = {name: value.item() for name, value in reconstruction(out, image).items()}
    assert found == pytest.approx(terms_by_hand(out, image), rel=1e-5)
    assert not any(value.item() for value in reconstruction(image, image).values())


def test_edges_count_by_their_steepness_and_scales_by_their_average() -> None:
    """A row of stripes one pixel wide has steep edges and no average; a plane has an average and no edges."""
    stripes = torch.zeros(1, 8, 8, 3)
    stripes[:, :, ::2] = 1
    stripes -= 0.5
    found = reconstruction(stripes, torch.zeros_like(stripes))
    assert (found["scales"].item(), found["gradients"].item()) == (0, 1)
    found = reconstruction(torch.full((1, 8, 8, 3), 0.25), torch.zeros(1, 8, 8, 3))
    assert (found["scales"].item(), found["gradients"].item()) == (0.25, 0)


def expected(theirs: diffusers.AutoencoderKL, image: Tensor, logvar: float | None) -> tuple[dict[str, float], float]:
    """The terms of diffusers' reconstruction from the task's own noise, and the KL divergence by torch.distributions."""
    with torch.no_grad():
        posterior = theirs.encode(nchw(image)).latent_dist
        mean = nhwc(posterior.mean)
        spread = nhwc(posterior.std) if logvar is None else torch.full_like(mean, float(np.exp(logvar / 2)))
        noise = draws(len(image)).normal(*mean.shape[1:])
        out = nhwc(theirs.decode(nchw(mean + spread * noise)).sample)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, spread), normal(torch.zeros(()), torch.ones(()))).mean().item()
    return terms_by_hand(out, image), kl


@pytest.mark.parametrize("logvar", [None, -3.0])
def test_the_loss_is_that_of_diffusers_autoencoder(logvar: float | None, model: Model, tmp_path: Path) -> None:
    """Scaling and shift of the latents must cancel: the posterior is of the unscaled ones."""
    theirs, image = saved(model, tmp_path / "model"), pictures()
    model.vae.config = replace(model.vae.config, scaling_factor=0.4, shift_factor=0.3)
    terms, kl = expected(theirs, image, logvar)
    loss = AutoencoderLoss(l1=0.7, l2=1.3, scales=0.4, gradients=0.9, kl=0.11, posterior_logvar=logvar)
    found = AutoencoderTask(model.vae, loss).losses({"image": image}, draws(2), 0.5)
    total = 0.7 * terms["l1"] + 1.3 * terms["l2"] + 0.4 * terms["scales"] + 0.9 * terms["gradients"] + 0.11 * kl
    wanted = {"loss": total, "l1": terms["l1"], "kl": kl, "psnr": 10 * np.log10(4 / terms["l2"])}
    measured("relative error", max(abs(found[name].item() / value - 1) for name, value in wanted.items()), NET)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, rel=NET)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (1 / 6, 0.5), (1 / 3, 0.0), (0.9, 0.0)])
def test_latents_are_pulled_to_the_colours_in_the_first_third(progress: float, share: float, model: Model) -> None:
    image = pictures()
    task = AutoencoderTask(model.vae, replace(ONLY, colour_pull=0.8))
    found = task.losses({"image": image}, draws(2), progress)["loss"].item()
    mean = model.vae.moments(image)[0].detach()
    assert mean.shape == (2, 16, 16, 4)
    wanted = 0.8 * share * (mean[..., :3] - pooled(image, 2)).square().mean().item()
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_encoder_keeps_its_bits(freeze: bool, model: Model, tmp_path: Path) -> None:
    vae = model.vae.requires_grad_(True)
    before = state_of(vae)
    loss = AutoencoderLoss(posterior_logvar=-3.0, freeze_encoder=freeze)
    task = AutoencoderTask(vae, loss)
    fit(task, Pictures(drawings()), FitOptions(steps=2, batch_size=2, warmup_steps=0, ema_decay=0), tmp_path)
    changed = {place.strip("/").split(".")[0] for place in differing(state_of(vae), before)}
    decoder = {"decoder", "post_quant_conv"}
    assert changed == (decoder if freeze else decoder | {"encoder", "quant_conv"})


@pytest.mark.parametrize("use_quant_conv", [True, False])
def test_the_written_encoder_has_the_posterior_it_was_trained_with(
    use_quant_conv: bool, model: Model, tmp_path: Path
) -> None:
    if not use_quant_conv:
        model.configs["vae"] = model.configs["vae"] | {"use_quant_conv": False}
        model.vae.quant_conv = None
    image = pictures()
    before = model.vae.moments(image)[0].detach()
    fix_posterior(model.vae, -4.6)
    posterior = saved(model, tmp_path / "model").encode(nchw(image)).latent_dist
    assert posterior.logvar.min().item() == pytest.approx(-4.6, abs=1e-6)
    assert posterior.logvar.max().item() == pytest.approx(-4.6, abs=1e-6)
    torch.testing.assert_close(nhwc(posterior.mean), before, rtol=0, atol=NET)
    assert torch.equal(model.vae.moments(image)[0], before), "the means have changed"


def test_two_pictures_are_learnt_by_heart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_json(OPTIONS.vae))
    loss = AutoencoderLoss(posterior_logvar=-4.6, kl=1e-4)
    options = FitOptions(steps=60, batch_size=2, learning_rate=1e-2, warmup_steps=5, ema_decay=0, log_every=1)
    fit(AutoencoderTask(vae, loss), Pictures(drawings(2)), options, tmp_path)
    lines = logged(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] / 4, f"from {lines[0]['loss']} to {lines[-1]['loss']} only"
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 10


class Places:
    """A picture whose colours say where each pixel is; in its right two thirds there is nothing to see. A `Dataset`."""

    def __init__(self, flat_from: int = 30) -> None:
        self.flat_from = flat_from

    def __len__(self) -> int:
        return 3

    def image(self, index: int) -> np.ndarray:
        y, x = np.mgrid[:20, :30]
        picture = np.stack([x * 8, y * 12, np.full_like(x, index)], -1).astype(np.uint8)
        picture[:, self.flat_from :] = 255
        return picture

    def caption(self, index: int, rng: np.random.Generator) -> Caption:
        raise AssertionError("not asked for")


def crops(dataset: Places, count: int, flat: float = 0.1) -> list[np.ndarray]:
    source = Pictures(dataset, crop=8, flat=flat)
    items = [source.item(1, np.random.default_rng(seed))["image"] for seed in range(count)]
    return [((item.numpy() + 1) * 127.5).round().astype(np.uint8) for item in items]


def test_crops_are_cut_from_everywhere() -> None:
    picture, corners = Places().image(1), set()
    for crop in crops(Places(), 5000):
        left, top = crop[0, 0, 0] // 8, crop[0, 0, 1] // 12
        assert np.array_equal(crop, picture[top : top + 8, left : left + 8]), f"no crop at {top}, {left}"
        corners.add((int(top), int(left)))
    assert corners == {(top, left) for top in range(13) for left in range(23)}, "some places are never cut out"


def test_crops_of_one_colour_are_rare() -> None:
    """Two thirds of the places show nothing: of crops that are taken as they come, 12 of 23 columns. A second look at nine of
    ten of these leaves about one in seven."""
    plain, chosen = (crops(Places(flat_from=11), 600, flat) for flat in (1.0, 0.1))
    shares = [sum(int(crop.std((0, 1)).max() == 0) for crop in found) / 600 for found in (plain, chosen)]
    assert 0.42 < shares[0] < 0.62, f"{shares[0]:.2f} of the plain crops are of one colour: the picture tells nothing"
    assert 0.02 < shares[1] < 0.2, f"{shares[1]:.2f} of the crops are of one colour"


def test_a_picture_of_one_colour_is_cropped_all_the_same() -> None:
    assert all(crop.shape == (8, 8, 3) for crop in crops(Places(flat_from=0), 5, flat=0.0))


def test_whole_pictures_are_not_cropped() -> None:
    source = Pictures(drawings())
    image = source.item(3, np.random.default_rng(0))["image"]
    assert len(source) == 12
    assert image.shape == (RESOLUTION, RESOLUTION, 3)
    assert np.array_equal(((image.numpy() + 1) * 127.5).round(), drawings().image(3))


def test_colours_lie_in_minus_one_to_one() -> None:
    found = as_tensor(np.array([[[0, 255, 51]]], np.uint8))
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-6)
