"""A trained LoRA: its file draws the same picture in fastsd and in diffusers as the nets it was trained in; the base stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fastsd
from fastsd.errors import ParameterError
from fastsd.training.claims import Captions
from fastsd.training.diffusion import CaptionedLatents, DiffusionLoss, DiffusionTask
from fastsd.training.loop import FitOptions, fit
from fastsd.training.lora import LowRank, add_lora, save_lora
from fastsd.training.model import Model, load_model
from tests.measured import measured
from tests.oracle import assert_same_picture, load_pipeline
from tests.tolerances import NET
from tests.training.builders import CPU, differing, drawings, state_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_in", "downsamplers.0.conv", "upsamplers.0.conv", "conv_shortcut", "proj_in")
TEXT = ("q_proj", "v_proj", "out_proj", "fc1", "fc2")


def predicted(model: Model) -> Tensor:
    """What the nets say of a fixed noise and prompt."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 16, 4, generator=generator)
    context = model.text_encoder(torch.tensor(model.tokenizer.encode(["a red circle", "two green hearts"]).ids))
    time = model.unet.project_time(torch.tensor([600.0, 40.0]))
    return model.unet(noisy, time, model.unet.project_context(context)).detach()


def all_updates(model: Model, rank: int = 3, alpha: float = 6.0) -> dict[str, LowRank]:
    torch.manual_seed(0)
    updates = add_lora(model.unet, "unet", LINEAR + CONVOLUTIONS, rank, alpha)
    return updates | add_lora(model.text_encoder, "text_encoder", TEXT, rank, alpha)


def train(model: Model, folder: Path, steps: int = 4) -> None:
    """A few steps, so large that the picture becomes another."""
    latents = np.random.default_rng(0).normal(size=(12, 16, 16, 4)).astype(np.float16)
    source = CaptionedLatents(latents, Captions(drawings(), model.tokenizer, {}))
    task = DiffusionTask(model.unet, model.text_encoder, model.schedule, DiffusionLoss())
    options = FitOptions(steps=steps, batch_size=2, learning_rate=0.05, warmup_steps=0, ema_decay=0.5)
    fit(task, source, options, folder)


def test_before_training_the_output_is_unchanged(model: Model) -> None:
    before = predicted(model)
    all_updates(model)
    assert torch.equal(predicted(model), before)


def test_only_the_updates_are_trained(trained_folder: Path, tmp_path: Path) -> None:
    """The base's weights keep their bits, and so do those of layers that no ending names."""
    model = load_model(trained_folder, CPU)
    before = {name: state_of(net) for name, net in (("unet", model.unet), ("text_encoder", model.text_encoder))}
    updates = add_lora(model.unet, "unet", ("to_q", "conv1"), 2, 2.0)
    train(model, tmp_path)
    for component, net in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        after = {
            name.replace("parametrizations.weight.original", "weight"): tensor
            for name, tensor in state_of(net).items()
            if not name.endswith((".up", ".down"))
        }
        assert not differing(after, before[component]), component
    assert all(update.up.any() for update in updates.values()), "some updates were not trained"
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"]
    assert len(trained) == 2 * len(updates), f"other weights were trained: {sorted(trained)[:3]}"


def test_an_update_is_the_product_of_its_factors() -> None:
    """W + alpha / rank · up · down, of a convolution as of a layer with as many inputs as its kernel sees."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 7), (5, 4, 3, 3)):
        weight = torch.randn(shape, generator=generator)
        update = LowRank(weight, rank=2, alpha=3.0)
        assert torch.equal(update(weight), weight)
        with torch.no_grad():
            update.up.copy_(torch.randn(update.up.shape, generator=generator))
        wanted = weight + 1.5 * torch.einsum("or,ri->oi", update.up, update.down).reshape(shape)
        torch.testing.assert_close(update(weight), wanted)


@pytest.fixture(scope="module")
def trained(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A LoRA of every kind of layer: its file, and the parametrized model, written with its updates as its weights."""
    folder = tmp_path_factory.mktemp("lora")
    model = load_model(trained_folder, CPU)
    updates = all_updates(model)
    train(model, folder)
    save_lora(folder / "lora.safetensors", updates, torch.float32)
    torch.save(predicted(model), folder / "predicted.pt")
    for net in (model.unet, model.text_encoder):
        for module in list(net.modules()):
            if torch.nn.utils.parametrize.is_parametrized(module):
                torch.nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.save(folder / "merged")
    assert torch.equal(predicted(load_model(folder / "merged", CPU)), torch.load(folder / "predicted.pt"))
    return trained_folder, {"file": folder / "lora.safetensors", "merged": folder / "merged"}


ASKED: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}


def ours(pipe: fastsd.Pipeline) -> np.ndarray:
    return np.asarray(pipe.generate("a large red circle", latents=noise(), sampler="ddim", **ASKED).images[0])


def noise() -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))


def pipeline(path: Path) -> fastsd.Pipeline:
    return fastsd.Pipeline(path, device="cpu", backend="reference")


def test_fastsd_draws_with_the_file_what_the_trained_nets_draw(trained: tuple[Path, dict[str, Path]]) -> None:
    base, made = trained
    wanted, pipe = ours(pipeline(made["merged"])), pipeline(base)
    before, bits = ours(pipe), {"unet": state_of(pipe.unet), "text_encoder": state_of(pipe.text_encoder)}
    assert np.abs(before - wanted).max() > 0.05, "the LoRA changes next to nothing"
    pipe.load_lora_weights(made["file"])
    assert_same_picture(ours(pipe), wanted, "the file against the nets that it was trained in")
    pipe.unload_lora_weights()
    measured(
        "values differ",
        len(differing({"unet": state_of(pipe.unet), "text_encoder": state_of(pipe.text_encoder)}, bits)),
        0,
    )
    assert not differing({"unet": state_of(pipe.unet), "text_encoder": state_of(pipe.text_encoder)}, bits)
    assert np.array_equal(ours(pipe), before), "taken off again, it leaves traces"


def test_diffusers_draws_with_the_file_what_the_trained_nets_draw(trained: tuple[Path, dict[str, Path]]) -> None:
    base, made = trained
    theirs = load_pipeline(base)
    theirs.load_lora_weights(made["file"].parent, weight_name=made["file"].name)
    picture = theirs("a large red circle", latents=noise(), **ASKED).images[0]
    assert_same_picture(picture, ours(pipeline(made["merged"])), "diffusers with the file against the trained nets")


def test_diffusers_nets_with_the_file_predict_the_same(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    """Tighter than a picture: one call of the nets, on what is drawn after the text encoder."""
    base, made = trained
    theirs = load_pipeline(base)
    theirs.load_lora_weights(made["file"].parent, weight_name=made["file"].name)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 16, 4, generator=generator).permute(0, 3, 1, 2)
    ids = torch.tensor(model.tokenizer.encode(["a red circle", "two green hearts"]).ids)
    with torch.no_grad():
        found = theirs.unet(noisy, torch.tensor([600, 40]), theirs.text_encoder(ids)[0]).sample.permute(0, 2, 3, 1)
    wanted = torch.load(made["file"].with_name("predicted.pt"))
    error = ((found - wanted).norm() / wanted.norm()).item()
    measured("relative error", error, NET)
    assert error <= NET, f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_file_is_in_the_dtype_that_was_asked_for(dtype: torch.dtype, model: Model, tmp_path: Path) -> None:
    updates = add_lora(model.unet, "unet", ("to_q", "conv_in"), 2, 5.0)
    save_lora(tmp_path / "lora.safetensors", updates, dtype)
    state = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    name = "lora_unet_conv_in"
    assert state[f"{name}.lora_down.weight"].shape == (2, 4, 3, 3)
    assert state[f"{name}.lora_up.weight"].shape == (8, 2, 1, 1)
    assert state[f"{name}.alpha"] == 5
    found = {key.split(".")[0] for key in state}
    assert found == set(updates)
    assert len(found) == 1 + 8, "a query in each of two attentions of four transformers"
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"], "something else was left behind"
    (tmp_path / "other").touch()
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("component", "ending", "message"),
    [
        ("unet", "to_z", "layers: no layer of the unet is named to_z; e.g. conv_in"),
        (
            "unet",
            "o_q",
            "layers: no layer of the unet is named o_q; e.g. conv_in",
        ),  # an ending of a word is none of a name
        ("unet", "norm1", "layers: no layer of the unet is named norm1; e.g. conv_in"),
        ("text_encoder", "to_q", "text_layers: no layer of the text_encoder is named to_q; e.g. encoder.layers.0"),
    ],
)
def test_endings_that_no_layer_has_are_refused(component: str, ending: str, message: str, model: Model) -> None:
    with pytest.raises(ParameterError) as caught:
        add_lora(getattr(model, component), component, (ending,), 2, 2.0)
    assert str(caught.value).startswith(message)


def test_a_whole_name_is_an_ending_too(model: Model) -> None:
    found = add_lora(model.unet, "unet", ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",), 2, 2.0)
    assert list(found) == ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"]
