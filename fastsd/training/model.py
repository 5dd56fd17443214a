"""The model in training: three nets in fp32, their configs, the tokenizer; from a folder, and back into one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsd.checkpoints import open_model
from fastsd.checkpoints.file_parts import CONFIGS
from fastsd.checkpoints.folder_writer import write_folder, written
from fastsd.config import ModelConfig, VQConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.sampling import NoiseSchedule
from fastsd.stages import check_vocabulary
from fastsd.tokenizer import Tokenizer
from fastsd.training.data import Dataset
from fastsd.training.initial import initialise_text_encoder, initialise_unet
from fastsd.training.recipe import ModelOptions
from fastsd.training.vocabulary import write_vocabulary


@dataclass
class Model:
    configs: dict[str, dict[str, Any]]
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Tokenizer
    tokenizer_folder: Path

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.configs["scheduler"])

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a diffusers folder, whole or not at all."""
        nets: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        configs = dict(self.configs)
        name = str(dtype).removeprefix("torch.")
        configs["text_encoder"] = configs["text_encoder"] | {"dtype": name}
        path.parent.mkdir(parents=True, exist_ok=True)
        states = (
            (component, {key: tensor.detach().to(dtype) for key, tensor in net.state_dict().items()})
            for component, net in nets.items()
        )
        with written(path) as temporary:
            write_folder(temporary, configs, states, self.tokenizer_folder)


def load_model(source: str | Path, device: torch.device) -> Model:
    """A model's nets in fp32, not yet set to be trained. Raises CheckpointError as `Pipeline` does."""
    opened = open_model(source)
    config = ModelConfig.from_json(opened.text_encoder, opened.unet, opened.vae)
    if isinstance(config.vae, VQConfig):
        raise CheckpointError(
            "vae/: has a codebook (VQModel); fastsd trains models whose autoencoder is an AutoencoderKL"
        )
    tokenizer = Tokenizer.from_folder(opened.tokenizer)
    check_vocabulary(tokenizer, config.text_encoder)
    with torch.device("meta"):
        unet, vae, text_encoder = UNet(config.unet), VAE(config.vae), CLIPText(config.text_encoder)
    nets: dict[str, nn.Module] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for component, net in nets.items():
        opened.load_weights(component, net, torch.float32, device)
    configs = {name: getattr(opened, name) for name in CONFIGS}
    return Model(configs, unet, vae, text_encoder, tokenizer, opened.tokenizer)


def grow_unet(model: Model, changes: Mapping[str, Any]) -> None:
    """Put a UNet with more layers in the place of the model's; it predicts the same as before until it is trained.

    changes: keys of the UNet's config. The weights that there are stay; new residual branches end in zeros. Raises
    ParameterError for changes that do not add layers, or change what those that there are do.
    """
    before, unet_config = model.unet, {**model.configs["unet"], **changes}
    try:
        config = ModelConfig.from_json(model.configs["text_encoder"], unet_config, model.configs["vae"])
    except CheckpointError as error:
        raise ParameterError(f"grow: {error}") from error
    grown = UNet(config.unet)
    initialise_unet(grown)
    weights, places = before.state_dict(), grown.state_dict()
    if weights.keys() >= places.keys():
        raise ParameterError(f"grow: {', '.join(changes)}: this adds no layer")
    for name, weight in weights.items():
        if name not in places or places[name].shape != weight.shape:
            raise ParameterError(
                f"grow: {name} {list(weight.shape)} has no place in the new UNet; only layers can be added"
            )
    grown.load_state_dict(places | weights)
    grown.to(next(before.parameters()).device)
    if not torch.allclose(_probe(grown), _probe(before), rtol=1e-3, atol=1e-3):
        raise ParameterError(f"grow: {', '.join(changes)}: with this the layers that there are do something else")
    model.configs["unet"], model.unet = unet_config, grown


@torch.no_grad()
def _probe(unet: UNet) -> Tensor:
    """What a UNet predicts for one made-up input."""
    config, device = unet.config, next(unet.parameters()).device
    generator = torch.Generator().manual_seed(0)
    side = 2 ** len(config.block_out_channels)
    x = torch.randn(1, side, side, config.in_channels, generator=generator).to(device)
    context = torch.randn(1, 8, config.cross_attention_dim, generator=generator).to(device)
    return unet(x, unet.project_time(torch.tensor([500.0], device=device)), unet.project_context(context))


def new_model(options: ModelOptions, dataset: Dataset, seed: int, path: Path) -> None:
    """Write a model with initial weights to `path`, its vocabulary that of the data set's captions."""
    rng = np.random.default_rng(seed)
    captions = (dataset.caption(int(i), rng).text for i in rng.permutation(len(dataset))[:20_000])
    folder = path.with_name(path.name + "-vocabulary")
    size = write_vocabulary(captions, folder, options.max_length)
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = options.text_encoder | ends | {"vocab_size": size, "max_position_embeddings": options.max_length}
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel"} | options.unet,
        "vae": {"_class_name": "AutoencoderKL"} | options.vae,
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | text,
        "scheduler": {"_class_name": "DDIMScheduler"} | options.scheduler,
    }
    config = ModelConfig.from_json(configs["text_encoder"], configs["unet"], configs["vae"])
    torch.manual_seed(seed)
    unet, vae, text_encoder = UNet(config.unet), VAE(config.vae), CLIPText(config.text_encoder)
    initialise_unet(unet)
    initialise_text_encoder(text_encoder)
    Model(configs, unet, vae, text_encoder, Tokenizer.from_folder(folder), folder).save(path)
