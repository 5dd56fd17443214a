"""One step of SD 1.5's UNet alone, with random weights: for CPUs, where a picture of that size takes minutes."""

import numpy as np
import torch

from bench.ladder import Engine
from bench.peers import CHANNELS_LAST, import_diffusers
from bench.random_model import draw_weight
from bench.workloads import Case, Contender, Drawn
from fastsd.config import SD15
from fastsd.models.unet import UNet


class UNetStep:
    """The contenders of a case. They share the weights, of which each memory layout is held once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rows, side, dtype = 2 * case.batch, case.pixels // SD15.vae.downscale, case.torch_dtype
        self.x = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.context = torch.randn(rows, 77, 768, generator=torch.Generator().manual_seed(2)).to(dtype)
        self.timestep = torch.tensor([500.0])
        self._made: dict[torch.memory_format, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def ours(self, engine: Engine) -> Contender:
        """With the context and the time projected already: fastsd does that once a prompt and once a schedule."""
        ops = engine.ops(torch.device(self.case.device))
        with torch.device("meta"):
            unet = UNet(SD15.unet, ops)
        unet.load_state_dict(self._weights(torch.channels_last), assign=True)
        unet.requires_grad_(False)
        image = self.x.permute(0, 2, 3, 1).contiguous()
        keys, time = unet.project_context(self.context), unet.project_time(self.timestep).expand(len(self.x), -1)

        @torch.no_grad()
        def run() -> Drawn:
            return Drawn(_array(unet(image, time, keys).permute(0, 3, 1, 2)))

        return Contender(f"fastsd {ops.name}", run)

    def theirs(self, name: str) -> Contender:
        diffusers = import_diffusers()
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        layout = torch.channels_last if name == CHANNELS_LAST else torch.contiguous_format
        unet.load_state_dict(self._weights(layout), assign=True)

        @torch.no_grad()
        def run() -> Drawn:
            return Drawn(_array(unet(self.x, self.timestep, self.context).sample))

        return Contender(name, run)

    def _weights(self, memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
        if memory_format not in self._made:
            generator = torch.Generator().manual_seed(0)
            with torch.device("meta"):
                shapes = UNet(SD15.unet).state_dict()
            self._made[memory_format] = {
                name: draw_weight(name, weight.shape, self.case.torch_dtype, generator).contiguous(
                    memory_format=memory_format if weight.ndim == 4 else torch.contiguous_format
                )
                for name, weight in shapes.items()
            }
        return self._made[memory_format]


def _array(out: torch.Tensor) -> np.ndarray:
    return out.float().numpy()
