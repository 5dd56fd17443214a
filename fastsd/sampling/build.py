"""`make_table`: from what a user asks to a sampler's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastsd.errors import ParameterError
from fastsd.sampling.names import SAMPLERS, SamplerInfo, canonical_sampler, canonical_schedule
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk, simple_timesteps
from fastsd.sampling.table import Table
from fastsd.wording import quoted

SIGMA_RANGE = (1e-4, 1e4)  # a hundred times wider than any checkpoint's, and safe to square and to divide by

FROM_THE_LAST_TIMESTEP = ("sgm_uniform", "simple", "align_your_steps")
"""Schedules that say the spacing too, whatever the checkpoint's; as diffusers does, "sgm_uniform" is its "trailing"."""


def make_table(
    noise: NoiseSchedule,
    steps: int,
    sampler: str | None = None,
    schedule: str | None = None,
    *,
    eta: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
) -> Table:
    """The table of a sampler; it computes what its diffusers twin does, made by ``from_config`` of the same config.

    steps       in [1, T]; not looked at where timesteps or sigmas are given, as in diffusers: even 0 is right there
    sampler     any name `canonical_sampler` takes, None: the checkpoint's own
    schedule    any name `canonical_schedule` takes, None: the one in the sampler's name, else the checkpoint's own (of
                dpmpp_3m_sde exponential)
    eta         in [0, 1], the noise DDIM adds (by default 0), TCD's γ (0.3); the other samplers have no such knob and leave it,
                as diffusers does
    timesteps   numbers, strictly falling, in [0, T), for the samplers whose twin takes them
    sigmas      strictly falling, in SIGMA_RANGE, likewise; the walk ends at 0, which may be left out
    strength    in [0, 1], the share of the walk that is taken, its end: int(steps * strength) steps, at least one, as in
                diffusers' image-to-image

    ParameterError begins with the name of the argument that is wrong (of `Pipeline.generate`) and a colon.
    """
    info, named_schedule = _sampler(noise, sampler)
    if eta is not None and not (_is_real(eta) and 0 <= eta <= 1):
        raise ParameterError(f"eta: {quoted(eta)} is not right; it must be a number from 0 to 1")
    if timesteps is not None and sigmas is not None:
        raise ParameterError("timesteps: give either timesteps or sigmas, not both")
    _require_signal(noise, info)
    asked = _asked_schedule(schedule, named_schedule)
    if sigmas is not None:  # they overrule the checkpoint's own schedule, as in diffusers
        walk = _sigmas_walk(info, asked or "uniform", sigmas)
    elif timesteps is not None:
        walk = _timesteps_walk(noise, info, asked or _default_schedule(noise, info), timesteps)
    else:
        walk = _spaced_walk(noise, info, asked or _default_schedule(noise, info), steps)
        if walk.schedule in FROM_THE_LAST_TIMESTEP:
            noise = replace(noise, timestep_spacing="trailing")
    begin = walk.steps - int(walk.steps * strength)
    if begin == walk.steps:
        least = f"from 1/{walk.steps} on it takes one"
        raise ParameterError(f"strength: {quoted(strength)} of {walk.steps} steps is less than one; {least}")
    table = info.function(noise, replace(walk, eta=None if eta is None else float(eta), begin=begin))
    return table if info.multistep else table.from_row(begin * table.calls)


def _spaced_walk(noise: NoiseSchedule, info: SamplerInfo, schedule: str, steps: int) -> Walk:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= noise.train_steps:
        span = f"an integer from 1 to {noise.train_steps}"
        raise ParameterError(f"num_inference_steps: {quoted(steps)} is out of range; it must be {span}")
    if schedule not in info.schedules:
        takers = ", ".join(other.id for other in SAMPLERS.values() if schedule in other.schedules)
        raise ParameterError(f"schedule: {info.id} does not take {schedule}; the samplers that do: {takers}")
    return Walk(int(steps), schedule, timesteps=simple_timesteps(noise, int(steps)) if schedule == "simple" else None)


def _timesteps_walk(noise: NoiseSchedule, info: SamplerInfo, schedule: str, timesteps: Sequence[float]) -> Walk:
    _require_taken("timesteps", info, [other.id for other in SAMPLERS.values() if other.takes_timesteps])
    _require_uniform("timesteps", schedule)
    stops = _falling("timesteps", timesteps)
    if stops[0] >= noise.train_steps or stops[-1] < 0:
        found = f"{stops[0]:g} to {stops[-1]:g}"
        raise ParameterError(f"timesteps: {found} is out of range; they must lie in [0, {noise.train_steps})")
    if info.whole_timesteps and not np.array_equal(stops, stops.round()):
        raise ParameterError(f"timesteps: must be whole numbers for {info.id}; euler takes fractional ones")
    return Walk(len(stops), "custom", timesteps=stops)


def _sigmas_walk(info: SamplerInfo, schedule: str, sigmas: Sequence[float]) -> Walk:
    _require_taken("sigmas", info, [other.id for other in SAMPLERS.values() if other.takes_sigmas])
    _require_uniform("sigmas", schedule)
    stops = _falling("sigmas", sigmas)
    if stops[-1] == 0:
        stops = stops[:-1]
    low, high = SIGMA_RANGE
    if not stops.size or stops[0] > high or stops[-1] < low:
        raise ParameterError(f"sigmas: must lie in [{low:g}, {high:g}], except for a final 0 that may be left out")
    return Walk(len(stops), "custom", sigmas=stops)


def _sampler(noise: NoiseSchedule, name: str | None) -> tuple[SamplerInfo, str | None]:
    if name is not None:
        sampler, schedule = canonical_sampler(name)
        return SAMPLERS[sampler], schedule
    if noise.sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ParameterError(f"sampler: fastsd has not the checkpoint's own, {noise.sampler}; choose one of {known}")
    return SAMPLERS[noise.sampler], None


def _asked_schedule(schedule: str | None, named: str | None) -> str | None:
    """The schedule that the caller asked for in either way; None if in neither."""
    if schedule is None:
        return named
    chosen = canonical_schedule(schedule)
    if chosen is None:
        return named
    if named not in (None, chosen):
        raise ParameterError(f"schedule: {chosen}, but the sampler's name says {named}; give one of them")
    return chosen


def _default_schedule(noise: NoiseSchedule, info: SamplerInfo) -> str:
    if not info.follows_checkpoint:
        return info.default_schedule
    if noise.schedule not in info.schedules:
        known = ", ".join(info.schedules)
        raise ParameterError(f"schedule: fastsd has not the checkpoint's own, {noise.schedule}; choose one of {known}")
    return noise.schedule


def _require_signal(noise: NoiseSchedule, info: SamplerInfo) -> None:
    if noise.zero_terminal_snr and not info.zero_snr:
        takers = ", ".join(other.id for other in SAMPLERS.values() if other.zero_snr)
        asks = "the checkpoint's rescale_betas_zero_snr"
        raise ParameterError(f"sampler: {info.id} does not take {asks}; the samplers that do: {takers}")


def _require_taken(name: str, info: SamplerInfo, takers: list[str]) -> None:
    if info.id not in takers:
        raise ParameterError(f"{name}: {info.id} does not take them; the samplers that do: {', '.join(takers)}")


def _require_uniform(name: str, schedule: str) -> None:
    if schedule != "uniform":
        raise ParameterError(f"{name}: exclude the {schedule} schedule; pass schedule='uniform'")


def _falling(name: str, values: Sequence[float]) -> Vector:
    """A list, tuple, array or tensor of numbers as float64. Strings and booleans, which numpy would convert, are refused."""
    items = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(items, Sequence) or isinstance(items, str | bytes) or not all(_is_real(item) for item in items):
        raise ParameterError(f"{name}: must be a list of finite numbers, not {quoted(items, 60)}")
    stops = np.array([float(item) for item in items])
    if not stops.size or not np.all(np.diff(stops) < 0):
        raise ParameterError(f"{name}: must be a non-empty list of numbers, each smaller than the one before")
    return stops


def _is_real(value: object) -> bool:
    """Whether it is a number, and finite as a float: an integer of 400 digits is not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
