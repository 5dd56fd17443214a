"""What a caller's function sees after each step, and what it may change."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import ParameterError
from fastsd.request import StepCallback
from fastsd.sampling import Table
from fastsd.wording import quoted


def after_step(callback: StepCallback | None, pipe: Any, table: Table) -> Callable[[int, Tensor], None] | None:
    """The caller's callback_on_step_end as `Denoiser.run` takes it. ParameterError where it answers with what is no latents."""
    if callback is None:
        return None

    def call(step: int, latents: Tensor) -> None:
        """latents [B, H, W, C]: a view of the state, overwritten by what the callback returns instead."""
        seen = latents.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        values: dict[str, Any] = {"latents": seen, "num_steps": len(table)}
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
            latents.copy_(replaced.to(latents.device, torch.float32).permute(0, 2, 3, 1))

    return call
