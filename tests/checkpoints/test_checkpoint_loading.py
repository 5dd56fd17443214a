"""Loading what is right: values, layouts, variants, shards and older names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

from fastsd.checkpoints import ModelFolder, open_folder
from fastsd.errors import CheckpointError, ParameterError
from tests.checkpoints.checkpoint_builders import (
    COMPONENTS,
    UNET,
    meta_net,
    model_on_disk,
    net_state,
    small_model_state,
)
from tests.small_model import SMALL_MODEL

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> dict[str, torch.Tensor]:
    net = meta_net()
    open_folder(folder, **options).load_weights("unet", net, dtype, CPU)
    return net.state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def build(folder: ModelFolder, component: str) -> torch.nn.Module:
    """The reference libraries' module for a component, on the meta device."""
    with torch.device("meta"):
        if component == "unet":
            return diffusers.UNet2DConditionModel.from_config(folder.unet)
        if component == "vae":
            return diffusers.AutoencoderKL.from_config(folder.vae)
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**folder.text_encoder))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_small_model_equals_its_file(component: str, dtype: torch.dtype) -> None:
    folder = open_folder(SMALL_MODEL)
    module = build(folder, component)
    folder.load_weights(component, module, dtype, CPU)
    assert_same(module.state_dict(), {name: tensor.to(dtype) for name, tensor in small_model_state(component).items()})
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.device == CPU, name
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), f"{name}: strides {parameter.stride()}"
        else:
            assert parameter.is_contiguous(), f"{name}: strides {parameter.stride()}"


def test_forward_equals_diffusers() -> None:
    folder = open_folder(SMALL_MODEL)
    ours = build(folder, "unet")
    folder.load_weights("unet", ours, torch.float32, CPU)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(SMALL_MODEL, subfolder="unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample, rtol=0, atol=1e-5)


def test_folder_carries_the_configs() -> None:
    folder = open_folder(SMALL_MODEL)
    for component, file in (("unet", "config"), ("vae", "config"), ("scheduler", "scheduler_config")):
        assert getattr(folder, component) == json.loads((SMALL_MODEL / component / f"{file}.json").read_text()), (
            component
        )
    assert (folder.tokenizer / "vocab.json").is_file()
    with pytest.raises(ParameterError, match="unet, vae, text_encoder"):
        folder.load_weights("safety_checker", meta_net(), torch.float32, CPU)


def test_tokenizer_json_alone_is_enough(model: Path) -> None:
    for file in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / file).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json or vocab\.json"):
        open_folder(model)
    (model / "tokenizer/tokenizer.json").write_text("{}")
    assert open_folder(model).tokenizer == model / "tokenizer"


# Which file is taken. Each file holds other values, so the loaded ones say where they came from.
FILES = {
    "plain": "diffusion_pytorch_model.safetensors",
    "fp16": "diffusion_pytorch_model.fp16.safetensors",
    "ema": "diffusion_pytorch_model.non_ema.safetensors",
}


@pytest.mark.parametrize(
    ("present", "variant", "taken"),
    [
        (["plain", "fp16", "ema"], None, "plain"),
        (["plain", "fp16", "ema"], "fp16", "fp16"),
        (["plain", "fp16", "ema"], "non_ema", "ema"),
        (["fp16"], None, "fp16"),  # many repositories hold nothing else
        (["fp16", "ema"], None, "several variants"),
        (["plain", "ema"], "fp16", "plain"),  # the other components have it
        (["fp16"], "bf16", "unet/ holds neither the variant 'bf16' nor plain weights.*there: fp16"),
        (["ema", "fp16"], "bf16", "unet/ holds neither .*there: fp16, non_ema"),
        ([], None, "no usable weights"),
    ],
)
def test_variants(model: Path, present: list[str], variant: str | None, taken: str) -> None:
    (model / UNET).unlink()
    for seed, (kind, name) in enumerate(FILES.items()):
        if kind in present:
            safetensors.torch.save_file(net_state(seed), model / "unet" / name)
        for other in ("vae/diffusion_pytorch_model", "text_encoder/model"):
            if variant:
                safetensors.torch.save_file(net_state(), model / f"{other}.{variant}.safetensors")
    if taken in FILES:
        assert_same(load(model, variant=variant), net_state(list(FILES).index(taken)))
    else:
        with pytest.raises(CheckpointError, match=taken):
            open_folder(model, variant=variant)


def test_a_component_without_the_variant_is_read_from_its_plain_file(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    safetensors.torch.save_file(net_state(7), model / "vae/diffusion_pytorch_model.fp16.safetensors")
    folder = open_folder(model, variant="fp16")
    assert [record.getMessage() for record in caplog.records] == [
        "unet/ holds no variant 'fp16'; diffusion_pytorch_model.safetensors is read",
        "text_encoder/ holds no variant 'fp16'; model.safetensors is read",
    ]
    for component, seed in (("unet", 0), ("vae", 7), ("text_encoder", 0)):
        net = meta_net()
        folder.load_weights(component, net, torch.float32, CPU)
        assert_same(net.state_dict(), net_state(seed))


def test_a_variant_that_no_component_has_is_an_error(model: Path) -> None:
    """Not silently another model than was asked for."""
    safetensors.torch.save_file(net_state(), model / "unet" / FILES["ema"])
    with pytest.raises(CheckpointError, match="no component holds the variant 'fp16'; variants there: non_ema, plain"):
        open_folder(model, variant="fp16")


def test_a_pickle_of_the_variant_does_not_hide_the_plain_file(model: Path) -> None:
    for other in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        safetensors.torch.save_file(net_state(), model / f"{other}.fp16.safetensors")
    torch.save(net_state(5), model / "unet/diffusion_pytorch_model.fp16.bin")
    assert_same(load(model, variant="fp16"), net_state(0))
    assert_same(load(model, variant="fp16", allow_pickle=True), net_state(5))
    (model / UNET).unlink()
    with pytest.raises(CheckpointError, match=r"fp16\.bin is a pickle"):
        open_folder(model, variant="fp16")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def shard(
    folder: Path, pattern: str = "diffusion_pytorch_model-0000{}-of-00002.safetensors", index: str = INDEX
) -> Path:
    """Spread the UNet's tensors over two files; returns the index."""
    (folder / UNET).unlink()
    state, weight_map = net_state(), {}
    for number in (1, 2):
        part = {name: state[name] for i, name in enumerate(state) if i % 2 == number - 1}
        safetensors.torch.save_file(part, folder / "unet" / pattern.format(number))
        weight_map |= dict.fromkeys(part, pattern.format(number))
    path = folder / "unet" / index
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_shards(model: Path) -> None:
    shard(model)
    assert_same(load(model), net_state())


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        # diffusers changed the order, and transformers the index's name, in the course of time
        (
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        (
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
            "diffusion_pytorch_model.fp16.safetensors.index.json",
        ),
    ],
)
def test_shards_of_a_variant(model: Path, pattern: str, index: str) -> None:
    shard(model, pattern, index)
    assert_same(load(model), net_state())


def test_shards_written_by_diffusers(tmp_path: Path) -> None:
    model = model_on_disk(tmp_path / "model")
    (model / UNET).unlink()
    net = diffusers.UNet2DConditionModel.from_pretrained(SMALL_MODEL, subfolder="unet")
    net.save_pretrained(model / "unet", max_shard_size="4MB", variant="fp16")
    assert len(list((model / "unet").glob("*-of-*"))) > 1
    folder = open_folder(model)
    loaded = build(folder, "unet")
    folder.load_weights("unet", loaded, torch.float32, CPU)
    assert_same(loaded.state_dict(), net.float().state_dict())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: {k: "../" + v for k, v in m.items()}, "leaves the folder"),
        (lambda m: {k: "/tmp/" + v for k, v in m.items()}, "leaves the folder"),
        (lambda m: {k: "..\\" + v for k, v in m.items()}, "leaves the folder"),
        (lambda m: dict.fromkeys(m, 7), "no plain file name"),
        (lambda m: {k: v.replace("00002-of", "00003-of") for k, v in m.items()}, "1 of 2 shards missing.*00003-of"),
        (lambda m: {**m, "ghost": next(iter(m.values()))}, "disagree on 1 tensors .*ghost"),
        (lambda m: dict(list(m.items())[1:]), "disagree on 1 tensors"),
        (lambda m: {}, "no weight_map"),
        (lambda m: [1], "no weight_map"),
        (lambda m: {str(i): "a.safetensors" for i in range(20_001)}, "no weight_map of 1 to 20,000"),
    ],
)
def test_bad_index(model: Path, change: object, reason: str) -> None:
    index = shard(model)
    good = index.read_text()
    index.write_text(json.dumps({"weight_map": change(json.loads(good)["weight_map"])}))
    with pytest.raises(CheckpointError, match=f"index.*{reason}"):
        load(model)
    index.write_text(good)
    assert_same(load(model), net_state())


def test_tensor_in_two_shards(model: Path) -> None:
    index = shard(model)
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    extra = safetensors.torch.load_file(model / "unet" / first) | safetensors.torch.load_file(model / "unet" / second)
    safetensors.torch.save_file(extra, model / "unet" / second)
    with pytest.raises(CheckpointError, match="disagree on 3 tensors"):
        load(model)


# Older names


def test_clip_with_prefix_and_position_ids(model: Path) -> None:
    state = small_model_state("text_encoder")
    old = {f"text_model.{name}": tensor for name, tensor in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(old, model / "text_encoder/model.safetensors")
    folder = open_folder(model)
    module = build(folder, "text_encoder")
    folder.load_weights("text_encoder", module, torch.float32, CPU)
    assert_same(module.state_dict(), {name: tensor.float() for name, tensor in state.items()})


def test_clip_key_with_and_without_prefix(model: Path) -> None:
    state = small_model_state("text_encoder")
    twice = state | {"text_model.final_layer_norm.bias": state["final_layer_norm.bias"] + 1}
    safetensors.torch.save_file(twice, model / "text_encoder/model.safetensors")
    folder = open_folder(model)
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias is a duplicate of"):
        folder.load_weights("text_encoder", build(folder, "text_encoder"), torch.float32, CPU)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_vae_attention(model: Path, as_convolution: bool) -> None:
    def old_name(name: str) -> str:
        return re.sub(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.", lambda m: f"{m[1]}{OLD_NAMES[m[2]]}.", name)

    state = small_model_state("vae")
    old = {old_name(name): tensor for name, tensor in state.items()}
    assert sum(name not in state for name in old) == 16, "two attention blocks of four layers, weight and bias"
    if as_convolution:
        old = {n: t[:, :, None, None] if n not in state and t.ndim == 2 else t for n, t in old.items()}
    safetensors.torch.save_file(
        {n: t.contiguous() for n, t in old.items()}, model / "vae/diffusion_pytorch_model.safetensors"
    )
    folder = open_folder(model)
    module = build(folder, "vae")
    folder.load_weights("vae", module, torch.float32, CPU)
    assert_same(module.state_dict(), {name: tensor.float() for name, tensor in state.items()})


def test_runtime_does_not_import_the_oracles() -> None:
    names = ("diffusers", "transformers", "huggingface_hub")
    code = f"import sys, fastsd.checkpoints; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "huggingface_hub too is imported only when the hub is asked"
