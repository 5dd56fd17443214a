"""The field's own implementations: nets with random weights made by diffusers and transformers, and how to compare."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from bench.workloads import psnr as psnr
from fastsd.checkpoints import open_folder
from tests.measured import measured
from tests.small_model import SMALL_MODEL
from tests.tolerances import IMAGE_PSNR

diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SD1_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 2,
    "attention_head_dim": 8,  # heads: 4, 8, 16, 16 wide
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SD2_UNET = SD1_UNET | {"attention_head_dim": (2, 4, 8, 8), "cross_attention_dim": 64, "use_linear_projection": True}
SD_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
CLIP: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "vocab_size": 649,
    "bos_token_id": 647,
    "eos_token_id": 648,
}
OPEN_CLIP = CLIP | {"hidden_size": 64, "intermediate_size": 128, "hidden_act": "gelu", "num_attention_heads": 2}
SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21_SCHEDULER = SD15_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a net with weights that keep activations near unit size, norms and biases included: a zero hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return net.eval()


def unet(config: dict[str, Any], seed: int = 0) -> diffusers.UNet2DConditionModel:
    return randomise(diffusers.UNet2DConditionModel(**config), seed)


def vae(config: dict[str, Any], seed: int = 1) -> diffusers.AutoencoderKL:
    return randomise(diffusers.AutoencoderKL(**config), seed)


def text_encoder(config: dict[str, Any], seed: int = 2) -> transformers.CLIPTextModel:
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)), seed)


def save_random_model(path: Path, style: str) -> Path:
    """A folder as diffusers saves it, with a small vocabulary: the small model's."""
    nets = {
        "sd1": (unet(SD1_UNET), vae(SD_VAE), text_encoder(CLIP), SD15_SCHEDULER),
        "sd2": (unet(SD2_UNET), vae(SD_VAE), text_encoder(OPEN_CLIP), SD21_SCHEDULER),
    }
    *saved, scheduler = nets[style]
    for name, net in zip(("unet", "vae", "text_encoder"), saved, strict=True):
        net.save_pretrained(path / name)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    shutil.copytree(SMALL_MODEL / "tokenizer", path / "tokenizer")
    index = json.loads((SMALL_MODEL / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def load_pipeline(path: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        path, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(net: nn.Module, saved: nn.Module, component: str, path: Path) -> nn.Module:
    """fastsd's net (built on meta) with the oracle's weights, by way of a folder that the oracle saved."""
    if not (path / "model_index.json").exists():
        shutil.copytree(SMALL_MODEL, path, dirs_exist_ok=True)
    shutil.rmtree(path / component)
    saved.save_pretrained(path / component)
    folder = open_folder(path)
    folder.load_weights(component, net, torch.float32, torch.device("cpu"))
    return net.eval()


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def assert_close(ours: Tensor, theirs: Tensor, atol: float, what: str) -> None:
    """Largest absolute error within atol, on values of about unit size."""
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    error = (ours.double() - theirs.double()).abs().max().item()
    size = theirs.abs().max().item()
    measured("max abs error", error, atol)
    assert size > 1e-2, f"{what}: the oracle gives next to nothing ({size:.1e}), so this compares nothing"
    assert error <= atol, f"{what}: max abs error {error:.2e} > {atol:.0e} (largest value {size:.2f})"


def assert_same_picture(ours: Any, theirs: Any, what: str, lowest: float = IMAGE_PSNR) -> None:
    """Values in [0, 1]: PSNR of at least `lowest` dB."""
    quality = psnr(np.asarray(ours), np.asarray(theirs))
    measured("dB", quality, lowest)
    assert quality >= lowest, f"{what}: PSNR {quality:.1f} dB against the oracle, at least {lowest} is asked"


def assert_equal(found: Any, expected: Any, what: str) -> None:
    """Arrays, tensors, lists of numbers or bytes: every value is the same."""
    ours, theirs = (np.frombuffer(one, np.uint8) if isinstance(one, bytes) else one for one in (found, expected))
    ours, theirs = (one if isinstance(one, Tensor) else torch.from_numpy(np.array(one)) for one in (ours, theirs))
    differ = int((ours != theirs).sum()) if ours.shape == theirs.shape else max(ours.numel(), theirs.numel())
    measured("values differ", differ, 0)
    assert differ == 0, f"{what}: {differ} values of {theirs.numel()} differ"


def relative_l2(value: Tensor, truth: Tensor) -> float:
    """|value − truth| / |truth|, in fp64; infinite where the value is not finite."""
    if not value.isfinite().all():
        return float("inf")
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
