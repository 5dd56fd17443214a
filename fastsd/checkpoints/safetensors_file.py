"""One safetensors file, in two steps: its header (names, dtypes, shapes; a few kB), then its tensors.

Between the steps the caller compares the header with the module to fill, so a wrong file is refused before anything
large is read. The tensors are parsed by the `safetensors` package, which checks every offset; the header is parsed
here too because that package accepts headers of any size (60 MB cost 1.2 GB) and duplicate names.
Format: the README of the safetensors project.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError

from fastsd.checkpoints.file_bytes import changed, foreign_format, opened, read_exactly
from fastsd.checkpoints.strict_json import parse_object
from fastsd.errors import CheckpointError
from fastsd.wording import shown

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was checked."""

    path: Path
    label: str
    tensors: dict[str, TensorSpec]
    offsets: dict[str, tuple[int, int]]  # [begin, end) behind the header; checked when the tensors are read
    metadata: dict[str, Any]
    size: int
    header_bytes: int
    header_sha256: bytes

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, on the CPU, in memory of their own. Peak: twice the file.

        Raises CheckpointError if the header is no longer the one that was checked, or the offsets do not fit.
        """
        return self._parsed(self._bytes())

    def read_hashed(self) -> tuple[dict[str, torch.Tensor], str]:
        """What `read` gives, and the SHA-256 of all that it read behind the header, in hex."""
        data = self._bytes()
        return self._parsed(data), hashlib.sha256(memoryview(data)[self.header_bytes :]).hexdigest()

    def _bytes(self) -> bytes:
        data = read_exactly(self.path, self.label, self.size)
        if hashlib.sha256(data[: self.header_bytes]).digest() != self.header_sha256:
            raise changed(self.label)
        return data

    def _parsed(self, data: bytes) -> dict[str, torch.Tensor]:
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing: ")
            raise CheckpointError(f"{self.label}: damaged safetensors file: {shown(reason, 200)}") from error

    def read_tensors(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """These tensors alone, on the CPU, in memory of their own. Peak: their bytes.

        Raises CheckpointError if the header is no longer the one that was checked, or the offsets do not fit.
        """
        self._check_offsets()
        tensors = {}
        with opened(self.path, self.label) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size != self.size or hashlib.sha256(file.read(self.header_bytes)).digest() != self.header_sha256:
                raise changed(self.label)
            for name in sorted(names, key=self.offsets.__getitem__):  # forwards through the file
                spec = self.tensors[name]
                tensors[name] = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
                memory = tensors[name].view(-1).view(torch.uint8).numpy().data
                file.seek(self.header_bytes + self.offsets[name][0])
                if memory.nbytes and file.readinto(memory) != memory.nbytes:
                    raise changed(self.label)
        return tensors

    def _check_offsets(self) -> None:
        """Each tensor's bytes are as many as its shape says, and they lie one behind the other."""
        end = 0
        for name, (begin, after) in sorted(self.offsets.items(), key=lambda item: item[1]):
            spec = self.tensors[name]
            if begin != end or after - begin != math.prod(spec.shape) * spec.dtype.itemsize:
                where = f"tensor {shown(name)}, {list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
                raise CheckpointError(f"{self.label}: damaged safetensors file: offsets [{begin}, {after}] of {where}")
            end = after


def open_safetensors(path: Path, label: str) -> SafetensorsFile:
    """Read and check the header of `path`; `label` is its name in messages.

    Raises CheckpointError for a file that is no safetensors, a header over 16 MB or 20,000 tensors, entries that are
    not tensors, and a file shorter or longer than its header says.
    """
    with opened(path, label) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        header_size = _header_size(start + file.read(32), size, label)
        file.seek(8)
        header = file.read(header_size)
    if len(header) != header_size:
        raise changed(label)
    tensors, offsets, metadata = _parse_header(header, label)
    expected = 8 + header_size + max((end for _, end in offsets.values()), default=0)
    if size != expected:
        state = "truncated" if size < expected else "followed by bytes that belong to no tensor"
        raise CheckpointError(f"{label}: {state}: {size:,} bytes, its header speaks of {expected:,}")
    digest = hashlib.sha256(start + header).digest()
    return SafetensorsFile(path, label, tensors, offsets, metadata, size, 8 + header_size, digest)


def _header_size(head: bytes, file_size: int, label: str) -> int:
    """Length of the header in bytes, from the file's first 40 bytes."""
    length = int.from_bytes(head[:8], "little")
    fits = len(head) > 8 and 0 < length <= file_size - 8
    if fits and head[8:9] == b"{":
        if length > MAX_HEADER_BYTES:
            limit = MAX_HEADER_BYTES // 2**20
            raise CheckpointError(f"{label}: header of {length:,} bytes; more than {limit} MB is refused")
        return length
    foreign = foreign_format(head)
    if foreign:
        raise CheckpointError(f"{label}: {foreign}")
    if file_size == 0:
        raise CheckpointError(f"{label}: the file is empty")
    if not fits:
        raise CheckpointError(
            f"{label}: not a safetensors file, or truncated: a header of {length:,} bytes in a file of {file_size:,}"
        )
    raise CheckpointError(f"{label}: not a safetensors file: the header is no JSON object")


def _parse_header(
    header: bytes, label: str
) -> tuple[dict[str, TensorSpec], dict[str, tuple[int, int]], dict[str, Any]]:
    """Specs and offsets by tensor name, and the metadata."""
    entries = parse_object(header, f"{label}: header")
    metadata = entries.pop("__metadata__", None)  # its type is checked by the safetensors package, if that reads it
    metadata = metadata if isinstance(metadata, dict) else {}
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{label}: header of {len(entries):,} tensors; more than {MAX_TENSORS:,} are refused")
    parsed = {name: _parse_entry(entry, f"{label}: tensor {shown(name)}") for name, entry in entries.items()}
    specs = {name: spec for name, (spec, _) in parsed.items()}
    return specs, {name: offsets for name, (_, offsets) in parsed.items()}, metadata


def _parse_entry(entry: Any, label: str) -> tuple[TensorSpec, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{label}: its header entry is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{label}: dtype {shown(repr(dtype))} is not supported; known: {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{label}: shape {shown(repr(shape))} is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{label}: data_offsets {shown(repr(offsets))} are no [begin, end]")
    return TensorSpec(DTYPES[dtype], tuple(shape)), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
