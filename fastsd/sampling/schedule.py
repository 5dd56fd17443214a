"""The noise schedule of a checkpoint: how much of the image is left at each training timestep, and how to walk it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsd.errors import CheckpointError, ParameterError
from fastsd.json_reader import JsonReader
from fastsd.wording import quoted, shown

Vector = npt.NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
ALMOST_ZERO = 2.0**-24
MAX_TRAIN_STEPS = 100_000  # a hundred times what is usual: a damaged file must not fill the memory

CONFIG_FILE = "scheduler/scheduler_config.json"

SAMPLER_OF_CLASS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "LMSDiscreteScheduler": "lms",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}

# The classes whose betas are by default not linear from 0.0001 to 0.02: (beta_schedule, beta_start, beta_end).
BETAS_OF_CLASS = {
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", 0.00085, 0.012)),
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), ("linear", 0.00085, 0.012)),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), ("linear", 0.00085, 0.012)),
}

# Options that change the result and that fastsd does not run: the values it accepts. An option absent here and not read
# by `from_config` does not change what a Stable Diffusion pipeline computes (clip_sample is forced off there).
ACCEPTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "variance_type": (None, "fixed_small"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (None, -math.inf),
}

# Options that make another sampler of a class: (diffusers' default, the values that fastsd runs).
# A config converted from another class may name that class's solver_type; diffusers then takes its own.
VARIANTS: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis")),
        "solver_order": (2, (2,)),
        "solver_type": ("midpoint", ("midpoint", "logrho", "bh1", "bh2")),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver++", ("dpmsolver++", "deis")),
        "solver_order": (2, (2,)),
        "solver_type": ("midpoint", ("midpoint", "logrho", "bh1", "bh2")),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2, (2,)),
        "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),
        "predict_x0": (True, (True,)),
        "disable_corrector": ([], ([],)),
        "solver_p": (None, (None,)),
    },
    "DEISMultistepScheduler": {"solver_order": (2, (2,))},
    "PNDMScheduler": {"skip_prk_steps": (False, (True,))},  # False: Runge-Kutta steps before PLMS
}

SCHEDULE_OF_OPTION = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
    "use_flow_sigmas": "flow",
}

# The keys whose null diffusers' classes take for "not set".
NULLABLE = (
    *("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type", "trained_betas"),
    *("rescale_betas_zero_snr", "disable_corrector"),
    *SCHEDULE_OF_OPTION,
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a checkpoint's ``scheduler_config.json`` says about noise: x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.

    alphas_cumprod      [T] float64, ᾱ_t in (0, 1), strictly falling with t; the last may be 0: zero terminal SNR
    prediction_type     what the UNet predicts: "epsilon" | "v_prediction" | "sample"
    sampler             our name of the checkpoint's own scheduler; diffusers' name where fastsd has no such sampler
    schedule            the checkpoint's own spacing of noise levels, of concern to samplers that walk σ only
    timestep_spacing    "leading" | "trailing" | "linspace"; None: the default of the sampler's class
    steps_offset        added to the timesteps of "leading" spacing
    set_alpha_to_one    whether the last step goes to ᾱ = 1, or stops at ᾱ_0; None: the default of the sampler's class
    final_sigmas_type   where Euler, DPM-Solver++ and UniPC stop: "zero", or "sigma_min", the noise of timestep 0
    lower_order_final   UniPC and DPM-Solver++(2S) end on a first-order step, DEIS and DPM-Solver++ in under 15 steps (the last
                        of them always where it ends at zero); None: they do, but (2S) only where it must
    euler_at_final      DPM-Solver++ ends on a first-order step in any number of steps
    distilled_steps     the steps a consistency model was distilled on: the timesteps that LCM and TCD choose from
    timestep_scaling    LCM's factor on the timestep in its boundary condition
    """

    alphas_cumprod: Vector
    prediction_type: str = "epsilon"
    sampler: str = "ddim"
    schedule: str = "uniform"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"
    lower_order_final: bool | None = None
    euler_at_final: bool = False
    distilled_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        alphas = np.asarray(self.alphas_cumprod, dtype=np.float64)
        betas = f"{CONFIG_FILE}: the betas (beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas)"
        if (
            alphas.ndim != 1
            or not alphas.size
            or not (np.all(alphas[:-1] > 0) and np.all(alphas < 1) and alphas[-1] >= 0)
        ):
            raise CheckpointError(f"{betas} must leave some of the image and of the noise at each timestep")
        if not np.all(np.diff(alphas) < 0):
            raise CheckpointError(f"{betas} must add noise at each timestep")
        object.__setattr__(self, "alphas_cumprod", alphas)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads a diffusers ``scheduler_config.json``; what it leaves out has the default of diffusers' classes.

        CheckpointError where the file is malformed, or asks for something fastsd would have to ignore.
        """
        read = JsonReader(config, CONFIG_FILE, nullable=NULLABLE)
        read.require(ACCEPTED_OPTIONS, "not supported by fastsd")
        to_one = read.flag("set_alpha_to_one", True) if "set_alpha_to_one" in read.json else None
        alphas_cumprod = np.cumprod(1.0 - _betas(read), dtype=np.float64)
        if read.flag("rescale_betas_zero_snr", False):
            alphas_cumprod = _to_zero_terminal_snr(alphas_cumprod)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=read.choice("prediction_type", "epsilon", PREDICTION_TYPES),
            sampler=_own_sampler(read),
            schedule=_own_schedule(read),
            timestep_spacing=read.choice("timestep_spacing", None, (*SPACINGS, None)),
            steps_offset=read.integer("steps_offset", 0, low=0, high=MAX_TRAIN_STEPS),
            set_alpha_to_one=to_one,
            final_sigmas_type=read.choice("final_sigmas_type", "zero", FINAL_SIGMAS_TYPES),
            lower_order_final=read.flag("lower_order_final", True) if "lower_order_final" in read.json else None,
            euler_at_final=read.flag("euler_at_final", False),
            distilled_steps=read.integer("original_inference_steps", 50, high=MAX_TRAIN_STEPS),
            timestep_scaling=read.number("timestep_scaling", 10.0, above=0),
        )

    @property
    def train_steps(self) -> int:
        """T, the number of timesteps the checkpoint was trained with."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Vector:
        """[T], noise per unit of signal: σ_t = sqrt((1 - ᾱ_t) / ᾱ_t), rising with t. k-diffusion's time.

        Where ᾱ_T is 0, diffusers' 2⁻²⁴ stands for it: σ_T is 4096, not infinite.
        """
        alphas = np.where(self.alphas_cumprod == 0, ALMOST_ZERO, self.alphas_cumprod)
        return np.sqrt((1.0 - alphas) / alphas)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return self.alphas_cumprod[-1] == 0

    def x0_and_eps(self, x: Vector, out: Vector, alpha_bar: float) -> tuple[Vector, Vector]:
        """The image and the noise that the UNet's output `out` says x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε is made of.

        v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0: Salimans & Ho 2022, "Progressive Distillation", appendix D.
        """
        a, s = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        if self.prediction_type == "v_prediction":
            return a * x - s * out, a * out + s * x
        if self.prediction_type == "sample":
            return out, (x - a * out) / s
        if a == 0:
            raise ParameterError("sampler: at zero terminal SNR ε says nothing of the image; choose euler or dpmpp_2m")
        return (x - s * out) / a, out


def _betas(read: JsonReader) -> Vector:
    """[T], the variance added at each training step."""
    if "trained_betas" in read.json:
        return np.array(read.numbers("trained_betas", above=0, below=1, most=MAX_TRAIN_STEPS))
    steps = read.integer("num_train_timesteps", 1000, high=MAX_TRAIN_STEPS)
    kind, start, end = BETAS_OF_CLASS.get(str(read.json.get("_class_name")), ("linear", 0.0001, 0.02))
    kind = read.choice("beta_schedule", kind, BETA_SCHEDULES)
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    start = read.number("beta_start", start, above=0, below=1)
    end = read.number("beta_end", end, above=0, below=1)
    if kind == "linear":
        return np.linspace(start, end, steps)
    return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2


def _cosine_betas(steps: int, largest: float = 0.999) -> Vector:
    """Nichol & Dhariwal 2021, "Improved DDPM", equation 17, with their cap on β."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], largest)


def _to_zero_terminal_snr(alphas_cumprod: Vector) -> Vector:
    """Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1: sqrt(ᾱ) is shifted to
    0 at the last timestep and scaled back to what it was at the first."""
    roots = np.sqrt(alphas_cumprod)
    if roots[-1] == roots[0]:
        raise CheckpointError(f"{CONFIG_FILE}: rescale_betas_zero_snr = True: needs at least two training timesteps")
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def _own_sampler(read: JsonReader) -> str:
    """Our name of the checkpoint's scheduler, or diffusers' where we have none and the user must choose another."""
    name = read.json.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str):
        raise read.error("_class_name", "must be the name of a class")
    for key, (default, ours) in VARIANTS.get(name, {}).items():
        value = read.json.get(key, default)
        if value not in ours:
            return f"{name} with {key} = {quoted(value)}"
    if name == "DPMSolverMultistepScheduler" and read.json.get("algorithm_type") == "sde-dpmsolver++":
        return "dpmpp_2m_sde"
    return SAMPLER_OF_CLASS.get(name, shown(name))


def _own_schedule(read: JsonReader) -> str:
    return next((name for option, name in SCHEDULE_OF_OPTION.items() if read.flag(option, False)), "uniform")
