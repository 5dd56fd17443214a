"""The counted work against PyTorch's own counter, run on diffusers' nets."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import GPUS, floor, operations, traffic
from bench.shapes import MODELS, Call, launches_of, trace
from fastsd import launches, tracing
from fastsd.config import SD15
from fastsd.denoise import advance
from fastsd.launches import Launch
from fastsd.tracing import around


def work(calls: dict[Call, int]) -> int:
    return sum(operations(call) * count for call, count in calls.items())


@pytest.mark.parametrize("model", MODELS)
def test_the_unets_work_is_what_pytorch_counts_for_diffusers(model: str) -> None:
    config = MODELS[model].unet
    blocks = {True: "CrossAttn{}Block2D", False: "{}Block2D"}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            block_out_channels=config.block_out_channels,
            down_block_types=tuple(blocks[attention].format("Down") for attention in config.down_attention),
            up_block_types=tuple(blocks[attention].format("Up") for attention in config.up_attention),
            transformer_layers_per_block=config.transformer_layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=config.num_attention_heads,
            use_linear_projection=config.use_linear_projection,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            theirs(torch.empty(2, 4, 64, 64), torch.zeros(2), torch.empty(2, 77, config.cross_attention_dim))
    traced = trace(MODELS[model], 512)
    ours = work(traced["step"]) + work(traced["prompt"]) + 2 * work(traced["schedule"])
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_the_decoders_work_is_what_pytorch_counts_for_diffusers() -> None:
    config = MODELS["sd15"].vae
    levels = len(config.block_out_channels)
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            theirs.decode(torch.empty(1, 4, 64, 64))
    assert work(trace(MODELS["sd15"], 512)["decode"]) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_call_is_bound_by_what_takes_longer() -> None:
    gpu, size = GPUS["h200"], torch.Size
    norm = Call("layer_norm", (size((2, 4096, 320)), size((320,)), size((320,))), (), size((2, 4096, 320)))
    assert operations(norm) == 0
    assert traffic(norm) == 2 * (2 * 2 * 4096 * 320 + 2 * 320), "fp16: x read, y written, weight and bias read"
    assert floor(norm, gpu) == traffic(norm) / gpu.bandwidth
    square = size((4096, 4096))
    product = Call("linear", (square, square), (), square)
    assert floor(product, gpu) == operations(product) / gpu.flops == 2 * 4096**3 / gpu.flops


def test_a_step_of_sd15_is_350_launches_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that PyTorch itself is asked for are views, which launch nothing. Eager diffusers makes 760 launches."""
    launched: list[Launch] = []
    asked: list[str] = []
    within: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not within:
                asked.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    def noted(name: str, op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        within.append(name)
        result = op(*arguments, **options)
        within.pop()
        return result

    def watched(*arguments: Any) -> None:
        launched.clear()
        with Watch():
            advance(*arguments)

    ops = around(launches.planning(90, launched.append), "noted", noted)
    monkeypatch.setattr(tracing, "advance", watched)
    sizes = {"height": 512, "width": 512, "images": 1, "guided": True, "prompts": 2, "steps": [20]}
    tracing.run_stages(SD15, lambda _: ops, torch.float16, **sizes, stages=["step"])
    assert set(asked) <= {"view", "expand", "unsqueeze", "split_with_sizes", "select", "slice", "permute"}, set(asked)
    assert len(launched) <= 350, Counter(launch.kernel.__name__ for launch in launched)
    assert len(launched) == launches_of(SD15, 512)["step"].total()
