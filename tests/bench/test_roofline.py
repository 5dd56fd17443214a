"""The counted work against PyTorch's own counter, run on diffusers' nets."""

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import GPUS, floor, operations, traffic
from bench.shapes import MODELS, Call, trace


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
