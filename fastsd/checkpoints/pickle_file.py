"""A pickled state dict (`.bin`), for users who opted in: read by torch's restricted unpickler after checks of ours.

`weights_only=True` builds tensors and containers and calls nothing else. It does not bound memory: a zip entry may be
compressed a thousandfold, and a sparse tensor may stand for any size. Hence the checks around it.
"""

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.checkpoints.file_bytes import LEGACY_PICKLE, foreign_format, opened, read_exactly
from fastsd.checkpoints.safetensors_file import MAX_TENSORS, TensorSpec
from fastsd.errors import CheckpointError
from fastsd.wording import shown

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class PickleFile:
    """A pickle's tensors. Its names are only known by loading it, so unlike a safetensors file it is held whole."""

    label: str
    tensors: dict[str, TensorSpec]
    values: dict[str, torch.Tensor]
    global_step: int | None = None

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors; they may share memory with one another, and are not to be written to."""
        return dict(self.values)

    def read_tensors(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """These tensors alone; likewise."""
        return {name: self.values[name] for name in names}


class _Callback:
    """Stands for a class of PyTorch Lightning's, by which training checkpoints name an entry that nobody needs here."""


Classes = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

_LIGHTNING: Classes = [(_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def open_pickle(path: Path, label: str, training: bool = False) -> PickleFile:
    """Load the pickle `path`. Peak: twice the file. training: it may be a training checkpoint, of which `state_dict` is read.

    Raises CheckpointError for anything but a flat mapping of names to dense CPU tensors in a torch.save file whose
    zip entries are stored uncompressed.
    """
    with opened(path, label) as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(32)
    is_zip = head.startswith(b"PK\x03\x04")
    if not is_zip and not head.startswith(LEGACY_PICKLE):
        raise CheckpointError(f"{label}: not a file of torch.save: {_other_content(head)}")
    data = read_exactly(path, label, size)
    if is_zip:
        check_zip(data, label)
    state, step = unpickle(data, label), None
    if training and isinstance(state, dict) and "state_dict" in state:
        state, step = state["state_dict"], state.get("global_step")
    values = _checked(state, label)
    tensors = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in values.items()}
    return PickleFile(label, tensors, values, step if isinstance(step, int) else None)


def _other_content(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head[8:9] == b"{":
        return "it looks like safetensors; give it that suffix"
    return (foreign_format(head) or "unknown content").removesuffix(", not safetensors")


def check_zip(data: bytes, label: str) -> None:
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception as error:  # BadZipFile, struct.error, ValueError, ...: a damaged directory raises many kinds
        raise CheckpointError(f"{label}: damaged zip archive: {shown(str(error))}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise CheckpointError(f"{label}: holds compressed zip entries, which torch.save never writes; refused")
    # Entries that overlap in the file would each be read in full.
    if len(entries) > 2 * MAX_TENSORS or sum(entry.file_size for entry in entries) > len(data):
        raise CheckpointError(f"{label}: its zip entries hold more than the file's {len(data):,} bytes; refused")


def unpickle(data: bytes, label: str, classes: Classes = _LIGHTNING) -> Any:
    """What the pickle holds. classes: those of ours that stand for some in the file, which are not called."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(classes):
            warnings.simplefilter("ignore")  # torch's own deprecations inside its legacy reader
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes torch raise KeyError, EOFError, RuntimeError, UnpicklingError, ...
        asked = _GLOBAL.search(str(error))
        if asked:  # torch's own message goes on to advise weights_only=False
            reason = f"the pickle asks for {shown(asked[1])}, which is not a tensor; refused"
        else:
            reason = f"damaged or unsafe pickle ({type(error).__name__})"
        raise CheckpointError(f"{label}: {reason}") from error


def _checked(state: Any, label: str) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or len(state) > MAX_TENSORS:
        raise CheckpointError(f"{label}: the pickle holds no mapping of at most {MAX_TENSORS:,} tensors")
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{label}: the pickle has a key that is no string: {shown(repr(name))}")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{label}: {shown(name)} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}".replace("torch.", "")
            raise CheckpointError(f"{label}: tensor {shown(name)} is not a dense tensor ({kind}); refused")
    return {name: value.detach() for name, value in state.items()}
