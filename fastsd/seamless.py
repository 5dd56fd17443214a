"""Pictures whose edges meet, the web UI's "Tiling": what lies beyond an edge is what lies inside the opposite one.

Only convolutions know of edges. So a net is made once more, on the same parameters, and holds ops whose convolutions wrap:
weights that are merged, packed or moved are seen by both, and the models know nothing of it.
"""

import copy
import threading
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from fastsd.errors import ParameterError
from fastsd.ops import Ops, Wrap
from fastsd.wording import quoted

WRAPS: dict[bool | str, Wrap] = {False: (False, False), True: (True, True), "x": (True, False), "y": (False, True)}
"""What `generate` takes as tiling."""

Net = TypeVar("Net", bound=nn.Module)


def check_tiling(value: Any) -> bool | str:
    """value if it is one of WRAPS; ParameterError for any other."""
    if not isinstance(value, bool | str) or value not in WRAPS:
        raise ParameterError(f"tiling: must be True, False, 'x' or 'y', not {quoted(value)}")
    return value


def wrapped(ops: Ops, wrap: Wrap) -> Ops:
    """The ops, with convolutions that wrap."""
    return replace(
        ops,
        conv2d=partial(ops.conv2d, wrap=wrap),
        conv2d_norm=partial(ops.conv2d_norm, wrap=wrap),
        upsample_conv2d=partial(ops.upsample_conv2d, wrap=wrap),
    )


def seamless(net: Net, wrap: Wrap) -> Net:
    """The net with convolutions that wrap, on the very parameters of this one; itself where nothing wraps.

    Made when it is first asked for, and again where a parameter has been replaced by another; it goes with the net.
    """
    if not any(wrap):
        return net
    with _lock:
        twins = _twins.setdefault(net, {})
        if wrap not in twins or not _same_parameters(net, twins[wrap]):
            by: dict[int, Any] = {id(shared): shared for shared in (*net.parameters(), *net.buffers())}
            held = (getattr(part, "ops", None) for part in net.modules())
            by |= {id(ops): wrapped(ops, wrap) for ops in held if ops is not None}
            twins[wrap] = copy.deepcopy(net, by)
        return twins[wrap]


def _same_parameters(net: nn.Module, twin: nn.Module) -> bool:
    return [*map(id, net.parameters())] == [*map(id, twin.parameters())]


_twins: "WeakKeyDictionary[nn.Module, dict[Wrap, Any]]" = WeakKeyDictionary()
_lock = threading.Lock()
