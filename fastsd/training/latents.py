"""The latents of a data set, encoded once for all stages that need them, and kept in a file."""

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsd.errors import CheckpointError
from fastsd.training import parallel
from fastsd.training.autoencoder import as_tensor
from fastsd.training.data import Dataset, fingerprint
from fastsd.training.model import Model

ENCODED_AT_ONCE = 16


def cached_latents(model: Model, dataset: Dataset, data: Mapping[str, Any], folder: Path) -> np.ndarray:
    """[N, h, w, C] float16, mapped from folder/latents-….npy, which each process fills a share of if it is not there yet.

    data: what the data set is; the file is of this data, these pictures' number and this autoencoder.
    """
    path = folder / f"latents-{_digest(model, dataset, data)}.npy"
    temporary = path.with_suffix(".tmp.npy")
    ranks, rank = parallel.processes(), parallel.rank()
    if not path.exists():
        shape = (len(dataset), *encode(model, dataset, range(1)).shape[1:])
        if rank == 0:
            _allocate(temporary, shape)
        parallel.wait()
        latents = np.lib.format.open_memmap(temporary, "r+")
        mine = range(rank * len(dataset) // ranks, (rank + 1) * len(dataset) // ranks)
        for part in _parts(mine):
            latents[part.start : part.stop] = encode(model, dataset, part)
        latents.flush()
        parallel.wait()
        if rank == 0:
            temporary.replace(path)
    parallel.wait()
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """An array of zeros, all of it on the disk: one that is too small would end the process when a mapped page is written."""
    try:
        with path.open("wb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            row = bytes(2 * prod(shape[1:]))
            for _ in range(shape[0]):
                file.write(row)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path.name}: cannot be written: {error.strerror}") from error


@torch.inference_mode()
def encode(model: Model, dataset: Dataset, indices: range) -> np.ndarray:
    """The means of the pictures' latents, scaled as the UNet sees them. [n, h, w, C] float16."""
    device = next(model.vae.parameters()).device
    pictures = torch.stack([as_tensor(dataset.image(index)) for index in indices])
    return model.vae.encode(pictures.to(device)).cpu().numpy().astype(np.float16)


def measured_scale(model: Model, dataset: Dataset, count: int = 512) -> float:
    """The scaling factor with which `count` pictures' latents have unit variance."""
    parts = _parts(range(min(count, len(dataset))))
    latents = np.concatenate([encode(model, dataset, part) for part in parts]).astype(np.float64)
    return round(float(model.vae.config.scaling_factor / latents.std()), 5)


def _parts(indices: range) -> list[range]:
    return [indices[begin : begin + ENCODED_AT_ONCE] for begin in range(0, len(indices), ENCODED_AT_ONCE)]


def _digest(model: Model, dataset: Dataset, data: Mapping[str, Any]) -> str:
    parts = [data, len(dataset), fingerprint(dataset), model.vae.config.scaling_factor]
    hashed = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in model.vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            hashed.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
