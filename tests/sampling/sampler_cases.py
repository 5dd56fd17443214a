"""What the sampler tests share: scheduler configs as checkpoints have them, and the loop that runs a table."""

import json
from collections.abc import Callable

import numpy as np

from fastsd.sampling import SAMPLERS, Table
from tests.small_model import SMALL_MODEL

Array = np.ndarray
Model = Callable[[Array, float, int], Array]  # (scaled input, timestep, call) -> output

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SMALL = json.loads((SMALL_MODEL / "scheduler" / "scheduler_config.json").read_text())

CONFIGS = {
    "sd15": SD15,
    "sd15-trailing": {**SD15, "timestep_spacing": "trailing"},
    "sd15-linspace": {**SD15, "timestep_spacing": "linspace"},
    "sd21": SD21,
    "sd21-leading": {**SD21, "timestep_spacing": "leading"},
    "sd21-trailing": {**SD21, "timestep_spacing": "trailing"},
    "sd21-linspace": {**SD21, "timestep_spacing": "linspace"},
    "small": SMALL,
}

# Every sampler with every schedule it takes.
WALKS = [(info.id, schedule) for info in SAMPLERS.values() for schedule in info.schedules]


def run_table(table: Table, latents: Array, model: Model, noises: Array) -> tuple[list[Array], list[Array]]:
    """(what the UNet saw, the latents after) at every step. latents: any shape, unit Gaussian; noises: [n, *shape]."""
    state = np.zeros((table.state_size, *latents.shape))
    state[0] = table.initial_scale * latents
    seen, reached = [], []
    for i, timestep in enumerate(table.timesteps):
        seen.append(np.tensordot(table.model_input[i], state, axes=1))
        out = model(seen[-1], timestep, i)
        state = np.tensordot(table.update[i], np.stack([*state, out, noises[i]]), axes=1)
        reached.append(state[0])
    return seen, reached
