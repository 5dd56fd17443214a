"""What a sampler is here: for every step, a few rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastsd.sampling.schedule import NoiseSchedule, Vector


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler with its coefficients worked out: n UNet calls on a state of S latent-shaped slots.

        state[0] = initial_scale * unit Gaussian, the other slots 0; then for each step i
        out   = UNet(model_input[i] · state, timesteps[i])                 guided
        state = update[i] · (state_0 … state_{S-1}, out, noise)

    After the last step state[0] is the image in latent units.

    sampler, schedule   canonical names; schedule is "custom" where the caller gave timesteps or sigmas
    timesteps           [n] float64, in [0, T)
    model_input         [n, S] float64
    update              [n, S, S+2] float64
    initial_scale       > 0
    alpha_bars          [n] float64, ᾱ of what the UNet sees in each step, where the timestep does not tell it: of samplers on
                        x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε whose noise levels lie between whole timesteps. Else None
    calls               rows a step: 2 of samplers that call the UNet twice and make the step anew from where it began
    """

    sampler: str
    schedule: str
    timesteps: Vector
    model_input: Vector
    update: Vector
    initial_scale: float
    alpha_bars: Vector | None = None
    calls: int = 1

    def __post_init__(self) -> None:
        n, s = self.model_input.shape
        if self.timesteps.shape != (n,) or self.update.shape != (n, s, s + 2):
            shapes = f"timesteps {self.timesteps.shape}, model_input {(n, s)}, update {self.update.shape}"
            raise ValueError(f"a table has timesteps [n], model_input [n, S] and update [n, S, S+2]; got {shapes}")

    def __len__(self) -> int:
        """n, the number of UNet calls."""
        return len(self.timesteps)

    @property
    def state_size(self) -> int:
        """S, the number of latent-shaped tensors kept from step to step."""
        return self.model_input.shape[1]

    def from_row(self, row: int) -> Table:
        """The table without the rows before this one."""
        alpha_bars = None if self.alpha_bars is None else self.alpha_bars[row:]
        return replace(
            self,
            timesteps=self.timesteps[row:],
            model_input=self.model_input[row:],
            update=self.update[row:],
            alpha_bars=alpha_bars,
        )

    def noise_levels(self, noise: NoiseSchedule) -> Vector:
        """[n+1, 2]: before each step state[0] is levels[i, 0] x_0 + levels[i, 1] ε; after the last, (1, 0).

        What diffusers' schedulers compute in add_noise; but in the middle of a step of DPM2 and DPM++ SDE theirs gives the level
        of the step's end, below that of the latents and of what the UNet is told there. Read from the input scale where a table
        has one (x = x_0 + σ ε, which the UNet sees times sqrt(ᾱ)), else from alpha_bars or the timesteps.
        """
        scale = self.model_input[:, 0]
        alpha_bars = noise.alphas_cumprod[self.timesteps.round().astype(int)]
        if not np.all(scale == 1.0):
            alpha_bars = scale**2
        elif self.alpha_bars is not None:
            alpha_bars = self.alpha_bars
        levels = np.stack([np.sqrt(alpha_bars), np.sqrt(1.0 - alpha_bars)], axis=1) / scale[:, None]
        return np.concatenate([levels, [[1.0, 0.0]]])

    def noise_spans(self, noise: NoiseSchedule) -> Vector:
        """[n, 2]: σ = noise per unit of signal, from where to where each row adds fresh noise: from the level that its step
        began at to the one that it leads to."""
        signal, rest = self.noise_levels(noise).T
        sigmas, rows = rest / signal, np.arange(len(self))
        return np.stack([sigmas[rows - rows % self.calls], sigmas[1:]], axis=1)

    def needs_noise(self, step: int) -> bool:
        """Whether this step adds fresh noise."""
        return bool(np.any(self.update[step, :, -1]))


def basis(state_size: int) -> tuple[list[Vector], Vector, Vector]:
    """The quantities a step starts from, as unit vectors over (state_0 … state_{S-1}, out, noise).

    Arithmetic on these vectors is the arithmetic of the sampler, and its result is the row of the table.
    """
    unit = np.eye(state_size + 2)
    return list(unit[:state_size]), unit[-2], unit[-1]


def assemble(
    sampler: str,
    schedule: str,
    timesteps: Vector,
    states: Sequence[Sequence[Vector]],
    input_scales: Vector | None = None,
    initial_scale: float = 1.0,
    alpha_bars: Vector | None = None,
    calls: int = 1,
) -> Table:
    """A table from the state after each step, `states[i]` being its S slots as vectors over the basis.

    input_scales [n]: the UNet sees input_scales[i] * state[0]; None: the state's slot 0 as it is.
    """
    update = np.array(states)  # [n, S, S+2]
    model_input = np.zeros(update.shape[:2])
    model_input[:, 0] = 1.0 if input_scales is None else input_scales
    scale = float(initial_scale)
    return Table(sampler, schedule, timesteps.astype(np.float64), model_input, update, scale, alpha_bars, calls)
