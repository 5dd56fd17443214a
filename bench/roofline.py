"""`python -m bench.roofline --model sd15 --size 512`: what each call must cost, and the sum: the plan a measured time is read by.

A call's floor is the larger of its operations at the GPU's measured matrix rate and its bytes at its copy bandwidth, each tensor
read or written once. Calls are those of the nets' ops; a call may take two launches (split K, two-pass norms): those of each
kernel are counted below.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass

import torch

from bench import record
from bench.shapes import MODELS, STAGES, Call, launches_of, sizes, trace


@dataclass(frozen=True)
class GPU:
    """What a GPU reached in large matrix products and copies."""

    flops: float  # a second, fp16
    bandwidth: float  # bytes a second
    arch: int  # compute capability


GPUS = {"h200": GPU(790e12, 4.3e12, 90)}
HALF = torch.float16  # what the nets run in
EXTRAS = ("residual", "activation", "causal", "mask", "silu", "skip", "channel_bias", "shortcut")


def operations(call: Call) -> int:
    """Multiplications and additions of the matrix products; norms and epilogues are bound by memory.

    As PyTorch does them: an upsampling's convolution in four phases, as ours, does with 2.25 times fewer.
    """
    named = call.named()
    if call.op in ("linear", "geglu", "project_heads"):
        x = named["x"]
        weights = sizes(named["weights"] if call.op == "project_heads" else named["w"])
        return 2 * x.numel() // x[-1] * sum(weight.numel() for weight in weights)
    if call.op == "attention":
        batch, length, heads, width = named["q"]
        return 4 * batch * heads * length * named["k"][1] * named.get("head_dim", width)
    if call.op in ("conv2d", "conv2d_norm", "upsample_conv2d"):
        batch, height, width, _ = call.result
        shortcut = named["shortcut"].w.numel() if "shortcut" in named else 0
        return 2 * batch * height * width * (named["w"].numel() + shortcut)
    return 0


def traffic(call: Call) -> int:
    """Bytes, each tensor once."""
    tensors = call.named() | {"result": call.result}
    return sum(
        size.numel() * call.dtype_of(name, HALF).itemsize for name, value in tensors.items() for size in sizes(value)
    )


def floor(call: Call, gpu: GPU) -> float:
    """Seconds."""
    return max(operations(call) / gpu.flops, traffic(call) / gpu.bandwidth)


def shape_of(call: Call) -> str:
    """The first two tensors, and what else is there that does not follow from them."""
    named = call.named()
    first, second, *_ = sizes((*named.values(),))
    extras = [name for name, value in named.items() if name in EXTRAS and value not in (None, False)]
    extras += [f"{len(named['weights'])} weights"] if call.op == "project_heads" else []
    return " ".join(["x".join(map(str, shape)) for shape in (first, second)] + extras)


def report(calls: Counter[Call], launched: Counter[str], gpu: GPU, stage: str) -> list[str]:
    """The calls of a stage by their share of its floor, their sum, and the kernels that they launch."""
    rows = [["op", "shapes", "calls", "GFLOP", "MB", "floor us", "bound by"]]
    total = sum(count * floor(call, gpu) for call, count in calls.items())
    for call, count in sorted(calls.items(), key=lambda item: -item[1] * floor(item[0], gpu)):
        compute = operations(call) / gpu.flops >= traffic(call) / gpu.bandwidth
        numbers = (operations(call) * count / 1e9, traffic(call) * count / 1e6, count * floor(call, gpu) * 1e6)
        rows.append(
            [call.op, shape_of(call), str(count), *(f"{n:,.1f}" for n in numbers), "compute" if compute else "memory"]
        )
    teraflop = sum(operations(call) * count for call, count in calls.items()) / 1e12
    kernels = ", ".join(f"{count} {name.removesuffix('_kernel')}" for name, count in launched.most_common())
    return [
        record.table(rows),
        f"{stage}: {sum(calls.values())} calls, {teraflop:.3f} TFLOP, floor {total * 1e3:.2f} ms",
        f"{launched.total()} launches: {kernels}",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--batch", type=int, default=2, help="rows of the UNet: 2 for one guided image (default)")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    args = parser.parse_args()
    model, gpu = MODELS[args.model], GPUS[args.gpu]
    calls = trace(model, args.size, args.batch)
    launched = launches_of(model, args.size, args.batch, gpu.arch, HALF)
    for stage in args.stage or STAGES:
        print("\n".join(report(calls[stage], launched[stage], gpu, stage)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
