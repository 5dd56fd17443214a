"""fastsd: Stable Diffusion, fast and checked. `fastsd.Pipeline().generate("a red circle").images[0]`."""

from fastsd.pipeline import Pipeline
from fastsd.result import Result

__version__ = "0.1.0"

__all__ = ["Pipeline", "Result", "__version__"]
