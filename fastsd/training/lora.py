"""Low-rank updates of some layers, trained while the weights stay as they are (Hu et al. 2021, arXiv 2106.09685).

W + (alpha / rank)·up·down, as a parametrization of the layer's weight: the nets need not know of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsd.adapters.lora_keys import KOHYA, layer_shapes
from fastsd.checkpoints.folder_writer import own, save_tensors, written
from fastsd.errors import ParameterError


class LowRank(nn.Module):
    """What is added to one weight [O, I] or [O, I, h, w]; at first nothing, as `up` is zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        columns = weight[0].numel()
        self.down = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.alpha, self.rank, self.shape = alpha, rank, weight.shape

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.alpha / self.rank * (self.up @ self.down).view(self.shape)


def add_lora(net: nn.Module, component: str, endings: Sequence[str], rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze the net but for a LoRA on each layer whose name ends so → kohya's name of each layer, and its update.

    Raises ParameterError for an ending that no layer has.
    """
    net.requires_grad_(False)
    names = [name for _, name in layer_shapes({component: net})]
    for ending in endings:
        if not any(_ends(name, ending) for name in names):
            key = "layers" if component == "unet" else "text_layers"
            raise ParameterError(f"{key}: no layer of the {component} is named {ending}; e.g. {names[0]}")
    added = {}
    for name in names:
        if any(_ends(name, ending) for ending in endings):
            module = net.get_submodule(name)
            update = LowRank(module.weight, rank, alpha)  # type: ignore[arg-type]
            parametrize.register_parametrization(module, "weight", update)
            module.parametrizations["weight"].original.requires_grad_(False)  # type: ignore[index,union-attr]
            added[KOHYA[component] + name.replace(".", "_")] = update
    return added


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def save_lora(path: Path, updates: Mapping[str, LowRank], dtype: torch.dtype) -> None:
    """Write the file that kohya's trainer would: it is read by fastsd, the web UIs and diffusers."""
    state: dict[str, Tensor] = {}
    for name, update in updates.items():
        outputs, inputs, *kernel = update.shape
        point = [1] * len(kernel)
        state[f"{name}.lora_down.weight"] = own(update.down.detach().view(update.rank, inputs, *kernel).to(dtype))
        state[f"{name}.lora_up.weight"] = own(update.up.detach().view(outputs, update.rank, *point).to(dtype))
        state[f"{name}.alpha"] = torch.tensor(update.alpha, dtype=dtype)
    with written(path) as temporary:
        save_tensors(state, temporary)
