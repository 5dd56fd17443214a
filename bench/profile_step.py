"""`python -m bench.profile_step --model sd15 --size 512`: what one UNet step launches, kernel by kernel, and how long each takes.

Random weights, eager, by PyTorch's profiler. A launch's time is the GPU's; the gaps between launches are the difference of the
span and the busy time, which a CUDA graph closes. On the CPU, where there are no launches, PyTorch's outermost ops stand in.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from torch.profiler import ProfilerActivity, profile

from bench import record
from bench.shapes import MODELS
from fastsd.backends import BACKENDS, select_ops
from fastsd.config import TINY
from fastsd.models.unet import UNet
from fastsd.ops import Ops

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NETS = {**MODELS, "tiny": TINY}
LAUNCHES = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""The categories of a trace that are counted."""
WARM_UP = 3  # compiles, packs weights, lets cuDNN choose


@torch.no_grad()
def unet_step(
    config: Any, pixels: int, batch: int, dtype: torch.dtype, device: torch.device, ops: Ops
) -> Callable[[], torch.Tensor]:
    """One UNet step of a batch, all that is computed once a prompt or a schedule done before."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        unet = UNet(config.unet, ops).to(dtype)
    unet.to_empty(device=device).requires_grad_(False)
    for name, weight in unet.named_parameters():
        # Of a variance that keeps activations near unit size; norms scale by about 1.
        bound = 0.1 if weight.ndim == 1 else (3.0 / weight[0].numel()) ** 0.5
        weight.uniform_(-bound, bound, generator=generator).add_(float("norm" in name and name.endswith("weight")))
    side = pixels // config.vae.downscale
    x = torch.randn(batch, side, side, config.unet.in_channels, generator=generator, device=device, dtype=dtype)
    width = config.unet.cross_attention_dim
    context = unet.project_context(torch.randn(batch, 77, width, generator=generator, device=device, dtype=dtype))
    time = unet.project_time(torch.tensor([500.0], device=device)).expand(batch, -1)
    return lambda: unet(x, time, context)


@torch.no_grad()
def trace(step: Callable[[], Any], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """The profiler's events of so many steps, as in a Chrome trace."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(WARM_UP):
        step()
    wait()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        wait()
    # The exported trace, since the profiler's own classes name their fields anew from version to version.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def summary(events: Iterable[dict[str, Any]], steps: int, categories: tuple[str, ...]) -> dict[str, Any]:
    """Per step: launches, milliseconds the device was busy, milliseconds from the first launch to the end of the last; and a
    row for each name, the costliest first. ValueError where nothing was launched.
    """
    found = [
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    found.sort(key=lambda launch: (launch[0], -launch[1]))  # an op before those inside it
    times: dict[str, list[float]] = {}
    end = start = found[0][0] if found else 0.0
    for begin, microseconds, name in found:
        if categories == LAUNCHES["cpu"] and begin + microseconds <= end:
            continue  # inside an op that is counted
        times.setdefault(name, []).append(microseconds)
        end = max(end, begin + microseconds)
    busy = sum(map(sum, times.values()))
    if not busy:
        raise ValueError(f"the trace has no {', '.join(categories)}: the profiler saw no launch")
    rows = [
        {
            "name": name,
            "count": round(len(us) / steps, 2),
            "us": round(sum(us) / steps, 2),
            "us_each": round(sum(us) / len(us), 2),
            "share": round(sum(us) / busy, 4),
        }
        for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "launches": round(sum(map(len, times.values())) / steps, 2),
        "busy_ms": round(busy / steps / 1e3, 4),
        "span_ms": round((end - start) / steps / 1e3, 4),
        "rows": rows,
    }


def report(result: dict[str, Any]) -> str:
    """The table, and above it the sums."""
    lines = [["kernel", "a step", "us each", "us a step", "share"]]
    for row in result["rows"]:
        name = row["name"] if len(row["name"]) <= 80 else row["name"][:77] + "..."
        lines.append([name, f"{row['count']:g}", f"{row['us_each']:.1f}", f"{row['us']:.1f}", f"{row['share']:.1%}"])
    device = ", ".join(result["gpus"]) or result["cpu"]
    return (
        f"{result['model']}, {result['size']} pixels, batch {result['batch']}, {result['dtype']}, {result['backend']}\n"
        f"{device}\n"
        f"a step: {result['launches']:g} launches, {result['busy_ms']:.3f} ms busy of {result['span_ms']:.3f} ms\n"
        f"\n{record.table(lines)}\n"
    )


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NETS, default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--batch", type=int, default=2, help="the UNet's rows, two for each guided image (default 2)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--steps", type=int, default=10, help="steps profiled (default 10)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes beside it, as .txt")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments_of(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.profile_step: no CUDA device; --device cpu --model tiny --backend reference shows what it writes")
        return 2
    device, config = torch.device(args.device), NETS[args.model]
    torch.backends.cudnn.benchmark = True  # PyTorch at its best, where an op is left to it
    ops = select_ops(args.backend, device)
    step = unet_step(config, args.size, args.batch, DTYPES[args.dtype], device, ops)
    about = {name: getattr(args, name) for name in ("model", "size", "batch", "dtype", "steps")} | {"backend": ops.name}
    result = record.header() | about | summary(trace(step, args.steps, device), args.steps, LAUNCHES[args.device])
    record.save(args.out, result)
    args.out.with_suffix(".txt").write_text(report(result), encoding="utf-8")
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
