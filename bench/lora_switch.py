"""`python -m bench.lora_switch --preset sd15`: what it takes to put LoRAs on, change and take them off, beside a UNet step.

Random weights and two LoRAs of rank 16 for every attention and feed-forward layer of the UNet and the text encoder. Nothing is
reported unless off gives back the first bits. Packed copies (oneDNN's, the kernels') are brought up to date after a switch, when
they are next used; that is the difference between the two steps.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastsd
from bench import record
from bench.random_model import PRESETS, draw_weight
from fastsd.adapters import LoraAdapters, SwapLock
from fastsd.adapters.lora_keys import layer_shapes
from fastsd.backends import refresh_weights, select_ops
from fastsd.config import ModelConfig
from fastsd.device import DTYPES, select_device, select_dtype
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet

RANK = 16
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
LAYERS += ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

Nets = dict[str, nn.Module]


def make_nets(preset: str, device: torch.device, dtype: torch.dtype) -> Nets:
    if preset == "bundled":
        pipe = fastsd.Pipeline(device=device, dtype=dtype)
        return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    config, ops = PRESETS[preset], select_ops("auto", device)
    with torch.device("meta"):
        nets: Nets = {"unet": UNet(config.unet, ops), "text_encoder": CLIPText(config.text_encoder, ops)}
    generator = torch.Generator().manual_seed(0)
    for net in nets.values():
        layouts = {2: torch.contiguous_format, 4: torch.channels_last}
        state = {
            name: draw_weight(name, weight.shape, dtype, generator).to(
                device, memory_format=layouts.get(weight.ndim, torch.contiguous_format)
            )
            for name, weight in net.state_dict().items()
        }
        net.load_state_dict(state, assign=True)
        net.requires_grad_(False)
    return nets


def save_lora(nets: Nets, path: Path, seed: int) -> int:
    """In PEFT's names, fp16 as most are shared. → how many weights it changes."""
    generator, state, changed = torch.Generator().manual_seed(seed), {}, 0
    for (net, name), shape in layer_shapes(nets).items():
        if name.endswith(LAYERS):
            up, down = (shape[0], RANK, *[1] * (len(shape) - 2)), (RANK, *shape[1:])
            for part, size in {"A": down, "B": up}.items():
                state[f"{net}.{name}.lora_{part}.weight"] = 0.05 * torch.randn(size, generator=generator).half()
            changed += torch.Size(shape).numel()
    save_file(state, path)
    return changed


def first_difference(nets: Nets, before: dict[str, Tensor]) -> str | None:
    """A weight whose bits are not what they were."""
    now = all_weights(nets)
    return next((name for name, weight in before.items() if not torch.equal(_bits(now[name]), _bits(weight))), None)


def all_weights(nets: Nets) -> dict[str, Tensor]:
    return {f"{net}.{name}": weight for net in nets for name, weight in nets[net].state_dict().items()}


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16 if weight.itemsize == 2 else torch.int32)


def make_step(
    unet: UNet, config: ModelConfig, pixels: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """One step of a guided picture, the context and the time projected already."""
    side = pixels // config.vae.downscale
    x = torch.randn(2, side, side, config.unet.in_channels, device=device, dtype=dtype)
    context = torch.randn(2, 77, config.unet.cross_attention_dim, device=device, dtype=dtype)

    @torch.no_grad()
    def step() -> None:
        keys, bias = unet.project_context(context), unet.project_time(torch.tensor([500.0], device=device))
        unet(x, bias.expand(2, -1), keys)

    return step


def milliseconds(calls: list[Callable[[], Any]], repeats: int, device: torch.device) -> list[dict[str, float]]:
    """Of each call in turn; the first turn is thrown away."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                taken.append(1e3 * (time.perf_counter() - start))
    return [{"median": statistics.median(taken), "least": min(taken), "most": max(taken)} for taken in times]


def run(preset: str, device: torch.device, dtype: torch.dtype, pixels: int | None, repeats: int) -> dict[str, Any]:
    nets = make_nets(preset, device, dtype)
    loras, before = LoraAdapters(nets, SwapLock()), {name: weight.clone() for name, weight in all_weights(nets).items()}
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate("ab"):
            changed = save_lora(nets, Path(folder) / f"{name}.safetensors", seed)
            loras.load_lora_weights(Path(folder) / f"{name}.safetensors", name)
    unet = nets["unet"]
    assert isinstance(unet, UNet)
    config = PRESETS.get(preset) or fastsd.Pipeline(device="cpu").config
    pixels = pixels or (
        256 if device.type == "cpu" and preset != "bundled" else config.unet.sample_size * config.vae.downscale
    )
    step = make_step(unet, config, pixels, device, dtype)

    def set_to(names: list[str], weight: float) -> Callable[[], None]:
        return lambda: loras.set_adapters(names, weight)

    rows: dict[str, Callable[[], Any]] = {
        "on": set_to(["a"], 1.0),
        "another weight": set_to(["a"], 0.7),
        "switch to another": set_to(["b"], 1.0),
        "both": set_to(["a", "b"], 0.5),
        "off": set_to([], 1.0),
        "off again": set_to([], 1.0),
        "packed copies": refresh_weights,
        "step after a switch": step,
        "step": step,
    }
    found = dict(zip(rows, milliseconds(list(rows.values()), repeats, device), strict=True))
    loras.unload_lora_weights()
    wrong = first_difference(nets, before)
    if wrong:
        raise SystemExit(f"not reported: {wrong} has other bits than before the LoRAs")
    return record.header() | {
        "preset": preset,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rank": RANK,
        "changed_weights": changed,
        "pixels": pixels,
        "repeats": repeats,
        "milliseconds": found,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lora_switch", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=(*PRESETS, "bundled"), default="sd15")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="default fp16 on cuda, fp32 on the cpu"
    )
    parser.add_argument(
        "--pixels", type=int, help="of a square picture, for the step; default the model's, on a CPU 256"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, help="JSON file; default bench/results/lora-switch-DEVICE-PRESET-DTYPE.json"
    )
    args = parser.parse_args(argv)
    device = select_device(args.device)
    result = run(args.preset, device, select_dtype(args.dtype, device), args.pixels, args.repeats)
    name = f"lora-switch-{device.type}-{result['preset']}-{result['dtype']}.json"
    record.save(args.out or record.RESULTS / name, result)
    print(
        f"{result['preset']}, {result['dtype']} on {device}, {result['changed_weights'] / 1e6:.0f} million weights changed"
    )
    rows = [["", "median ms", "least", "most"]]
    for what, times in result["milliseconds"].items():
        rows.append([what, *(f"{times[key]:.2f}" for key in ("median", "least", "most"))])
    print(record.table(rows))
    print("off gives back the first bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
