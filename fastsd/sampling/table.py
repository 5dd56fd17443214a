"""What a sampler is here: for every step, a few rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastsd.sampling.schedule import Vector


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
    """

    sampler: str
    schedule: str
    timesteps: Vector
    model_input: Vector
    update: Vector
    initial_scale: float

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
) -> Table:
    """A table from the state after each step, `states[i]` being its S slots as vectors over the basis.

    input_scales [n]: the UNet sees input_scales[i] * state[0]; None: the state's slot 0 as it is.
    """
    update = np.array(states)  # [n, S, S+2]
    model_input = np.zeros(update.shape[:2])
    model_input[:, 0] = 1.0 if input_scales is None else input_scales
    return Table(sampler, schedule, timesteps.astype(np.float64), model_input, update, float(initial_scale))
