"""Every error fastsd raises on purpose.

Each is a :class:`FastSDError` and also of the builtin type a Python user would expect to catch. The message says what is
wrong and how to mend it, in one line where possible.
"""


class FastSDError(Exception):
    """Base of all errors raised by fastsd."""


class CheckpointError(FastSDError, OSError):
    """A checkpoint is missing, damaged, unsafe, or of an architecture fastsd does not run."""


class HubError(CheckpointError):
    """A model could not be had from the Hugging Face Hub (offline, unknown, gated, no such revision)."""


class PromptError(FastSDError, ValueError):
    """A prompt cannot be encoded (too large, not valid Unicode, lists that do not match)."""


class ParameterError(FastSDError, ValueError):
    """An argument is outside its range or of the wrong kind; the message names it and its range."""


class ImageError(FastSDError, ValueError):
    """An input image cannot be read, or an output image cannot be written."""


class NumericsError(FastSDError, ArithmeticError):
    """A net produced a non-finite value; the message names the stage and the step."""


class OutOfMemoryError(FastSDError, MemoryError):
    """The device has not the memory for what was asked; the message says what would need less."""
