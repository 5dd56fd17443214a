"""What a caller's function sees after each step, and what it may change."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsd.denoise import AfterStep
from fastsd.errors import ParameterError
from fastsd.request import StepCallback
from fastsd.sampling import NoiseSchedule
from fastsd.walks import Walk
from fastsd.wording import quoted


def after_step(callback: StepCallback | None, pipe: Any, walk: Walk, schedule: NoiseSchedule) -> AfterStep | None:
    """The caller's callback_on_step_end as `Denoiser.run` takes it. ParameterError where it answers with what is no latents."""
    if callback is None:
        return None
    table, denoised = walk.table, Denoised(walk, schedule)

    def call(step: int, state: Tensor, noise: Tensor) -> None:
        """state [SLOTS, B, H, W, C]: a view; its latents are overwritten by what the callback returns instead."""
        latents, estimate = state[0], denoised.after(step, state, noise)
        seen, estimated = (
            x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format) for x in (latents, estimate)
        )
        values: dict[str, Any] = {"latents": seen, "denoised": estimated, "num_steps": len(table)}
        answer = callback(pipe, step, float(table.timesteps[step]), values)
        if not isinstance(answer, dict | None):
            raise ParameterError(f"callback_on_step_end: must return a dict or None, not {quoted(answer)}")
        replaced = (answer or {}).get("latents")
        if replaced is not None:
            if not isinstance(replaced, Tensor) or replaced.shape != seen.shape:
                wanted = f"a tensor {list(seen.shape)}"
                raise ParameterError(
                    f"callback_on_step_end: the latents it returns must be {wanted}, not {quoted(replaced)}"
                )
            replaced = replaced.to(latents.device, torch.float32).permute(0, 2, 3, 1)
            if latents.isfinite().all() and not replaced.isfinite().all():  # what the UNet spoilt is told as its own
                raise ParameterError(
                    f"callback_on_step_end: the latents it returns at step {step + 1} of {len(table)} are not finite"
                )
            latents.copy_(replaced)
        denoised.go_on(state)

    return call


class Denoised:
    """The UNet's guided estimates of x_0 in a walk, of each call the one that k-diffusion calls "denoised".

    The step keeps no output of the UNet, but as it is linear in it, the states before and after tell what it was.
    """

    def __init__(self, walk: Walk, schedule: NoiseSchedule) -> None:
        self.table, self.kept = walk.table, walk.kept
        self.prediction_type = schedule.prediction_type
        levels = walk.table.noise_levels(schedule)[:-1]
        self.shares = levels / np.linalg.norm(levels, axis=1, keepdims=True)  # [n, 2]: (sqrt(ᾱ), sqrt(1 − ᾱ))
        # On the device at once: a copy at each step would have the host wait for the GPU.
        self.update, self.model_input = (
            torch.from_numpy(rows).to(walk.latents) for rows in (walk.table.update, walk.table.model_input)
        )
        self.state = walk.latents.new_zeros(walk.table.state_size, *walk.latents.shape)
        self.state[0] = walk.latents * walk.table.initial_scale

    def after(self, step: int, state: Tensor, noise: Tensor) -> Tensor:
        """state after this step, noise that it added → the estimate [B, H, W, C]."""
        slots = self.table.state_size
        update = self.table.update[step]
        slot = int(abs(update[:, slots]).argmax())  # where the output shows best
        of_output, of_noise = update[slot, slots:].tolist()
        old = torch.tensordot(self.update[step, slot, :slots], self.state, 1)
        output = (state[slot] - old - of_noise * noise) / of_output
        x = torch.tensordot(self.model_input[step], self.state, 1)  # what the UNet saw
        signal, rest = self.shares[step].tolist()
        if self.prediction_type == "epsilon":
            estimate = (x - rest * output) / signal
        elif self.prediction_type == "v_prediction":
            estimate = signal * x - rest * output
        else:
            estimate = output
        return estimate if self.kept is None else torch.lerp(self.kept.image, estimate, self.kept.mask)

    def go_on(self, state: Tensor) -> None:
        """The next step begins with this state."""
        self.state.copy_(state[: len(self.state)])
