"""The random numbers of a CUDA device, on any machine: what `torch.randn(…, device="cuda")` draws for a seed.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3) ciphers a counter with the seed
for key. Thread i of draw d has the counter (d mod 2³², d / 2³², i mod 2³², i / 2³²); of its four words the first two make a
normal number by Box and Muller's method, in single precision as in cuRAND.
"""

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint32)  # of the golden ratio, and of √3 - 1
ROUNDS = 10
UNIT = np.float32(2.0**-32)
RADIANS = UNIT * np.float32(2 * math.pi)

FEWEST_THREADS = 40_960
"""Up to as many numbers a draw are the same on every card from a T4 on; see `Philox`."""


class Philox:
    """Draws as a CUDA `torch.Generator` with this seed does.

    PyTorch starts one thread a number, until the card is full: 40,960 on a T4, 196,608 on an RTX 4090, 270,336 on an H100.
    Larger draws go round again there with the threads' remaining words, so that one seed means another picture on another card.
    Here each number has a thread of its own in a draw of any size, as in the web UI's "NV" source.

    The numbers agree with the device's to about 1e-6: it takes the sine to 2⁻²¹.
    """

    def __init__(self, seed: int) -> None:
        """seed: in [0, 2⁶⁴)."""
        self.key = np.array([seed % 2**32, seed >> 32], np.uint32)
        self.draws = 0

    def normal(self, *shape: int) -> npt.NDArray[np.float32]:
        """The next draw: fp32 of this shape, of mean 0 and variance 1."""
        thread = np.arange(math.prod(shape), dtype=np.uint64)
        draw = np.full_like(thread, self.draws)
        counter = np.stack([draw, draw >> 32, thread, thread >> 32]).astype(np.uint32)
        self.draws += 1
        return box_muller(*philox4x32(counter, self.key)[:2]).reshape(shape)


def philox4x32(counter: Words, key: Words) -> Words:
    """The cipher of each column: counter [4, n], key [2] → [4, n], all uint32."""
    even, odd, keys = counter[::2], counter[1::2], key[:, None].copy()
    for _ in range(ROUNDS):
        product = even.astype(np.uint64) * MULTIPLIERS
        high, low = (product >> 32).astype(np.uint32), product.astype(np.uint32)
        even, odd = high[::-1] ^ odd ^ keys, low[::-1]
        keys += KEY_STEPS
    return np.stack([even[0], odd[0], even[1], odd[1]])


def box_muller(x: Words, y: Words) -> npt.NDArray[np.float32]:
    """The first of the two normal numbers that cuRAND makes of two words: sqrt(-2 log u) sin v, fp32.

    u in (0, 1] and v in (0, 2π] are rounded where cuRAND rounds them, which near u = 1 decides; the rest is rounded once.
    """
    u = _affine(x, UNIT).astype(np.float64)
    v = _affine(y, RADIANS).astype(np.float64)
    return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)


def _affine(words: Words, scale: np.float32) -> npt.NDArray[np.float32]:
    """scale · (words + 1/2), multiplied and added with one rounding."""
    return (words.astype(np.float32).astype(np.float64) * scale + scale / 2).astype(np.float32)
