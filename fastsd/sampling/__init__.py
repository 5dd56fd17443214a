"""Samplers: `make_table(noise schedule, steps, sampler)` gives the numbers that drive every step of a generation."""

from fastsd.sampling.build import make_table
from fastsd.sampling.names import SAMPLERS, SamplerInfo, canonical_sampler, canonical_schedule, schedules
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.sampling.table import Table

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "SamplerInfo",
    "Table",
    "canonical_sampler",
    "canonical_schedule",
    "make_table",
    "schedules",
]
