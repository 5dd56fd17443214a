"""Single files (LDM keys): the tensors that diffusers' loader finds, the picture of the folder, and what is refused."""

import json
import pickle
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastsd
from fastsd.checkpoints import ldm_config, ldm_keys, open_model, open_single_file
from fastsd.checkpoints.single_file import CLIP_VOCABULARY
from fastsd.config import SD15, SD21, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.tokenizer import Tokenizer
from tests.checkpoints.checkpoint_builders import COMPONENTS
from tests.checkpoints.single_files import (
    Model,
    assert_same_tensors,
    by_diffusers,
    folder_state,
    load,
    refusal,
    save,
)
from tests.oracle import assert_equal

DRAWING = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "np"}


@pytest.fixture(params=["sd1", "sd2"])
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a single file asked for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


# What is right


def test_diffusers_finds_the_same_tensors(model: Model) -> None:
    theirs = by_diffusers(model.state, model.style)
    for component, expected in folder_state(model.folder).items():
        assert_same_tensors(theirs[component], expected, f"diffusers' {component}")
        assert_same_tensors(load(model.file, component), expected, component)


def test_the_picture_is_the_folder_s_without_a_network(model: Model, offline: None) -> None:
    options = {"device": "cpu", "dtype": "float32", "backend": "reference"}
    folder = fastsd.Pipeline.from_pretrained(model.folder, **options)
    file = fastsd.Pipeline.from_single_file(model.file, **options)
    assert file.config == folder.config
    assert file.tokenizer == folder.tokenizer
    assert file.noise_schedule.prediction_type == folder.noise_schedule.prediction_type
    assert file.name == model.style, "the name that goes into metadata is the file's, without path and suffix"
    ours, theirs = (pipe.generate("a cat, 1girl!", **DRAWING).images for pipe in (file, folder))
    assert ours.std() > 0.01, "an empty picture compares nothing"
    assert_equal(ours.tobytes(), theirs.tobytes(), "the picture")


def meta_state(config: ModelConfig, open_clip: bool) -> dict[str, Tensor]:
    """A model of full size in LDM keys, on the meta device."""
    with torch.device("meta"):
        modules = {"unet": UNet(config.unet), "vae": VAE(config.vae), "text_encoder": CLIPText(config.text_encoder)}
    state = {}
    for component, table in ldm_keys.tables(config, open_clip).items():
        back = ldm_keys.inverse(table)
        for name, tensor in modules[component].state_dict().items():
            state[ldm_keys.renamed(name, back)] = tensor
    return ldm_keys.pack(state)


@pytest.mark.parametrize(("config", "open_clip"), [(SD15, False), (SD21, True)], ids=["sd15", "sd21"])
def test_the_published_models_are_recognised_by_their_shapes(config: ModelConfig, open_clip: bool) -> None:
    state = meta_state(config, open_clip)
    if open_clip:  # as published: 24 layers, of which the last is not used
        for name in [name for name in state if ".resblocks.22." in name]:
            state[name.replace(".22.", ".23.")] = state[name]
    shapes = ldm_config.Shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, "x")
    found = ldm_config.configs(shapes)
    assert ModelConfig.from_json(found["text_encoder"], found["unet"], found["vae"]) == config
    assert found["scheduler"]["prediction_type"] == ("v_prediction" if open_clip else "epsilon")
    # names that stand in the published files
    prefix = "model.diffusion_model."
    expected = {
        f"{prefix}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{prefix}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{prefix}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{prefix}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "first_stage_model.decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    }
    expected |= (
        {
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.positional_embedding": (77, 1024),
        }
        if open_clip
        else {"cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768)}
    )
    for name, shape in expected.items():
        assert tuple(state[name].shape) == shape, f"{name} has the shape {tuple(state[name].shape)}"
    count = 686 + 248 + (292 if open_clip else 196)
    assert len(state) == count, f"{len(state)} tensors, the published file has {count} that matter"


@pytest.mark.parametrize(
    ("unet", "vae"),
    [
        (UNetConfig(block_out_channels=(32,), layers_per_block=(1,), down_attention=(True,), up_attention=(True,),
                    num_attention_heads=(8,), transformer_layers_per_block=(1,), cross_attention_dim=64),
         VAEConfig(block_out_channels=(32,), layers_per_block=1, down_attention=(False,), up_attention=(False,))),
        (UNetConfig(block_out_channels=(32, 64, 96), layers_per_block=(1, 3, 2), down_attention=(False, True, True),
                    up_attention=(True, True, False), num_attention_heads=(8, 8, 8), cross_attention_dim=64,
                    transformer_layers_per_block=(1, 2, 3)),
         VAEConfig(block_out_channels=(32, 64), layers_per_block=3, down_attention=(False, True),
                   up_attention=(True, False), latent_channels=4, use_quant_conv=False)),
    ],
    ids=["one level", "uneven levels"],
)  # fmt: skip
def test_other_sizes_are_recognised_by_their_shapes(unet: UNetConfig, vae: VAEConfig) -> None:
    text = CLIPConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    config = ModelConfig(text, unet, vae)
    state = meta_state(config, open_clip=False)
    found = ldm_config.configs(ldm_config.Shapes({name: tuple(x.shape) for name, x in state.items()}, "x"))
    assert ModelConfig.from_json(found["text_encoder"], found["unet"], found["vae"]) == config


def test_averaged_weights(sd1: Model, tmp_path: Path) -> None:
    names = [name for name in sd1.state if name.startswith("model.diffusion_model.")]
    averaged = {"model_ema." + name[len("model.") :].replace(".", ""): sd1.state[name] + 1 for name in names}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    path = save(tmp_path / "ema.safetensors", sd1.state | averaged | counters)
    expected = folder_state(sd1.folder)["unet"]
    assert_same_tensors(load(path, "unet"), expected, "without use_ema")
    raised = {name: tensor + 1 for name, tensor in expected.items()}
    assert_same_tensors(load(path, "unet", use_ema=True), raised, "with use_ema")
    refusal(sd1.file, r"use_ema: 684 of 684 averaged tensors are not in the file.*use_ema=False", use_ema=True)
    averaged.popitem()
    refusal(save(path, sd1.state | averaged), "use_ema: 1 of 684", use_ema=True)


STRAY = {
    "sd1": {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.ones(1000),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
        "posterior_mean_coef2": torch.ones(1000),
        "logvar": torch.zeros(1000),
        "model_ema.num_updates": torch.tensor(3),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2, 2),
        "global_step": torch.tensor(470000),
    },
    "sd2": {
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": torch.ones(192, 64),
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.ones(64),
        "cond_stage_model.model.text_projection": torch.ones(64, 64),
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        "alphas_cumprod_prev": torch.ones(1000),
    },
}


def test_what_is_of_no_use_is_left_out(model: Model, tmp_path: Path) -> None:
    path = save(tmp_path / "stray.safetensors", model.state | STRAY[model.style])
    for component, expected in folder_state(model.folder).items():
        assert_same_tensors(load(path, component), expected, component)


def test_text_encoder_without_text_model(sd1: Model, tmp_path: Path) -> None:
    state = {name.replace(".text_model.", "."): tensor for name, tensor in sd1.state.items()}
    expected = folder_state(sd1.folder)["text_encoder"]
    found = load(save(tmp_path / "early.safetensors", state), "text_encoder")
    assert_same_tensors(found, expected, "early names")
    twice = sd1.state | {"cond_stage_model.transformer.final_layer_norm.bias": torch.zeros(64)}
    refusal(save(tmp_path / "twice.safetensors", twice), r"is a duplicate of another \(final_layer_norm\.bias\)")


def predicted(path: Path, **options: object) -> tuple[str, int, int]:
    """What the UNet predicts, and its size and the VAE's."""
    source = open_single_file(path, **options)
    return source.scheduler["prediction_type"], source.unet["sample_size"], source.vae["sample_size"]


def test_what_an_sd2_file_predicts(sd2: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert predicted(sd2.file) == ("v_prediction", 96, 768)
    assert "does not say what its UNet predicts; taken for v_prediction at 768 pixels" in caplog.text
    base = save(tmp_path / "base.safetensors", sd2.state | {"global_step": torch.tensor(875_000)})
    assert predicted(base) == ("epsilon", 64, 512)
    assert predicted(base, prediction_type="v_prediction") == ("v_prediction", 96, 768)
    assert predicted(sd2.file, prediction_type="epsilon") == ("epsilon", 64, 512)
    assert open_model(sd2.folder, prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"


def test_what_an_sd1_file_predicts(sd1: Model, caplog: pytest.LogCaptureFixture) -> None:
    assert predicted(sd1.file) == ("epsilon", 64, 512)
    assert predicted(sd1.file, prediction_type="v_prediction") == ("v_prediction", 64, 512)
    assert not caplog.text, "SD 1.x leaves nothing to guess"


def test_options_that_do_not_fit(sd1: Model) -> None:
    with pytest.raises(ParameterError, match="prediction_type: 'v' is unknown; choose one of epsilon, v_prediction"):
        open_model(sd1.file, prediction_type="v")
    with pytest.raises(ParameterError, match="use_ema: is for single files"):
        open_model(sd1.folder, use_ema=True)
    with pytest.raises(ParameterError, match="variant: is for folders"):
        open_model(sd1.file, variant="fp16")
    for path in ("nowhere.safetensors", "no\0where", "x" * 5000, "", sd1.folder, 7):
        with pytest.raises(CheckpointError, match="no such file"):
            fastsd.Pipeline.from_single_file(path)
    with pytest.raises(ParameterError, match="component must be one of unet, vae, text_encoder"):
        open_single_file(sd1.file).load_weights("lora", nn.Identity(), torch.float32, torch.device("cpu"))


# The tokenizer

TEXTS = (
    "a photo of an astronaut riding a horse on mars",
    "  HELLO,   world!!  it's 2024 ",
    "naïve café, 日本語, 🦊🦊 <|endoftext|> x",
    "",
    "word " * 200,
)


@pytest.mark.parametrize(("style", "padding"), [("sd1", 49407), ("sd2", 0)])
def test_tokens_are_transformers_own(style: str, padding: int, request: pytest.FixtureRequest) -> None:
    source = open_single_file(request.getfixturevalue(style).file)
    ours = Tokenizer.from_folder(source.tokenizer)
    theirs = transformers.CLIPTokenizer.from_pretrained(source.tokenizer)
    expected = theirs(list(TEXTS), padding="max_length", max_length=77, truncation=True).input_ids
    found = ours.encode(TEXTS).ids
    for text, row, wanted in zip(TEXTS, found, expected, strict=True):
        assert_equal(row, wanted, f"{text!r}: {row[:12]}, transformers {wanted[:12]}")
    assert (ours.start_id, ours.end_id, ours.pad_id, ours.vocab_size) == (49406, 49407, padding, 49408)
    assert found[3] == [49406, 49407] + [padding] * 75


def test_the_vocabulary_is_clip_s() -> None:
    ids = Tokenizer.from_folder(CLIP_VOCABULARY).encode(["a photo of a cat"]).ids[0][:8]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, 49407], "these ids are the same in every copy of CLIP"
    vocab = json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    merges = (CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    assert len(merges) == 48_894
    assert sorted(vocab, key=vocab.__getitem__)[512:-2] == [merge.replace(" ", "") for merge in merges]
    assert "OpenAI" in (CLIP_VOCABULARY / "LICENSE").read_text(), "the licence asks for its notice"


def test_the_unpacked_tokenizer_is_removed(sd2: Model) -> None:
    source = open_single_file(sd2.file)
    folder = source.tokenizer
    assert (folder / "vocab.json").is_file()
    del source
    assert not folder.exists(), f"{folder} was left behind"


# Pickles


def test_pickles_only_on_demand(sd1: Model, tmp_path: Path) -> None:
    expected = folder_state(sd1.folder)
    for name in ("model.ckpt", "model.safetensors"):  # whatever it is called
        torch.save({"state_dict": sd1.state, "global_step": 5, "optimizer_states": [{"lr": 1e-4}]}, tmp_path / name)
        refusal(tmp_path / name, r"is a pickle, which can carry code: .*allow_pickle=True")
        for component in COMPONENTS if name.endswith(".ckpt") else ("vae",):
            state = load(tmp_path / name, component, allow_pickle=True)
            assert_same_tensors(state, expected[component], f"{name} {component}")
    torch.save(sd1.state, tmp_path / "flat.pt", _use_new_zipfile_serialization=False)
    assert_same_tensors(load(tmp_path / "flat.pt", "vae", allow_pickle=True), expected["vae"], "flat")


def test_global_step_of_a_pickle(sd2: Model, tmp_path: Path) -> None:
    torch.save({"state_dict": sd2.state, "global_step": 875_000}, tmp_path / "base.ckpt")
    assert predicted(tmp_path / "base.ckpt", allow_pickle=True) == ("epsilon", 64, 512)


def test_a_training_checkpoint_of_lightning(sd1: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Stable Diffusion checkpoints hold a class of PyTorch Lightning's as a key; it is neither needed nor run."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        content = {"state_dict": sd1.state, "callbacks": {module.ModelCheckpoint: {"best": 1.0}}}
        torch.save(content, tmp_path / "lightning.ckpt")
    expected = folder_state(sd1.folder)["vae"]
    found = load(tmp_path / "lightning.ckpt", "vae", allow_pickle=True)
    assert_same_tensors(found, expected, "a training checkpoint")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


@pytest.mark.parametrize(
    "content", [Evil(), {"state_dict": Evil()}, {"state_dict": {"a": Evil()}}, {"state_dict": [1]}, 7]
)
def test_pickles_that_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "evil.ckpt", pickle_module=pickle)
    refusal(tmp_path / "evil.ckpt", "asks for|holds no mapping", allow_pickle=True)
