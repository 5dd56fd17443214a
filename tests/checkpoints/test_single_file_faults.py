"""Single files that are no Stable Diffusion, damaged or made to harm: each is a CheckpointError that names the file."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.checkpoints import open_single_file
from fastsd.checkpoints.architecture import INPUT_CHANNELS
from fastsd.errors import CheckpointError
from tests.checkpoints.checkpoint_builders import join, small_model_state, split
from tests.checkpoints.single_files import Model, assert_same_tensors, folder_state, load, meta_net, refusal, save
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL

# What it is not

UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["conditioner.embedders.0.transformer.x", f"{UNET}input_blocks.0.0.weight"], "Stable Diffusion XL"),
        ([f"{UNET}joint_blocks.0.x.weight", "first_stage_model.x"], "Stable Diffusion 3"),
        ([f"{UNET}double_blocks.0.img_attn.qkv.weight"], "FLUX"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["first_stage_model.decoder.conv_in.weight"], "a single file without the UNet and the text encoder"),
        ([f"{UNET}input_blocks.0.0.weight"], "a single file without the VAE and the text encoder"),
        (["input_blocks.0.0.weight", "out.2.weight"], "a UNet alone"),
        (["conv_in.weight", "time_embedding.linear_1.weight"], "the UNet of a diffusers folder, alone"),
        (["emb_params"], "a textual-inversion embedding"),
        ([f"{UNET}label_emb.0.0.weight"], "unCLIP"),
        (["transformer.h.0.attn.weight"], "no Stable Diffusion checkpoint"),
        ([], "no Stable Diffusion checkpoint"),
    ],
)
def test_what_is_no_stable_diffusion(names: list[str], kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    refusal(path, f"this is .*{kind}.*; fastsd opens single files of Stable Diffusion 1.x and 2.x")


def test_the_small_vae_is_a_component() -> None:
    path = SMALL_MODEL / "vae/diffusion_pytorch_model.safetensors"
    assert small_model_state("vae")
    refusal(path, "the VAE of a diffusers folder, alone")


def test_an_inpainting_unet(sd1: Model, tmp_path: Path) -> None:
    """9 input channels are one of the UNets that fastsd runs."""
    weight = torch.randn(32, 9, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    path = save(tmp_path / "wide.safetensors", sd1.state | {f"{UNET}input_blocks.0.0.weight": weight})
    pipe = fastsd.Pipeline.from_single_file(path)
    assert pipe.config.unet.in_channels == 9
    assert_equal(pipe.unet.conv_in.weight.half(), weight, "conv_in")


@pytest.mark.parametrize("channels", sorted(INPUT_CHANNELS.keys() - {9}))
def test_unets_of_other_inputs(channels: int, sd1: Model, tmp_path: Path) -> None:
    wide = {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3, dtype=torch.float16)}
    refusal(save(tmp_path / "wide.safetensors", sd1.state | wide), rf"this is .*\({channels} input channels\)")


# Faults


def test_unknown_names_are_listed(sd1: Model, tmp_path: Path) -> None:
    extra = {f"{UNET}input_blocks.{20 + i}.0.x": torch.zeros(1) for i in range(7)}
    extra |= {f"mystery_{i}": torch.zeros(1) for i in range(7)}
    message = refusal(
        save(tmp_path / "odd.safetensors", sd1.state | extra), r"14 tensors that no .* model has \(.* and 4 more\)"
    )
    assert message.count(", ") == 9, f"at most ten are listed: {message}"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (f"{UNET}input_blocks.4.0.skip_connection.weight", None, r"1 missing \(down_blocks\.1\.resnets\.0\.conv_shortcut"),
        (f"{UNET}out.2.bias", torch.zeros(5), "of another shape.*conv_out.bias expected"),
        (f"{UNET}input_blocks.1.1.extra", torch.zeros(5), r"1 unexpected \(down_blocks.0.attentions.0.extra"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", torch.zeros(64, 63, 1, 1), r"expected \[64, 64\], found \[64, 63\]"),
        ("first_stage_model.quant_conv.bias", torch.zeros(8, dtype=torch.int8), "is int8; only floating-point"),
        ("first_stage_model.quant_conv.bias", torch.full((8,), torch.nan), "NaN or infinite"),
        (f"{UNET}out.2.bias", torch.full((4,), 1e9), "beyond the range of float16"),
        (f"{UNET}middle_block.1.proj_in.weight", None, "damaged, .*middle_block.1.proj_in.weight is missing"),
        (f"{UNET}middle_block.1.proj_in.weight", torch.zeros(3), r"damaged, .*has the shape \[3\]"),
        (f"{UNET}input_blocks.0.0.weight", torch.zeros(()), r"damaged, .*has the shape \[\]"),
        ("first_stage_model.encoder.conv_in.weight", None, "damaged, .*encoder.conv_in.weight is missing"),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", torch.zeros(9, 65), "64 wide, .* is 65"),
    ],
)  # fmt: skip
def test_damaged_tensors(name: str, change: Tensor | None, reason: str, sd1: Model, tmp_path: Path) -> None:
    state = {key: value for key, value in (sd1.state | {name: change}).items() if value is not None}
    component = {"first": "vae", "model": "unet", "cond_": "text_encoder"}[name[:5]]
    refusal(save(tmp_path / "damaged.safetensors", state), reason, component)
    assert open_single_file(sd1.file), "the next valid file opens"


def test_packed_attention_that_cannot_be_cut_in_three(sd2: Model, tmp_path: Path) -> None:
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    state = sd2.state | {name: torch.zeros(193)}
    refusal(
        save(tmp_path / "cut.safetensors", state), r"3 of another shape.*q_proj\.bias expected \[64\]", "text_encoder"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "bytes that belong to no tensor"),
        (lambda data: b"", "the file is empty"),
        (lambda data: data[:6], "truncated"),
        (lambda data: b"<!DOCTYPE html>" + data, "a web page"),
        (lambda data: (1 << 62).to_bytes(8, "little") + data[8:], "truncated"),
    ],
)
def test_damaged_files(change: object, reason: str, sd1: Model, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(change(sd1.file.read_bytes()))
    refusal(path, reason)


@pytest.mark.parametrize("kind", ["overlap", "swapped lengths"])
def test_offsets_that_do_not_fit(kind: str, sd1: Model, tmp_path: Path) -> None:
    header, data = split(sd1.file.read_bytes())
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"]
    )[:2]
    if kind == "overlap":
        header[second]["data_offsets"] = header[first]["data_offsets"]
    else:
        begin, middle = header[first]["data_offsets"]
        header[first]["data_offsets"] = [begin, middle + 2]
        header[second]["data_offsets"][0] = middle + 2
    path = tmp_path / "offsets.safetensors"
    path.write_bytes(join(header, data))
    refusal(path, "damaged safetensors file: offsets", "unet")


def test_a_file_that_changes_after_it_was_opened(sd1: Model, tmp_path: Path) -> None:
    good = sd1.file.read_bytes()
    path = tmp_path / "changing.safetensors"
    for content in (good[:-1], good + b"\0", good.replace(b"out.2.bias", b"out.3.bias"), b""):
        path.write_bytes(good)
        source = open_single_file(path)
        net = meta_net(source, "unet")
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            source.load_weights("unet", net, torch.float16, torch.device("cpu"))
        assert all(tensor.is_meta for tensor in net.state_dict().values()), "a failed load left tensors behind"


def test_weights_are_not_the_file_s_memory(sd1: Model, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(sd1.file.read_bytes())
    found = load(path, "vae")
    path.write_bytes(b"\xff" * path.stat().st_size)
    expected = folder_state(sd1.folder)["vae"]
    assert_same_tensors(found, expected, "after the file was overwritten")


def test_nothing_large_is_read_unless_it_fits(sd1: Model, tmp_path: Path) -> None:
    """64 GB, sparse: a UNet's tensor of a false shape. The UNet is refused by the header, the rest is read without it."""
    header, data = split(sd1.file.read_bytes())
    shape = [4, 2**33, 1, 1]
    header[f"{UNET}input_blocks.1.0.in_layers.2.weight"]["shape"] = shape
    begin, end = header[f"{UNET}input_blocks.1.0.in_layers.2.weight"]["data_offsets"]
    for entry in header.values():  # its bytes move to the end
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    size = len(data) - (end - begin)
    header[f"{UNET}input_blocks.1.0.in_layers.2.weight"]["data_offsets"] = [size, size + 2 * 4 * 2**33]
    path = tmp_path / "sparse.safetensors"
    content = join(header, data[:begin] + data[end:])
    path.write_bytes(content)
    os.truncate(path, len(content) + 2 * 4 * 2**33)
    refusal(path, r"1 of another shape .*found \[4, 8589934592, 1, 1\]", "unet")
    expected = folder_state(sd1.folder)
    assert_same_tensors(load(path, "vae"), expected["vae"], "beside a tensor that is refused")


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ("{", "metadata fastsd: not valid JSON"),
        ("{}", "must hold an object for each of unet, vae"),
        ('{"unet": 7, "vae": {}, "text_encoder": {}, "scheduler": {}}', "must hold an object for each"),
        ('{"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": {}, "tokenizer": {"../x": ""}}', "tokenizer must hold"),
        ('{"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": {}, "tokenizer": {"vocab.json": 3}}', "tokenizer must hold"),
        ('{"unet": {"act_fn": "gelu"}, "vae": {}, "text_encoder": {}, "scheduler": {}}', "act_fn = 'gelu'"),
    ],
)  # fmt: skip
def test_stored_configs_that_are_damaged(stored: str, reason: str, sd1: Model, tmp_path: Path) -> None:
    refusal(save(tmp_path / "stored.safetensors", sd1.state, {"fastsd": stored}), reason)


def test_names_made_to_take_long(sd1: Model, tmp_path: Path) -> None:
    """Millions of dots in a name: taken apart at each, it would cost gigabytes."""
    names = [
        f"{UNET}{'input_blocks.' * 200_000}x",
        "cond_stage_model." + "." * 2_000_000,
        "model_ema." + "a." * 500_000,
    ]
    state = sd1.state | {name: torch.zeros(1) for name in names}
    message = refusal(save(tmp_path / "long.safetensors", state), "3 tensors that no Stable Diffusion")
    assert len(message) < 1000
    assert not re.search(r"input_blocks\.(input_blocks\.){20}", message), "a name is shown cut"
