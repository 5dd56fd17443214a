"""Training the UNet, and with it the text encoder, to take noise off latents as a caption says.

x_t = √ᾱ_t·x + √(1−ᾱ_t)·ε; the loss is the weighted mean squared error of what the UNet predicts (Ho et al. 2020, arXiv
2006.11239, eq. 14; Rombach et al. 2022, eq. 3). Weights: min-SNR (Hang et al. 2023, arXiv 2303.09556). Input perturbation: the
UNet sees γ·ξ more noise than it is to predict, for a sampler's x_t is not exact either (Ning et al. 2023, arXiv 2301.11706).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastsd.errors import ParameterError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.training.claims import Captions, ClaimHeads, Slots, end_state
from fastsd.training.data import Batch, Draws
from fastsd.training.loop import Task

FAINTEST = 1e-6
"""ᾱ of the last timestep for weights, where a schedule of zero terminal SNR has 0 (Lin et al. 2023, arXiv 2305.08891)."""

NOISIEST = 0.004
"""Below this ᾱ (Stable Diffusion's last is 0.0047) `noise_bias` favours no timestep more: where a schedule ends in 0, hardly
anything but its end would be drawn."""


@dataclass(frozen=True)
class DiffusionLoss:
    """How the squared error at each noise level counts.

    measure: "prediction": of what the UNet predicts; "v": as if it predicted v, which counts high noise levels, where the
    caption decides, by 1 + 1/SNR more than an error in ε (Salimans & Ho 2022, arXiv 2202.00512).
    """

    measure: Literal["prediction", "v"] = "prediction"
    min_snr_gamma: float | None = None  # γ of min(SNR, γ); None: off
    least_weight: float = 0.0  # of min-SNR's factor
    greatest_weight: float = 120.0  # of 1 + 1/SNR
    noise_bias: float = 0.0  # timesteps are drawn in proportion to ᾱ^(−noise_bias), down to the ᾱ of NOISIEST
    input_perturbation: float = 0.0  # γ, the deviation of the further noise, in that of the noise
    claims: float = 0.0  # of the heads' loss, see claims.py


class DiffusionTask(Task):
    """The UNet is trained, and the text encoder unless it is frozen (requires_grad_(False))."""

    def __init__(
        self,
        unet: UNet,
        text_encoder: CLIPText,
        schedule: NoiseSchedule,
        loss: DiffusionLoss,
        slots: Slots | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.loss = unet, text_encoder, loss
        self.prediction_type = schedule.prediction_type
        if self.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            raise ParameterError("scheduler: with zero terminal SNR a model cannot predict epsilon; train one for v")
        width = text_encoder.config.hidden_size
        self.heads = ClaimHeads(slots, width) if loss.claims and slots is not None else None
        alphas = torch.tensor(schedule.alphas_cumprod)
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt().float(), persistent=False)
        self.register_buffer("weights", timestep_weights(schedule, loss).float(), persistent=False)
        self.register_buffer("density", alphas.clamp(min=NOISIEST) ** -loss.noise_bias, persistent=False)

    signal: Tensor
    noise: Tensor
    weights: Tensor
    density: Tensor

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        """batch: "latents" [B, h, w, 4], "ids" [B, L]; with heads "end" and "claims" as well."""
        latents: Tensor = batch["latents"].float()
        t = draws.spread(self.density)
        noise = draws.normal(*latents.shape[1:])
        a, s = (table[t][:, None, None, None] for table in (self.signal, self.noise))
        seen = noise
        if gamma := self.loss.input_perturbation:
            seen = noise + gamma * draws.normal(*noise.shape[1:])
        noisy = a * latents + s * seen
        targets = {"epsilon": noise, "sample": latents, "v_prediction": a * noise - s * latents}
        context = self.text_encoder(batch["ids"])
        out = self.unet(noisy, self.unet.project_time(t.float()), self.unet.project_context(context))
        error = (out.float() - targets[self.prediction_type]).square().flatten(1).mean(1)  # [B]
        losses = {"loss": (self.weights[t] * error).mean()}
        losses["mse"] = error.mean()
        if self.heads is not None:
            terms = self.heads(end_state(context, batch["end"]), batch["claims"])
            losses["loss"] = losses["loss"] + self.loss.claims * terms["claims"]
            losses["read"] = terms["read"]
        return losses


def timestep_weights(schedule: NoiseSchedule, loss: DiffusionLoss) -> Tensor:
    """The factor of each timestep's squared error. [T] float64."""
    alphas = torch.tensor(schedule.alphas_cumprod).clamp(min=FAINTEST)
    snr = alphas / (1 - alphas)
    per_v = {"epsilon": 1 + 1 / snr, "v_prediction": torch.ones_like(snr), "sample": 1 + snr}[schedule.prediction_type]
    if loss.measure == "v":
        factor = torch.ones_like(snr) if loss.min_snr_gamma is None else (loss.min_snr_gamma / snr).clamp(max=1)
        return factor.clamp(min=loss.least_weight) * per_v.clamp(max=loss.greatest_weight)
    if loss.min_snr_gamma is None:
        return torch.ones_like(snr)
    per_sample = {"epsilon": 1 / snr, "v_prediction": 1 / (1 + snr), "sample": torch.ones_like(snr)}
    return snr.clamp(max=loss.min_snr_gamma) * per_sample[schedule.prediction_type]


@dataclass(frozen=True)
class CaptionedLatents:
    """Cached latents [N, h, w, 4] beside the captions of their pictures. A `Source`."""

    latents: np.ndarray
    captions: Captions

    def __len__(self) -> int:
        return len(self.latents)

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"latents": torch.from_numpy(self.latents[index].astype(np.float32)), **self.captions.item(index, rng)}
