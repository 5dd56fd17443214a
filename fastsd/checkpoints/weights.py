"""Filling a module from checkpoint files: compare names and shapes first, read second, scan and cast third.

files ─headers─► names, dtypes, shapes ─compare with the module─► file bytes ─► finite? ─► cast, move ─► module
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fastsd.checkpoints.architecture import INPUT_CHANNELS, recognise
from fastsd.checkpoints.keys import module_name, module_shape
from fastsd.checkpoints.safetensors_file import MAX_TENSORS, TensorSpec
from fastsd.errors import CheckpointError
from fastsd.wording import listed, shown

Shape = tuple[int, ...]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightFile(Protocol):
    """Tensors that can be looked at before they are read."""

    @property
    def label(self) -> str: ...

    @property
    def tensors(self) -> dict[str, TensorSpec]: ...

    def read(self) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class _Found:
    """Where a module's tensor lies, and what its file says of it."""

    label: str
    name: str
    dtype: torch.dtype
    shape: Shape


def fill_module(
    component: str, files: Sequence[WeightFile], module: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    """Give every entry of `module.state_dict()` its tensor from `files`, as `dtype` on `device`, without gradients.

    4-D weights (convolutions, [O, I, H, W]) are laid out channels-last, as the activations are NHWC. The module is
    untouched unless everything loads. Peak memory: the weights as loaded, plus twice the largest file.

    Raises CheckpointError if names or shapes differ, a value is NaN or infinite, or too large for `dtype`.
    """
    state: dict[str, torch.Tensor] = {}
    for target, tensor, label in read_state(component, files, module):
        state[target] = _convert(tensor, dtype, device, label)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def read_state(
    component: str, files: Sequence[WeightFile], module: nn.Module
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(name in `module`, tensor as stored but in the module's shape, what messages call it), file by file.

    Raises CheckpointError, before the first is read, if names or shapes differ from the module's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _compare(component, files, wanted)
    for file in files:
        tensors = file.read()
        for name in list(tensors):
            tensor = tensors.pop(name)  # popped, so that each source is freed once it is converted
            target = module_name(component, name)
            if target is not None:
                yield target, tensor.reshape(wanted[target]), f"{file.label}: tensor {shown(name)}"


def _compare(component: str, files: Sequence[WeightFile], wanted: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless `files` hold exactly the tensors `wanted`, in floating point."""
    found = _collect(component, files)
    where = files[0].label if len(files) == 1 else f"{component}/ ({len(files)} shards)"
    problems = []
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing:
        problems.append(f"{len(missing)} missing ({listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({listed({found[name].name for name in unexpected})})")
    misshapen = {name: found[name].shape for name in wanted if name in found and found[name].shape != wanted[name]}
    if misshapen:
        lines = [f"{name} expected {list(wanted[name])}, found {list(shape)}" for name, shape in misshapen.items()]
        problems.append(f"{len(lines)} of another shape ({listed(lines)})")
    if problems:
        kind = recognise(component, [item.name for item in found.values()]) or _other_input(component, misshapen)
        identified = f"this is {kind}; " if kind else ""
        raise CheckpointError(f"{where}: {identified}tensors do not fit the model: {'; '.join(problems)}")
    for item in found.values():
        if item.dtype not in _FLOATS:
            kind = str(item.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{item.label}: tensor {shown(item.name)} is {kind}; only floating-point weights are read (a quantised "
                "checkpoint must be converted first)"
            )


def _collect(component: str, files: Sequence[WeightFile]) -> dict[str, _Found]:
    """Every tensor of the files by the module's name for it. Raises CheckpointError if two claim one name."""
    if sum(len(file.tensors) for file in files) > MAX_TENSORS:
        raise CheckpointError(f"{component}/: more than {MAX_TENSORS:,} tensors; refused")
    found: dict[str, _Found] = {}
    for file in files:
        for name, spec in file.tensors.items():
            target = module_name(component, name)
            if target is None:
                continue
            if target in found:
                raise CheckpointError(
                    f"{file.label}: tensor {shown(name)} is a duplicate of {shown(found[target].name)} in "
                    f"{found[target].label}"
                )
            found[target] = _Found(file.label, name, spec.dtype, module_shape(component, target, spec.shape))
    return found


def _other_input(component: str, misshapen: dict[str, Shape]) -> str | None:
    shape = misshapen.get("conv_in.weight", ())
    return INPUT_CHANNELS.get(shape[1]) if component == "unet" and len(shape) == 4 else None


def _convert(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, label: str) -> torch.Tensor:
    """A copy of `tensor` as `dtype` on `device` in memory of its own. Raises CheckpointError if a value is lost."""
    if tensor.numel():
        # One pass and no temporary, where isfinite takes three; a NaN anywhere becomes both the minimum and maximum.
        extremes = torch.stack(torch.aminmax(tensor))
        if not extremes.isfinite().all():
            raise CheckpointError(f"{label} holds NaN or infinite values; the file is damaged")
        if not extremes.to(dtype).isfinite().all():
            largest, name = extremes.abs().max().item(), str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{label} holds {largest:.6g}, beyond the range of {name}; use bfloat16 or float32")
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device=device, dtype=dtype, copy=True, memory_format=layout)
