"""A model in training: from a folder and back into one without losing a bit, and new ones, which other programs read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

from fastsd.errors import CheckpointError, ParameterError
from fastsd.training.model import Model, grow_unet, load_model, new_model
from tests.oracle import load_pipeline
from tests.training.builders import CPU, MAX_LENGTH, OPTIONS, differing, drawings, files, state_of


def nets(model: Model) -> dict[str, Any]:
    return {name: state_of(getattr(model, name)) for name in ("unet", "vae", "text_encoder")}


def test_a_folder_comes_back_bit_by_bit(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved", CPU)
    assert not differing(nets(again), nets(model))
    again.save(tmp_path / "again")
    assert files(tmp_path / "again", "*.*") == files(tmp_path / "saved", "*.*")
    assert len(files(tmp_path / "saved", "*.json")) == 8, (
        "the nets' configs, the scheduler's, the index and the tokenizer's"
    )


def test_a_loaded_model_is_fp32_and_not_yet_to_be_trained(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "half", torch.float16)
    half = load_model(tmp_path / "half", CPU)
    for net in (half.unet, half.vae, half.text_encoder):
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    rounded = {name: tensor.half().float() for name, tensor in state_of(model.unet).items()}
    assert not differing(state_of(half.unet), rounded)


def test_the_oracles_read_it(model: Model, tmp_path: Path) -> None:
    """Every tensor under its name and nothing beside it: they report what is missing or too much."""
    model.save(tmp_path / "saved", torch.bfloat16)
    for kind, component in (
        (diffusers.UNet2DConditionModel, "unet"),
        (diffusers.AutoencoderKL, "vae"),
        (transformers.CLIPTextModel, "text_encoder"),
    ):
        read, report = kind.from_pretrained(tmp_path / "saved" / component, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), component
        ours = {name: tensor.bfloat16().float() for name, tensor in state_of(getattr(model, component)).items()}
        theirs = {name.removeprefix("text_model."): tensor.float() for name, tensor in read.state_dict().items()}
        assert not differing({name: theirs[name] for name in ours}, ours), component
    assert load_pipeline(tmp_path / "saved").tokenizer.model_max_length == MAX_LENGTH


def test_saving_replaces_a_model_as_a_whole(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "saved"
    model.save(path)
    (path / "unet" / "stale.txt").touch()
    with torch.no_grad():
        model.unet.conv_in.bias += 1
    model.save(path)
    assert not differing(nets(load_model(path, CPU)), nets(model))
    assert not (path / "unet" / "stale.txt").exists(), "the old folder shows through"
    assert [p.name for p in path.parent.iterdir()] == ["saved"]


def test_what_cannot_be_saved_leaves_the_old_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path / "saved")
    before = files(tmp_path / "saved", "*.*")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        model.save(tmp_path / "saved")
    assert files(tmp_path / "saved", "*.*") == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"], "half a model is left over"


def test_a_model_with_a_codebook_is_refused(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    config = tmp_path / "saved" / "vae" / "config.json"
    vq = json.loads(config.read_text()) | {"_class_name": "VQModel", "num_vq_embeddings": 16, "vq_embed_dim": 4}
    config.write_text(json.dumps(vq))
    with pytest.raises(CheckpointError, match=r"vae/: has a codebook \(VQModel\)"):
        load_model(tmp_path / "saved", CPU)


def test_a_new_model_is_made_for_its_captions(new_folder: Path) -> None:
    model = load_model(new_folder, CPU)
    config, tokenizer = model.configs["text_encoder"], model.tokenizer
    size = config["vocab_size"]
    assert (size, config["max_position_embeddings"]) == (tokenizer.vocab_size, MAX_LENGTH)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (size - 2, size - 1, size - 1)
    assert [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [size - 2, size - 1, size - 1]
    assert tokenizer.max_length == MAX_LENGTH
    assert len(tokenizer.pieces("red circle")[0]) == 2


def test_the_seed_decides_the_initial_weights(new_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        torch.manual_seed(7)  # what was drawn before must not matter
        new_model(OPTIONS, drawings(200), seed, tmp_path / name)
    assert files(tmp_path / "same", "*.*") == files(new_folder, "*.*")
    weights = [
        safetensors.torch.load_file(path / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
        for path in (tmp_path / "other", new_folder)
    ]
    assert not (weights[0] == weights[1]).any()


def test_configs_that_fastsd_cannot_run_are_refused(tmp_path: Path) -> None:
    options = replace(OPTIONS, unet=OPTIONS.unet | {"addition_embed_type": "text_time"})
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        new_model(options, drawings(20), 0, tmp_path / "new")
    assert not (tmp_path / "new").exists()


EVERYWHERE = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}


def test_a_grown_unet_predicts_the_same_with_more_layers(model: Model, tmp_path: Path) -> None:
    weights, old = state_of(model.unet), model.unet
    grow_unet(model, EVERYWHERE)
    added = state_of(model.unet).keys() - weights.keys()
    assert {name.split(".attentions")[0] for name in added} == {"down_blocks.0", "up_blocks.1"}
    assert not differing({name: state_of(model.unet)[name] for name in weights}, weights)
    torch.manual_seed(0)
    x, context, times = torch.randn(2, 8, 12, 4), torch.randn(2, 5, 16), torch.tensor([3.0, 700.0])
    outs = [unet(x, unet.project_time(times), unet.project_context(context)) for unet in (old, model.unet)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "grown")
    assert load_model(tmp_path / "grown", CPU).configs["unet"]["down_block_types"] == EVERYWHERE["down_block_types"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"up_block_typs": EVERYWHERE["up_block_types"]}, r"^grow: up_block_typs: this adds no layer$"),
        (EVERYWHERE | {"block_out_channels": [8, 24]}, r"^grow: \S+ \[.*\] has no place in the new UNet"),
        (
            {"up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 2},
            r"^grow: \S+ \[.*\] has no place in the new UNet",
        ),
        (EVERYWHERE | {"attention_head_dim": 4}, r"^grow: .*attention_head_dim: with this the layers that there are"),
        ({"up_block_types": ["AttnUpBlock2D"] * 2}, r"^grow: unet/config\.json: up_block_types"),
    ],
    ids=["typo", "width", "fewer", "heads", "unknown"],
)
def test_what_is_no_growth_is_refused(model: Model, changes: dict[str, Any], complaint: str) -> None:
    old, config = model.unet, dict(model.configs["unet"])
    with pytest.raises(ParameterError, match=complaint):
        grow_unet(model, changes)
    assert model.unet is old
    assert model.configs["unet"] == config
