"""The noise schedule of a checkpoint: how much of the image is left at each training timestep, and how to walk it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsd.errors import CheckpointError

Vector = npt.NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
MAX_TRAIN_STEPS = 100_000  # a hundred times what is usual: a damaged file must not fill the memory

SAMPLER_OF_CLASS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}

# Options that change the result and that fastsd does not run: the values it accepts. An option absent here and not read
# by `from_config` does not change what a Stable Diffusion pipeline computes (clip_sample is forced off there).
ACCEPTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "rescale_betas_zero_snr": (False, None),
    "thresholding": (False, None),
    "variance_type": (None, "fixed_small"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (None, -math.inf),
}

SCHEDULE_OF_OPTION = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
    "use_flow_sigmas": "flow",
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a checkpoint's ``scheduler_config.json`` says about noise: x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.

    alphas_cumprod      [T] float64, ᾱ_t in (0, 1), strictly falling with t
    prediction_type     what the UNet predicts: "epsilon" | "v_prediction" | "sample"
    sampler             our name of the checkpoint's own scheduler; diffusers' name where fastsd has no such sampler
    schedule            the checkpoint's own spacing of noise levels, of concern to Euler and DPM-Solver++ only
    timestep_spacing    "leading" | "trailing" | "linspace"; None: the default of the sampler's class
    steps_offset        added to the timesteps of "leading" spacing
    set_alpha_to_one    whether the last step goes to ᾱ = 1, or stops at ᾱ_0; None: the default of the sampler's class
    final_sigmas_type   where Euler and DPM-Solver++ stop: "zero", or "sigma_min", the noise of timestep 0
    lower_order_final   DPM-Solver++ in under 15 steps ends on a first-order step (it always does when it ends at zero)
    euler_at_final      DPM-Solver++ ends on a first-order step in any number of steps
    """

    alphas_cumprod: Vector
    prediction_type: str = "epsilon"
    sampler: str = "ddim"
    schedule: str = "uniform"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        _require_one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require_one_of("timestep_spacing", self.timestep_spacing, (*SPACINGS, None))
        _require_one_of("final_sigmas_type", self.final_sigmas_type, FINAL_SIGMAS_TYPES)
        if isinstance(self.steps_offset, bool) or not isinstance(self.steps_offset, int) or self.steps_offset < 0:
            raise CheckpointError(f"scheduler config: steps_offset must be an integer >= 0, got {self.steps_offset!r}")
        alphas = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if alphas.ndim != 1 or not alphas.size or not (np.all(alphas > 0) and np.all(alphas < 1)):
            raise CheckpointError("scheduler config: the betas must be numbers between 0 and 1, exclusive")
        if not np.all(np.diff(alphas) < 0):
            raise CheckpointError("scheduler config: alphas_cumprod must fall from one timestep to the next")
        object.__setattr__(self, "alphas_cumprod", alphas)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads a diffusers ``scheduler_config.json``; what it leaves out has the default of diffusers' classes.

        CheckpointError where the file is malformed, or asks for something fastsd would have to ignore.
        """
        for option, accepted in ACCEPTED_OPTIONS.items():
            if option in config and config[option] not in accepted:
                raise CheckpointError(f"scheduler config: {option}={config[option]!r} is not supported by fastsd")
        return cls(
            alphas_cumprod=np.cumprod(1.0 - _betas(config), dtype=np.float64),
            prediction_type=config.get("prediction_type") or "epsilon",
            sampler=_own_sampler(config),
            schedule=_own_schedule(config),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=config.get("steps_offset") or 0,
            set_alpha_to_one=config.get("set_alpha_to_one"),
            final_sigmas_type=config.get("final_sigmas_type") or "zero",
            lower_order_final=config.get("lower_order_final", True),
            euler_at_final=config.get("euler_at_final", False),
        )

    @property
    def train_steps(self) -> int:
        """T, the number of timesteps the checkpoint was trained with."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Vector:
        """[T], noise per unit of signal: σ_t = sqrt((1 - ᾱ_t) / ᾱ_t), rising with t. k-diffusion's time."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    def x0_and_eps(self, x: Vector, out: Vector, alpha_bar: float) -> tuple[Vector, Vector]:
        """The image and the noise that the UNet's output `out` says x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε is made of.

        v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0: Salimans & Ho 2022, "Progressive Distillation", appendix D.
        """
        a, s = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        if self.prediction_type == "v_prediction":
            return a * x - s * out, a * out + s * x
        if self.prediction_type == "sample":
            return out, (x - a * out) / s
        return (x - s * out) / a, out


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        known = ", ".join(str(item) for item in allowed if item is not None)
        raise CheckpointError(f"scheduler config: {name} must be one of {known}, got {value!r}")


def _betas(config: Mapping[str, Any]) -> Vector:
    """[T], the variance added at each training step."""
    try:
        trained = config.get("trained_betas")
        if trained is not None:
            return np.asarray(trained, dtype=np.float64).reshape(len(trained))
        steps = int(config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= MAX_TRAIN_STEPS:
            raise CheckpointError(f"scheduler config: num_train_timesteps must be 1 to {MAX_TRAIN_STEPS}, got {steps}")
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        _require_one_of("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if kind == "linear":
            return np.linspace(start, end, steps)
        if kind == "scaled_linear":
            return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
        return _cosine_betas(steps)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler config: the betas cannot be read ({error})") from error


def _cosine_betas(steps: int, largest: float = 0.999) -> Vector:
    """Nichol & Dhariwal 2021, "Improved DDPM", equation 17, with their cap on β."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], largest)


def _own_sampler(config: Mapping[str, Any]) -> str:
    """Our name of the checkpoint's scheduler, or diffusers' where we have none and the user must choose another."""
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name == "DPMSolverMultistepScheduler":
        variant = (
            config.get("algorithm_type", "dpmsolver++"),
            config.get("solver_order", 2),
            config.get("solver_type", "midpoint"),
        )
        if variant != ("dpmsolver++", 2, "midpoint"):
            return f"{name} ({', '.join(str(part) for part in variant)})"
    return SAMPLER_OF_CLASS.get(name, name)


def _own_schedule(config: Mapping[str, Any]) -> str:
    return next((name for option, name in SCHEDULE_OF_OPTION.items() if config.get(option)), "uniform")
