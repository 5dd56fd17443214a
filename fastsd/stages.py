"""The nets of a model on a device, and how each stage of a generation is run on them: eagerly, or as a captured graph."""

import torch
from torch import Tensor

from fastsd.adapters import LoraAdapters
from fastsd.config import CLIPConfig, ModelConfig
from fastsd.denoise import Denoiser
from fastsd.errors import CheckpointError, NumericsError
from fastsd.first_stage import FirstStage, Source
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.ops import Ops
from fastsd.tokenizer import Tokenizer


class Stages(FirstStage):
    """Text encoder, UNet and VAE, and what is kept to run them fast. Threads may share it."""

    def __init__(
        self, config: ModelConfig, source: Source, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool
    ) -> None:
        super().__init__(config.vae, source, ops, device, dtype, graphs)
        self.config = config
        self.tile = config.unet.sample_size
        self.text_encoder = self._load("text_encoder", lambda: CLIPText(config.text_encoder, ops), source)
        self.unet = self._load("unet", lambda: UNet(config.unet, ops), source)
        self._denoiser = Denoiser(self.unet, ops, self.graphs)
        self._loras = loras = LoraAdapters({"unet": self.unet, "text_encoder": self.text_encoder}, self._swaps)
        self.load_lora_weights, self.set_adapters = loras.load_lora_weights, loras.set_adapters
        self.unload_lora_weights, self.delete_adapters = loras.unload_lora_weights, loras.delete_adapters
        self.enable_lora, self.disable_lora = loras.enable_lora, loras.disable_lora
        self.get_list_adapters, self.get_active_adapters = loras.get_list_adapters, loras.get_active_adapters

    def _encode_tokens(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Token ids [U, 77] → context [U, 77, C]."""
        key = ("text", len(ids), clip_skip)
        return self._replayed(key, lambda ids: self.text_encoder(ids, clip_skip), ids.to(self.device))

    def _not_finite(self, survived: int, steps: int) -> NumericsError | None:
        """What is to be said of a walk that was finite for so many of its steps; None of one that survived them all."""
        if survived == steps:
            return None
        advice = "the checkpoint is damaged" if self.dtype == torch.float32 else "try dtype='float32'"
        return NumericsError(f"unet: a non-finite value at step {survived + 1} of {steps} in {self.dtype}; {advice}")


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
