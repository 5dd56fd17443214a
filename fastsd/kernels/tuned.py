"""Which config to launch, or whether the library is faster: measured once a GPU by `bench.kernels --tune`, read here.

`configs/sm_90.json` and its like hold one entry a problem; `lookup` finds the nearest. Nothing is measured at run time, and
nothing here touches a GPU. The format is described in `configs/README.md`.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd.kernels.launch import TYPE_NAMES

CONFIGS = Path(__file__).parent / "configs"

FARTHEST = 4.0
"""How many times larger or smaller a problem an entry may serve."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"x": ..., "w": ..., "b": None, "residual": None, "activation": None},
    "geglu": {"x": ..., "w": ..., "b": ...},
    "project_heads": {"x": ..., "weights": ..., "biases": None, "heads": ...},
    "attention": {"q": ..., "k": ..., "v": ..., "mask": None, "causal": False, "head_dim": None},
    "layer_norm": {"x": ..., "w": ..., "b": ..., "eps": 1e-5},
    "group_norm": {"x": ..., "w": ..., "b": ..., "groups": ..., "eps": ..., "silu": False, "skip": None},
    "conv2d": {
        **{"x": ..., "w": ..., "b": None, "stride": 1, "pad": (0, 0, 0, 0)},
        **{"channel_bias": None, "residual": None, "shortcut": None, "wrap": (False, False)},
    },
    "conv2d_norm": {
        **{"x": ..., "w": ..., "b": ..., "channel_bias": None, "norm_w": ..., "norm_b": ..., "groups": ..., "eps": ...},
        **{"wrap": (False, False)},
    },
    "upsample_conv2d": {"x": ..., "w": ..., "b": ..., "size": None, "wrap": (False, False)},
    "step_input": {
        **{"state": ..., "weights": ..., "time_bias": ..., "time_rows": ..., "counter": ..., "copies": 1},
    },
    "sampler_step": {"state": ..., "out": ..., "noise": None, "row": ..., "new": None},
}
"""The ops' parameters and defaults, in their order, so that a call by position and one by name are one problem."""

_BESIDE_X = ("residual", "skip", "channel_bias", "shortcut.x", "shortcut.skip")  # sized as x is, but for their channels


class Problem(NamedTuple):
    """What a config is tuned for."""

    op: str
    dtype: str
    size: int  # rows of x: what follows the picture's size and the batch
    fixed: str  # all else, readable: the weights' shapes, strides, what is in the epilogue


class Entry(NamedTuple):
    """One measured problem, and what was fastest on it."""

    op: str
    dtype: str
    size: int
    fixed: str
    use: str  # "kernel" or "library"
    config: (
        tuple[int, ...] | None
    )  # the fields of the kernel module's Config; None where no config of the kernel served
    us: float | None  # microseconds of the kernel with that config
    library_us: float

    @property
    def problem(self) -> Problem:
        return Problem(*self[:4])


def problem(op: str, *arguments: Any, **options: Any) -> Problem:
    """The problem that a call of an op poses. Tensors may be on meta. TypeError for arguments that the op does not have."""
    defaults = PARAMETERS[op]
    if len(arguments) > len(defaults) or not options.keys() <= defaults.keys():
        raise TypeError(f"{op} takes {', '.join(defaults)}; given {len(arguments)} and {', '.join(options) or 'none'}")
    given = dict(zip(defaults, arguments, strict=False)) | options
    first, *others = defaults
    x, given = given[first], {name: given[name] for name in others if given.get(name) is not None}
    given.pop("wrap", None)  # other pixels at the edges, the same tiles
    if op == "attention":
        parts = _attention(x, **given)
    elif op == "step_input":
        time = given["time_bias"]
        parts = [f"slots {x.shape[0]}", f"time {TYPE_NAMES.get(time.dtype, time.dtype)} {time.shape[1]}"]
        parts += [f"copies {given['copies']}"] if given.get("copies", 1) > 1 else []
    elif op == "sampler_step":
        guided = given["out"].shape[0] == 2 * x.shape[1]
        parts = [f"slots {x.shape[0]}"] + (["guided"] if guided else []) + (["noise"] if "noise" in given else [])
    else:
        if op == "upsample_conv2d" and tuple(given.pop("size", ())) not in ((), (2 * x.shape[1], 2 * x.shape[2])):
            given["odd"] = True  # the size itself would name the picture's
        parts = [part for name, value in given.items() for part in _described(name, value, defaults.get(name))]
    return Problem(op, TYPE_NAMES.get(x.dtype, str(x.dtype)), x.numel() // x.shape[-1], ", ".join(parts))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, head_dim: int | None = None
) -> list[str]:
    """Heads are named by what they hold, not by how wide they are stored: both are served by the same tiles."""
    keys = "self" if k.shape[1] == q.shape[1] else k.shape[1]
    parts = [f"heads {q.shape[2]}", f"D {head_dim or q.shape[3]}", f"keys {keys}"]
    kind = None if mask is None else "boolean" if mask.dtype == torch.bool else "additive"
    return parts + ([f"mask {kind}"] if kind else []) + (["causal"] if causal else [])


def _described(name: str, value: Any, default: Any) -> list[str]:
    """What one argument adds to `Problem.fixed`."""
    if isinstance(value, Tensor):
        return [f"{name} {_shape(value, name)}"]
    if value is None or value is False or value == default:
        return []
    if value is True:
        return [name]
    if hasattr(value, "_fields"):
        return [part for key, item in value._asdict().items() for part in _described(f"{name}.{key}", item, None)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_shape(item, name) if isinstance(item, Tensor) else str(item) for item in value]
        return [f"{name} {'+'.join(items)}"]
    return [f"{name} {value}"]


def _shape(tensor: Tensor, name: str) -> str:
    return "x".join(map(str, tensor.shape[-1:] if name in _BESIDE_X else tensor.shape))


def lookup(problem: Problem, arch: int, folder: Path = CONFIGS) -> Entry | None:
    """The entry of the nearest size, at most FARTHEST times off; None where none is known for this compute capability.

    ValueError naming the file that is malformed.
    """
    entries = _entries(folder / f"sm_{arch}.json").get((problem.op, problem.dtype, problem.fixed), ())
    nearest = min(entries, key=lambda entry: abs(log(entry.size / problem.size)), default=None)
    near = nearest is not None and max(nearest.size, problem.size) <= FARTHEST * min(nearest.size, problem.size)
    return nearest if near else None


LIBRARY = "library"


def choose(arch: int, op: str, *arguments: Any, **options: Any) -> tuple[int, ...] | str | None:
    """What a call of an op shall run: the kernel with the fields of this config, with the chooser's (None), or LIBRARY."""
    entry = lookup(problem(op, *arguments, **options), arch)
    if entry is None:
        return None
    return LIBRARY if entry.use == LIBRARY else entry.config


def has(arch: int, folder: Path = CONFIGS) -> bool:
    """Whether anything was measured on GPUs of this compute capability."""
    return bool(_entries(folder / f"sm_{arch}.json"))


@cache
def _entries(path: Path) -> Mapping[tuple[str, str, str], Sequence[Entry]]:
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in read(path)[1] if path.exists() else ():
        found.setdefault((entry.op, entry.dtype, entry.fixed), []).append(entry)
    return found


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """What a file says of itself (device, versions, commit), and its entries. ValueError naming it if it is malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [_entry(raw) for raw in content.pop("entries")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} is no file of kernel configs: {error or type(error).__name__}") from error
    return content, entries


def write(path: Path, about: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """The file, whole or not at all: one line an entry, so that a change can be read."""
    lines = ",\n  ".join(json.dumps(entry._asdict()) for entry in entries)
    text = json.dumps(dict(about), indent=1)[:-2] + f',\n "entries": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def _entry(raw: Any) -> Entry:
    if not isinstance(raw, dict) or raw.keys() != set(Entry._fields):
        raise ValueError(f"an entry has the fields {', '.join(Entry._fields)}, not {raw!r:.200}")
    config = raw["config"]
    numbers = (int, float)
    sound = (
        all(isinstance(raw[name], str) for name in ("op", "dtype", "fixed"))
        and type(raw["size"]) is int
        and raw["size"] > 0
        and raw["use"] in ("kernel", "library")
        and (config is None or (isinstance(config, list) and all(isinstance(field, int) for field in config)))
        and (config is not None or raw["use"] == "library")
        and isinstance(raw["library_us"], numbers)
        and (isinstance(raw["us"], numbers) if config is not None else raw["us"] is None)
    )
    if not sound:
        raise ValueError(f"not a possible entry: {raw!r:.300}")
    return Entry(**raw | {"config": None if config is None else tuple(config)})
