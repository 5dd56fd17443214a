"""Every call of SD 1.5 and 2.1 at 512x512, on the GPU: against fp64, against plain PyTorch, and 50 times to the same bits.

The check itself runs here too, on calls of a tiny model in the interpreter.
"""

import inspect
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernel_calls import KERNELS, Kernel, draw, fault, gate_of, library, truth_of
from bench.roofline import shape_of
from bench.shapes import MODELS, Call, Nets, trace
from fastsd.config import TINY, ModelConfig
from tests.kernels.case import DEVICE, Output


def cases(models: Mapping[str, ModelConfig | Nets], pixels: int) -> dict[str, Call]:
    """Every different call that has a kernel, by a readable name."""
    names: dict[Call, str] = {}
    for model, config in models.items():
        for call in sum(trace(config, pixels).values(), Counter()):
            if call.op in KERNELS:
                names.setdefault(call, f"{model} {call.op} {shape_of(call)}")
    return {f"{name} #{number}": call for number, (call, name) in enumerate(names.items())}


@torch.no_grad()
def check(call: Call, dtype: torch.dtype, repeats: int) -> None:
    """Within the op's gate of the fp64 truth, at most twice plain PyTorch's error, all written and no more, always the same."""
    arguments = draw(call, dtype, torch.device(DEVICE))
    run = partial(KERNELS[call.op].run, **arguments)
    truth, plain = truth_of(call.op, arguments), library(call.op, arguments)()
    first = run()
    why = fault(call.op, lambda: first, truth, plain)
    assert why is None, f"{call.op} {shape_of(call)}: {why}"
    if "out" in inspect.signature(KERNELS[call.op].run).parameters and "out" not in arguments:
        out = Output(*call.result, dtype=dtype)
        run(out=out.tensor)
        out.check(gate_of(call.op), truth, plain)
        assert torch.equal(out.tensor, first), "another result into an output that was given"
    for repeat in range(repeats):
        assert same(run(), first), f"{call.op} {shape_of(call)}: other bits in run {repeat + 2}"


def same(result: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(result, expected)
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


CASES = cases({name: MODELS[name] for name in ("sd15", "sd21")}, 512) if DEVICE == "cuda" else {}
by_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_a_real_call(call: Call, dtype: torch.dtype) -> None:
    check(call, dtype, repeats=50)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Call]:
    return cases({"tiny": TINY}, 16)


@pytest.mark.parametrize("op", KERNELS)
def test_the_check_passes_a_tiny_call(tiny: dict[str, Call], op: str) -> None:
    check(next(call for call in tiny.values() if call.op == op), torch.float16, repeats=2)


def test_no_call_with_a_kernel_is_left_out(tiny: dict[str, Call]) -> None:
    traced = {call for calls in trace(TINY, 16).values() for call in calls if call.op in KERNELS}
    assert set(tiny.values()) == traced
    assert any(name.startswith("tiny group_norm 2x4x4x64 128 silu skip") for name in tiny), list(tiny)


@pytest.mark.parametrize("defect", ["wrong", "unsteady", "not finite"])
def test_the_check_fails_a_bad_kernel(tiny: dict[str, Call], monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    call = next(call for call in tiny.values() if call.op == "layer_norm")
    good, runs = KERNELS["layer_norm"], Counter[str]()

    def bad(**arguments: Any) -> Tensor:
        runs["all"] += 1
        y = good.run(**arguments)
        if defect == "wrong":
            return y * 1.01
        if defect == "not finite":
            y.view(-1)[7] = float("nan")
        elif runs["all"] > 2:
            y.view(torch.int16).view(-1)[3] += 1  # the last bit
        return y

    monkeypatch.setitem(KERNELS, "layer_norm", Kernel(bad, good.config, good.candidates))
    says = {"wrong": "relative L2 error", "unsteady": "other bits in run 3", "not finite": "error inf"}[defect]
    with pytest.raises(AssertionError, match=says):
        check(call, torch.float16, repeats=3)
