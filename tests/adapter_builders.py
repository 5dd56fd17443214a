"""LoRA files with random factors for any model, in the names of each program that writes them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import fastsd
from fastsd.adapters import LoraAdapters, SwapLock
from tests import oracle
from tests.small_model import SMALL_MODEL

LINEAR = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
)
CONVS = (
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)


SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SMALL = {
    "sd1": (SMALL_UNET | {"cross_attention_dim": 48}, oracle.CLIP | {"num_hidden_layers": 2}),
    "sd2": (
        SMALL_UNET | {"cross_attention_dim": 64, "use_linear_projection": True, "attention_head_dim": (2, 4)},
        oracle.OPEN_CLIP | {"num_hidden_layers": 2},
    ),
}


def save_small_model(path: Path, style: str) -> Path:
    """The small model's VAE and tokenizer around a UNet and a text encoder of random weights and few layers."""
    shutil.copytree(SMALL_MODEL, path, dirs_exist_ok=True)
    unet, text_encoder = SMALL[style]
    for name, net in {"unet": oracle.unet(unet), "text_encoder": oracle.text_encoder(text_encoder)}.items():
        shutil.rmtree(path / name)
        net.save_pretrained(path / name)
    return path


def nets(pipe: fastsd.Pipeline) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def adapters(pipe: fastsd.Pipeline) -> LoraAdapters:
    return LoraAdapters(nets(pipe), SwapLock())


def weights(pipe: fastsd.Pipeline) -> dict[str, Tensor]:
    """Copies of all weights that an adapter may change."""
    return {
        f"{component}.{name}": tensor.clone()
        for component, net in nets(pipe).items()
        for name, tensor in net.state_dict().items()
    }


def layers(pipe: fastsd.Pipeline, endings: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Size]]:
    """(component, module, shape of its weight) of the layers so named."""
    for component, net in nets(pipe).items():
        for name, tensor in net.state_dict().items():
            module = name.removesuffix(".weight")
            if module != name and module.endswith(endings):
                yield component, module, tensor.shape


def factors(shape: torch.Size, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """up, down, whose product is as large as the weight itself: an error in scale or place cannot hide."""
    down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / rank**0.5
    return up, down


def kohya(component: str, module: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
    return prefix + module.replace(".", "_")


def kohya_lora(
    pipe: fastsd.Pipeline,
    endings: tuple[str, ...] = LINEAR + CONVS,
    rank: int = 4,
    alpha: Callable[[int], float] | None = lambda index: 2.0 + index % 3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """As kohya's sd-scripts write one; alpha by the layer's number, or none."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for index, (component, module, shape) in enumerate(layers(pipe, endings)):
        name = kohya(component, module)
        state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"] = factors(shape, rank, generator)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha(index))
    assert state, "no layer is called so"
    return state


def save(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, path, metadata
    )
    return path


def fused(theirs: Any, names: list[str], scales: list[Any]) -> dict[str, Tensor]:
    """diffusers' weights with these adapters merged by PEFT, by our names."""
    theirs.set_adapters(names, scales)
    theirs.fuse_lora(components=["unet", "text_encoder"], adapter_names=names)
    found = {}
    for component in ("unet", "text_encoder"):
        for name, tensor in getattr(theirs, component).state_dict().items():
            if ".lora_" not in name:
                found[f"{component}.{name.replace('.base_layer', '').removeprefix('text_model.')}"] = tensor.clone()
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error over all tensors, and where it is."""
    assert ours.keys() == theirs.keys(), f"other names: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    return max(((ours[k] - theirs[k]).norm().item() / max(theirs[k].norm().item(), 1e-9), k) for k in ours)
