"""The diffusion loss against diffusers' schedulers, its min-SNR weights, and one whole step against the oracles' nets."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from fastsd.errors import ParameterError
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.training.claims import Captions
from fastsd.training.data import Batch, Draws, Share, batches
from fastsd.training.diffusion import CaptionedLatents, DiffusionLoss, DiffusionTask, timestep_weights
from fastsd.training.loop import FitOptions, fit
from fastsd.training.model import Model
from fastsd.training.shape_captions import SLOTS
from tests.measured import measured
from tests.oracle import nchw
from tests.tolerances import ALPHA_BAR, NET
from tests.training.builders import CPU, SCHEDULER, differing, drawings, logged, state_of

PREDICTIONS = ("epsilon", "v_prediction", "sample")
UNBOUNDED = 1e9
PLAIN = DiffusionLoss()


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_config(SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": prediction})


def ddpm(prediction: str = "epsilon") -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler.from_config(SCHEDULER | {"prediction_type": prediction})


class Answering(nn.Module):
    """In the UNet's place: notes what it is asked, and gives the answer it was told."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer.requires_grad_()

    def project_time(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def project_context(self, context: Tensor) -> Tensor:
        return context

    def forward(self, noisy: Tensor, time: Tensor, context: Tensor) -> Tensor:
        self.noisy, self.time, self.context = noisy, time, context
        return self.answer


class Reading(nn.Module):
    """In the text encoder's place."""

    config = SimpleNamespace(hidden_size=3)

    def forward(self, ids: Tensor) -> Tensor:
        return 10 * ids


def draws(count: int) -> Draws:
    return Draws(0, 0, Share(count, 0, count), CPU)


def answered(
    prediction: str, loss: DiffusionLoss = PLAIN, count: int = 64
) -> tuple[Answering, dict[str, Tensor], Tensor, Tensor]:
    """A net with an arbitrary answer, the losses that it has, the latents, and the noise that was put on them."""
    generator = torch.Generator().manual_seed(1)
    latents, answer = (torch.randn(count, 4, 4, 4, generator=generator) for _ in range(2))
    net = Answering(answer)
    task = DiffusionTask(net, Reading(), schedule(prediction), loss)  # type: ignore[arg-type]
    found = task.losses({"latents": latents, "ids": torch.arange(count)}, draws(count), 0.0)
    same = draws(count)
    same.spread(torch.ones(1000))  # the timesteps are drawn first
    return net, found, latents, same.normal(4, 4, 4)


def target_of(net: Answering, error: Tensor) -> Tensor:
    """Seen in the gradient of the mean squared error, which is 2 · (answer − target) / N."""
    (slope,) = torch.autograd.grad(error, net.answer)
    return net.answer.detach() - slope * net.answer.numel() / 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_latents_and_targets_are_those_of_diffusers(prediction: str) -> None:
    net, found, latents, noise = answered(prediction)
    theirs, t = ddpm(prediction), net.time.long()
    torch.testing.assert_close(net.noisy, theirs.add_noise(latents, noise, t), rtol=0, atol=ALPHA_BAR)
    target = target_of(net, found["mse"])
    wanted = {"epsilon": noise, "v_prediction": theirs.get_velocity(latents, noise, t), "sample": latents}[prediction]
    torch.testing.assert_close(target, wanted, rtol=0, atol=ALPHA_BAR)
    assert torch.equal(net.context, 10 * torch.arange(64)), "the context is not what the text encoder says of the ids"
    torch.testing.assert_close(found["loss"], found["mse"])


def test_timesteps_are_of_the_whole_schedule() -> None:
    """10,000 pictures, ten for each of the 1,000 timesteps."""
    net, *_ = answered("epsilon", count=10_000)
    assert net.time.dtype == torch.float32
    assert torch.bincount(net.time.long()).tolist() == [10] * 1000


def test_high_noise_is_drawn_more_often_where_asked() -> None:
    """Twice as often where ᾱ is a quarter, with a bias of one half."""
    net = Answering(torch.zeros(20_000, 1, 1, 4))
    task = DiffusionTask(net, Reading(), schedule(), DiffusionLoss(noise_bias=0.5))  # type: ignore[arg-type]
    task.losses({"latents": torch.zeros(20_000, 1, 1, 4), "ids": torch.arange(20_000)}, draws(20_000), 0.0)
    chance = torch.tensor(schedule().alphas_cumprod) ** -0.5
    counts = torch.bincount(net.time.long(), minlength=1000)
    assert (counts - 20_000 * chance / chance.sum()).abs().max() < 2, "they are not drawn in proportion"
    assert counts[-1] > 10 * counts[0], "the bias does next to nothing, so this tells nothing"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_input_perturbation_is_seen_and_not_to_be_predicted(prediction: str) -> None:
    """The further noise is found in what the UNet is shown: of the deviation asked for, and with nothing of the noise in it."""
    net, found, latents, noise = answered(prediction, DiffusionLoss(input_perturbation=0.1), count=1000)
    plain, without, *_ = answered(prediction, count=1000)
    torch.testing.assert_close(target_of(net, found["mse"]), target_of(plain, without["mse"]), rtol=0, atol=ALPHA_BAR)
    deviation = torch.tensor(1 - schedule().alphas_cumprod).sqrt()[net.time.long()][:, None, None, None]
    further = (net.noisy - plain.noisy) / deviation
    assert further.std().item() == pytest.approx(0.1, rel=0.02), "64,000 values: 0.3% by chance"
    assert abs((further * noise).mean().item()) < 0.002, "the further noise goes with the noise"
    assert abs((further * latents).mean().item()) < 0.002, "the further noise goes with the picture"


def snr() -> Tensor:
    """diffusers', in float64."""
    scheduler = ddpm()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return compute_snr(scheduler, torch.arange(1000)).double()


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_script(prediction: str, gamma: float) -> None:
    """The formulas of train_text_to_image.py."""
    smaller = torch.stack([snr(), gamma * torch.ones(1000)], dim=1).min(dim=1)[0]
    wanted = smaller / snr() if prediction == "epsilon" else smaller / (snr() + 1)
    found = timestep_weights(schedule(prediction), DiffusionLoss(min_snr_gamma=gamma))
    measured("relative error", (found / wanted - 1).abs().max().item(), 10 * ALPHA_BAR)
    torch.testing.assert_close(found, wanted, rtol=10 * ALPHA_BAR, atol=0)
    assert found.max() > 1.5 * found.min(), "the weights are all the same, so this tells nothing"


def test_min_snr_weights_of_a_net_that_predicts_the_picture() -> None:
    """min(SNR, γ), which is what the paper's other two are derived from (arXiv 2303.09556, section 3.4)."""
    found = timestep_weights(schedule("sample"), DiffusionLoss(min_snr_gamma=5.0))
    torch.testing.assert_close(found, snr().clamp(max=5), rtol=10 * ALPHA_BAR, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_min_snr_every_timestep_counts_the_same(prediction: str) -> None:
    assert torch.equal(timestep_weights(schedule(prediction), PLAIN), torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_measured_in_v_it_is_the_error_of_v(prediction: str) -> None:
    """Any answer is turned into the v that it implies, with what the net was given; the loss is that v's error."""
    net, found, latents, noise = answered(prediction, DiffusionLoss(measure="v", greatest_weight=UNBOUNDED))
    ab = torch.tensor(schedule().alphas_cumprod)[net.time.long()][:, None, None, None]
    a, s, x_t, out = ab.sqrt(), (1 - ab).sqrt(), net.noisy.double(), net.answer.detach().double()
    implied = {
        "epsilon": a * out - s * (x_t - s * out) / a,
        "sample": a * (x_t - a * out) / s - s * out,
        "v_prediction": out,
    }[prediction]
    wanted = (implied - (a * noise - s * latents)).square().mean().item()
    assert found["loss"].item() == pytest.approx(wanted, rel=1e-4)
    assert prediction == "v_prediction" or abs(found["mse"].item() / wanted - 1) > 0.1, "v changes nothing"


def test_the_bounds_of_weights_measured_in_v() -> None:
    """By hand: 1 + 1/SNR up to its bound, times γ/SNR where SNR is above γ, down to the least."""
    loss = DiffusionLoss(measure="v", min_snr_gamma=5.0, least_weight=0.2, greatest_weight=30.0)
    found = timestep_weights(schedule(), loss).tolist()
    regions = {"bounded above": 0, "plain": 0, "min-SNR": 0, "bounded below": 0}
    for weight, ratio in zip(found, snr().tolist(), strict=True):
        per_v, factor = min(1 + 1 / ratio, 30.0), max(min(1.0, 5 / ratio), 0.2)
        assert weight == pytest.approx(per_v * factor, rel=1e-3)
        region = (
            "bounded above"
            if per_v == 30
            else "bounded below"
            if factor == 0.2
            else "plain"
            if factor == 1
            else "min-SNR"
        )
        regions[region] += 1
    assert all(regions.values()), f"a region has no timestep: {regions}"


@pytest.mark.parametrize(
    "loss", [PLAIN, DiffusionLoss(min_snr_gamma=5.0), DiffusionLoss(measure="v", min_snr_gamma=5.0)]
)
def test_weights_are_finite_where_nothing_of_the_picture_is_left(loss: DiffusionLoss) -> None:
    """Schedules with zero terminal SNR, which is what v-prediction is for (arXiv 2305.08891)."""
    config = SCHEDULER | {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    whole = NoiseSchedule.from_config(config)
    assert whole.alphas_cumprod[-1] == 0
    assert timestep_weights(whole, loss).isfinite().all()
    net = Answering(torch.zeros(1))
    task = DiffusionTask(net, Reading(), whole, replace(loss, noise_bias=0.5))  # type: ignore[arg-type]
    assert (draws(1000).spread(task.density) == 999).sum() < 20, "hardly anything but the last timestep is drawn"
    epsilon = NoiseSchedule.from_config(config | {"prediction_type": "epsilon"})
    with pytest.raises(ParameterError, match="zero terminal SNR"):
        DiffusionTask(net, Reading(), epsilon, loss)  # type: ignore[arg-type]


def test_the_loss_weighs_each_picture_by_its_timestep() -> None:
    loss = DiffusionLoss(min_snr_gamma=5.0)
    net, found, _, noise = answered("epsilon", loss)
    errors = (net.answer - noise).square().flatten(1).mean(1)
    weights = timestep_weights(schedule(), loss)[net.time.long()]
    assert found["loss"].item() == pytest.approx((weights * errors).mean().item(), rel=1e-5)
    assert found["mse"].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def latents_and_captions(model: Model, dropout: float = 0.0) -> CaptionedLatents:
    """Latents in float16, as run.py keeps them."""
    latents = np.random.default_rng(0).normal(size=(12, 16, 16, 4)).astype(np.float16)
    return CaptionedLatents(latents, Captions(drawings(), model.tokenizer, SLOTS, dropout))


def first_batch(model: Model, count: int = 3) -> Batch:
    return next(batches(latents_and_captions(model), Share(count, 0, count), 0, 0, 1))


def test_an_item_is_the_latents_of_a_picture_beside_its_own_caption(model: Model) -> None:
    source = latents_and_captions(model)
    item = source.item(5, np.random.default_rng(2))
    assert len(source) == 12
    assert item["latents"].dtype == torch.float32
    assert np.array_equal(item["latents"].numpy(), source.latents[5].astype(np.float32))
    caption = drawings().caption(5, rng_after_dropout(2))
    assert item["ids"].tolist() == model.tokenizer.encode([caption.text]).ids[0]


def rng_after_dropout(seed: int) -> np.random.Generator:
    rng = np.random.default_rng(seed)
    rng.random()  # whether the caption is dropped
    return rng


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_text_encoder_unless_it_is_frozen(frozen: bool, model: Model) -> None:
    model.text_encoder.requires_grad_(not frozen)
    task = DiffusionTask(model.unet, model.text_encoder, model.schedule, PLAIN)
    task.losses(first_batch(model), draws(3), 0.0)["loss"].backward()
    slopes = [weight.grad for weight in model.text_encoder.parameters()]
    if frozen:
        assert slopes == [None] * len(slopes)
    else:
        assert all(slope is not None and slope.abs().max() > 0 for slope in slopes), "some weights have no gradient"
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.unet.parameters())


def test_fitting_leaves_a_frozen_text_encoder_as_it_was(model: Model, tmp_path: Path) -> None:
    model.text_encoder.requires_grad_(False)
    before, unet = state_of(model.text_encoder), state_of(model.unet)
    task = DiffusionTask(model.unet, model.text_encoder, model.schedule, PLAIN)
    fit(task, latents_and_captions(model), FitOptions(steps=2, batch_size=2, warmup_steps=0, ema_decay=0), tmp_path)
    assert not differing(state_of(model.text_encoder), before)
    assert len(differing(state_of(model.unet), unet)) == len(unet), "some weights of the UNet were not trained"


def test_claims_are_added_to_the_loss(model: Model) -> None:
    torch.manual_seed(0)
    task = DiffusionTask(model.unet, model.text_encoder, model.schedule, DiffusionLoss(claims=0.3), SLOTS)
    batch = first_batch(model)
    found = task.losses(batch, draws(3), 0.0)
    assert task.heads is not None
    states = model.text_encoder(batch["ids"])[torch.arange(3), batch["end"]]
    terms = task.heads(states, batch["claims"])
    assert found["loss"].item() == pytest.approx((found["mse"] + 0.3 * terms["claims"]).item(), rel=1e-5)
    assert terms["claims"].item() > 1
    assert found["read"].item() == pytest.approx(terms["read"].item())


def named_gradients(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in net.named_parameters():
        if weight.grad is not None:
            yield name.removeprefix("text_model."), weight.grad


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_s_loss_and_gradients_are_those_of_the_oracles_nets(
    prediction: str, model: Model, trained_folder: Path
) -> None:
    """diffusers' UNet and transformers' text encoder with the same weights, ids, timesteps and noise."""
    batch, t_and_noise = first_batch(model), draws(3)
    whole = replace(model.schedule, prediction_type=prediction)
    ours = {"unet": model.unet, "text_encoder": model.text_encoder}
    found = DiffusionTask(model.unet, model.text_encoder, whole, PLAIN).losses(batch, draws(3), 0.0)["loss"]
    found.backward()

    theirs: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(trained_folder / "unet"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(trained_folder / "text_encoder"),
    }
    scheduler = ddpm(prediction)
    t = t_and_noise.spread(torch.ones(1000))
    latents, noise = nchw(batch["latents"]), nchw(t_and_noise.normal(16, 16, 4))
    context = theirs["text_encoder"](batch["ids"])[0]
    out = theirs["unet"](scheduler.add_noise(latents, noise, t), t, context).sample
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, t)
    wanted = F.mse_loss(out, target)
    wanted.backward()

    off = abs(found.item() / wanted.item() - 1)
    measured("relative error", off, NET)
    assert off <= NET, f"the loss is off by {off:.1e} of itself"
    for component, net in ours.items():
        slopes, truth = dict(named_gradients(net)), dict(named_gradients(theirs[component]))
        assert slopes.keys() == truth.keys(), f"{component}: other weights have gradients"
        largest = max(slope.abs().max().item() for slope in truth.values())
        for name, slope in truth.items():
            size = slope.abs().max().item()
            if name.endswith("k_proj.bias"):  # softmax takes it away: the gradient is zero, but for rounding
                assert max(size, slopes[name].abs().max().item()) < 1e-6 * largest, f"{component} {name}: is not zero"
                continue
            error = (slopes[name] - slope).abs().max().item() / size
            measured("relative error", error, NET)
            assert error <= NET, f"{component} {name}: the gradient is off by {error:.1e} of its largest value"


def test_in_bf16_a_step_is_nearly_that_of_fp32(model: Model, tmp_path: Path) -> None:
    """The whole way through the nets under autocast; bf16 has 8 bits, and its errors are independent."""
    lines = []
    for precision in ("fp32", "bf16"):
        options = FitOptions(steps=2, batch_size=3, log_every=1, precision=precision)  # type: ignore[arg-type]
        task = DiffusionTask(model.unet, model.text_encoder, model.schedule, PLAIN)
        fit(task, latents_and_captions(model), options, tmp_path / precision, stop_after=1)
        lines += logged(tmp_path / precision)
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=0.03)
    assert lines[1]["norm"] == pytest.approx(lines[0]["norm"], rel=0.1)
    assert lines[1] != lines[0], "bf16 changes nothing: was it on?"
