"""fastsd: Stable Diffusion, fast and checked. `fastsd.Pipeline().generate("a red circle").images[0]`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.autoencoder import Autoencoder
    from fastsd.noise import slerp
    from fastsd.pipeline import Pipeline
    from fastsd.result import Result

__version__ = "0.1.0"

__all__ = ["Autoencoder", "Pipeline", "Result", "__version__", "slerp"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and PyTorch with it, when it is first asked for: `fastsd --help` need not wait for them."""
    if name == "Autoencoder":
        from fastsd.autoencoder import Autoencoder

        return Autoencoder
    if name == "Pipeline":
        from fastsd.pipeline import Pipeline

        return Pipeline
    if name == "Result":
        from fastsd.result import Result

        return Result
    if name == "slerp":
        from fastsd.noise import slerp

        return slerp
    raise AttributeError(f"module 'fastsd' has no attribute {name!r}")
