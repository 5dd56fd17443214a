"""What the tests measure, noted beside their assertions: `python -m tests.support_matrix` reads it."""

from math import inf, isnan
from typing import Literal, NamedTuple

Unit = Literal["max abs error", "relative error", "relative L2", "dB", "values differ"]


class Measured(NamedTuple):
    """An error against an oracle and the largest that is allowed; in dB, a PSNR and the lowest."""

    unit: Unit
    value: float
    bound: float

    @property
    def share(self) -> float:
        """Of what is allowed: the bound holds up to 1. Infinite for a value that is not a number."""
        if isnan(self.value) or (self.bound == 0 and self.value != 0):
            return inf
        if self.unit == "dB":
            return 10 ** ((self.bound - self.value) / 20)  # of amplitudes; 0 where the pictures are equal
        return self.value / self.bound if self.bound else 0.0


NOTED: list[Measured] = []


def measured(unit: Unit, value: float, bound: float) -> None:
    """Note it. The caller asserts the bound itself, in words of its own."""
    NOTED.append(Measured(unit, float(value), float(bound)))
