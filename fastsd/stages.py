"""The nets of a model on a device, and how each stage of a generation is run on them: eagerly, or as a captured graph."""

import copy
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastsd.adapters import LoraAdapters, SwapLock
from fastsd.backends import refresh_weights
from fastsd.config import CLIPConfig, ModelConfig
from fastsd.denoise import Denoiser, Walk
from fastsd.errors import CheckpointError, NumericsError
from fastsd.graph import CudaGraphs, Graphs
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.ops import Ops
from fastsd.tokenizer import Tokenizer

GRAPH_MEMORY = 4 * 2**30
"""Bytes of GPU memory that a pipeline's CUDA graphs may hold; the least recently used goes first."""


class Source(Protocol):
    """Where weights come from."""

    def load_weights(self, component: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None: ...


class Stages:
    """Text encoder, UNet and VAE, and what is kept to run them fast. Threads may share it."""

    def __init__(
        self, config: ModelConfig, source: Source, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool
    ) -> None:
        self.config = config
        self.ops = ops
        self.device = device
        self.dtype = dtype
        with torch.inference_mode(False), torch.device("meta"):
            self.text_encoder = CLIPText(config.text_encoder, ops)
            self.unet = UNet(config.unet, ops)
            self.vae = VAE(config.vae, ops)
        nets: dict[str, nn.Module] = {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}
        with torch.inference_mode(False):  # weights that count their changes, wherever the Pipeline is made
            for component, net in nets.items():
                source.load_weights(component, net, dtype, device)
                net.eval()
        self.graphs = Graphs(CudaGraphs(device), GRAPH_MEMORY) if graphs and device.type == "cuda" else None
        self._weights_at: list[int] = []
        self._denoiser = Denoiser(self.unet, ops, self.graphs)
        self._swaps = SwapLock()
        loras = LoraAdapters({"unet": self.unet, "text_encoder": self.text_encoder}, self._swaps)
        self.load_lora_weights, self.set_adapters = loras.load_lora_weights, loras.set_adapters
        self.unload_lora_weights, self.delete_adapters = loras.unload_lora_weights, loras.delete_adapters
        self.enable_lora, self.disable_lora = loras.enable_lora, loras.disable_lora
        self.get_list_adapters, self.get_active_adapters = loras.get_list_adapters, loras.get_active_adapters

    def _encode_tokens(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Token ids [U, 77] → context [U, 77, C]."""
        key = ("text", len(ids), clip_skip)
        return self._replayed(key, lambda ids: self.text_encoder(ids, clip_skip), ids.to(self.device))

    def _refresh(self) -> None:
        """Let graphs see weights that were changed in place; forget them where weights were moved."""
        if self.graphs is None:
            return
        refresh_weights()
        nets = (self.text_encoder, self.unet, self.vae)
        at = [parameter.data_ptr() for net in nets for parameter in net.parameters()]
        if at != self._weights_at:
            self.graphs.clear()
            self._weights_at = at

    def _replayed(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs) if self.graphs is None else self.graphs.call(key, function, *inputs)

    def _walk(self, walk: Walk, after_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """The loop of every sampler: noise → latents [B, H, W, C] fp32. NumericsError naming the step that was not finite."""
        latents, survived = self._denoiser.run(walk, after_step)
        if survived < len(walk.table):
            advice = "the checkpoint is damaged" if self.dtype == torch.float32 else "try dtype='float32'"
            raise NumericsError(
                f"unet: a non-finite value at step {survived + 1} of {len(walk.table)} in {self.dtype}; {advice}"
            )
        return latents

    def _finite(self, method: str, inputs: list[Tensor | None], notes: list[str]) -> Tensor:
        """What the VAE's method gives, in fp32. Where half precision overflows it is computed again in fp32, and noted."""

        given = [x for x in inputs if x is not None]
        key = (method, *(tuple(x.shape) for x in given))
        half = [x.to(self.device, self.dtype) for x in given]
        result = self._replayed(key, getattr(self.vae, method), *half).float()
        if not result.isfinite().all() and self.dtype != torch.float32:
            notes.append(f"vae: non-finite values in {self.dtype}; computed again in float32")
            full = copy.deepcopy(self.vae).float()
            result = getattr(full, method)(*[x.to(self.device, torch.float32) for x in given])
        if not result.isfinite().all():
            raise NumericsError(f"vae: {method} gives non-finite values; the input or the checkpoint is damaged")
        return result


def check_vocabulary(tokenizer: Tokenizer, config: CLIPConfig) -> None:
    """CheckpointError unless the text encoder has a row for every token and a position for each place."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text_encoder knows {config.vocab_size}"
        )
    if tokenizer.max_length > config.max_position_embeddings:
        raise CheckpointError(
            f"the tokenizer pads to {tokenizer.max_length}, but the text_encoder has {config.max_position_embeddings} positions"
        )
