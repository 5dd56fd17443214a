"""TAESD's decoder in a file: as diffusers saves a whole AutoencoderTiny, or as the original's `taesd_decoder.safetensors`."""

from pathlib import Path

from fastsd.checkpoints.file_parts import Part
from fastsd.checkpoints.ldm_keys import Table, renamed
from fastsd.checkpoints.safetensors_file import TensorSpec, open_safetensors
from fastsd.wording import shown

LAYERS = 64
"""More than any of these decoders has."""

# Both names of a layer → the module's. The original counts its clamp, which has no weights, as layer 0.
_NAMES: Table = {"decoder.layers": "layers"} | {str(number + 1): f"layers.{number}" for number in range(LAYERS)}
_ENCODER = "encoder.layers."


def open_taesd_decoder(path: str | Path) -> Part:
    """The decoder's tensors under the names of `TAESDDecoder`, none read yet; CheckpointError for what is no safetensors file.

    Tensors of other names keep them, and `fill_module` refuses them.
    """
    path = Path(path)
    file = open_safetensors(path, shown(path.name))
    tensors: dict[str, TensorSpec] = {}
    pieces: dict[str, tuple[str, ...]] = {}
    for name, spec in file.tensors.items():
        if name.startswith(_ENCODER):
            continue
        target = renamed(name, _NAMES)
        target = name if target is None or target in tensors else target
        tensors[target], pieces[name] = spec, (target,)
    return Part(file.label, tensors, file, pieces)
