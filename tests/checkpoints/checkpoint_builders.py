"""Small models on disk, whole or damaged on purpose, for the tests of fastsd.checkpoints."""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from tests.small_model import SMALL_MODEL

COMPONENTS = ("unet", "vae", "text_encoder")
UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHT_FILES = {
    "unet": UNET,
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


class Net(nn.Module):
    """A stand-in for a component: one tensor of each kind the loader treats apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.linear = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)


def meta_net() -> Net:
    with torch.device("meta"):
        return Net()


def net_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in meta_net().state_dict().items()}


def small_model_state(component: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(SMALL_MODEL / WEIGHT_FILES[component])


def model_on_disk(path: Path) -> Path:
    """The small model's JSON and tokenizer around `Net` weights for each component."""
    shutil.copytree(SMALL_MODEL, path, ignore=shutil.ignore_patterns("*.safetensors"))
    path.chmod(0o755)
    for file in WEIGHT_FILES.values():
        (path / file).write_bytes(safetensors.torch.save(net_state()))
    return path


def split(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and data."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file out of any header, `size` being what it claims the header's length to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))
