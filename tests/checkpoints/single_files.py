"""Random models of Stable Diffusion's layouts at small width, as single files of LDM keys without any metadata."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from fastsd.checkpoints import SingleFile, open_single_file
from fastsd.checkpoints.single_file import CLIP_VOCABULARY
from fastsd.config import ModelConfig
from fastsd.convert import convert
from fastsd.errors import CheckpointError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from tests import oracle
from tests.checkpoints.checkpoint_builders import COMPONENTS
from tests.small_model import SMALL_MODEL

# What a single file cannot say is as in Stable Diffusion: 32 groups, 8 heads or heads of 64, 49,408 tokens.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": oracle.SD1_UNET | {"norm_num_groups": 32, "cross_attention_dim": 64, "block_out_channels": (32, 64, 64, 64)},
    "sd2": oracle.SD2_UNET
    | {
        "norm_num_groups": 32,
        "block_out_channels": (64, 64, 128, 128),
        "attention_head_dim": (1, 1, 2, 2),
        "layers_per_block": 1,
    },
}
AUTOENCODER = oracle.SD_VAE | {"norm_num_groups": 32, "block_out_channels": (32, 32, 64, 64)}
TOKENS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
ENCODER = TOKENS | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1}
CLIP: dict[str, dict[str, Any]] = {
    "sd1": oracle.CLIP | ENCODER,
    "sd2": oracle.OPEN_CLIP | ENCODER | {"num_hidden_layers": 23},
}
SCHEDULER = {"sd1": oracle.SD15_SCHEDULER, "sd2": oracle.SD21_SCHEDULER}
SIZE = {"sd1": 64, "sd2": 96}


def save_folder(path: Path, style: str) -> Path:
    """A diffusers folder in fp16, and the tokenizer padding as it does in that family."""
    oracle.unet(UNETS[style] | {"sample_size": SIZE[style]}).half().save_pretrained(path / "unet")
    oracle.vae(AUTOENCODER | {"sample_size": 8 * SIZE[style]}).half().save_pretrained(path / "vae")
    oracle.text_encoder(CLIP[style]).half().save_pretrained(path / "text_encoder")
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER[style]))
    shutil.copytree(CLIP_VOCABULARY, path / "tokenizer", ignore=shutil.ignore_patterns("README.md", "LICENSE"))
    if style == "sd2":
        special = json.loads((path / "tokenizer/special_tokens_map.json").read_text())
        (path / "tokenizer/special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}))
    index = json.loads((SMALL_MODEL / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", SCHEDULER[style]["_class_name"]]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def ldm_state(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """The folder's tensors under LDM's names, by fastsd's own table: `by_diffusers` must agree with it."""
    return safetensors.torch.load_file(convert(folder, scratch / "ldm.safetensors", force=True))


class Model:
    """A random model as a folder and as LDM keys, and the single file of just these keys."""

    def __init__(self, path: Path, style: str) -> None:
        self.style = style
        self.folder = save_folder(path / "folder", style)
        self.state = ldm_state(self.folder, path)
        self.file = path / f"{style}.safetensors"
        safetensors.torch.save_file(self.state, self.file)


def folder_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a folder by component and name, the text encoder's without `text_model.`."""
    states = {}
    for component in COMPONENTS:
        (file,) = (folder / component).glob("*.safetensors")
        state = safetensors.torch.load_file(file)
        states[component] = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return states


def by_diffusers(state: dict[str, Tensor], style: str) -> dict[str, dict[str, Tensor]]:
    """What diffusers' own loader makes of LDM names."""
    unet, vae = dict(UNETS[style]), dict(AUTOENCODER)
    if style == "sd1":
        text = single_file_utils.convert_ldm_clip_checkpoint(dict(state))
    else:
        with torch.device("meta"):
            model = oracle.transformers.CLIPTextModel(oracle.transformers.CLIPTextConfig(**CLIP[style]))
        text = single_file_utils.convert_open_clip_checkpoint(model, dict(state))
    return {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(state), unet),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(state), vae),
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text.items()},
    }


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """The same names, dtypes, shapes and bits."""
    odd = found.keys() ^ expected.keys()
    assert not odd, f"{what}: {len(odd)} names on one side only, e.g. {sorted(odd)[:3]}"
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{what}: {name} became {found[name].dtype}"
        oracle.assert_equal(found[name], tensor, f"{what}: {name}")


def meta_net(source: SingleFile, component: str) -> nn.Module:
    config = ModelConfig.from_json(source.text_encoder, source.unet, source.vae)
    with torch.device("meta"):
        return {"unet": UNet, "vae": VAE, "text_encoder": CLIPText}[component](getattr(config, component))


def load(path: Path, component: str, **options: object) -> dict[str, Tensor]:
    source = open_single_file(path, **options)
    net = meta_net(source, component)
    source.load_weights(component, net, torch.float16, torch.device("cpu"))
    return net.state_dict()


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(state, path, metadata)
    return path


def refusal(path: Path, reason: str, component: str | None = None, **options: object) -> str:
    """The message of the error for opening the file, or for loading a component of it."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path, component, **options) if component else open_single_file(path, **options)
    message = str(caught.value)
    assert path.name in message, f"the message does not name the file: {message}"
    assert message.isprintable(), f"not one printable line: {message!r}"
    return message
