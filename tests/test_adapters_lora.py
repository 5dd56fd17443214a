"""LoRAs merged into the weights, against diffusers' and PEFT's own merging of the same files, and taken off again."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.adapters import LoraAdapters, SwapLock
from fastsd.adapters.deltas import Delta, tucker
from fastsd.adapters.lora_keys import layer_shapes, ldm_names
from fastsd.adapters.lora_layers import MAX_SCALE
from fastsd.config import SD15
from fastsd.errors import NumericsError, OutOfMemoryError, ParameterError
from fastsd.models.unet import UNet
from tests import oracle
from tests.adapter_builders import (
    CONVS,
    LINEAR,
    adapters,
    factors,
    fused,
    kohya,
    kohya_lora,
    largest_difference,
    layers,
    nets,
    save,
    save_small_model,
    weights,
)
from tests.measured import measured
from tests.tolerances import LORA_PICTURE, LORA_WEIGHT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("sd2"), "sd2")


@pytest.fixture
def ours(sd1: Path) -> fastsd.Pipeline:
    return fastsd.Pipeline(sd1, device="cpu", backend="reference")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor], when: str) -> None:
    changed = [name for name in wanted if not torch.equal(bits(found[name]), bits(wanted[name]))]
    measured("values differ", len(changed), 0)
    assert not changed, f"{when}: {len(changed)} weights have other bits, e.g. {changed[:3]}"


def assert_merged(found: dict[str, Tensor], truth: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert largest_difference(before, truth)[0] > 0.1, "the oracle's LoRA changes next to nothing"
    error, name = largest_difference(found, truth)
    measured("relative L2", error, LORA_WEIGHT)
    assert error <= LORA_WEIGHT, f"{name}: relative error {error:.1e} against the oracle"


@pytest.mark.parametrize("style", ["sd1", "sd2"])
def test_kohya_files_are_merged_as_by_diffusers(style: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two at once, in linear layers and convolutions of the UNet and the text encoder, SD 1 and SD 2; then the picture."""
    model = request.getfixturevalue(style)
    ours, theirs = fastsd.Pipeline(model, device="cpu", backend="reference"), oracle.load_pipeline(model)
    before = weights(ours)
    # one alpha for all: diffusers 0.42.1 takes no heed of kohya's alphas where they differ between layers
    one = save(kohya_lora(ours, alpha=lambda index: 2.0), tmp_path / "one.safetensors")
    two = save(kohya_lora(ours, LINEAR, rank=7, alpha=None, seed=1), tmp_path / "two.safetensors")
    loras = adapters(ours)
    for path, name in ((one, "one"), (two, "two")):
        theirs.load_lora_weights(str(path), adapter_name=name)
        assert loras.load_lora_weights(path, name) == name
        assert loras.get_active_adapters() == theirs.get_active_adapters(), "another idea of what loading activates"
    assert loras.get_list_adapters() == theirs.get_list_adapters()

    loras.set_adapters(["one", "two"], [0.7, {"unet": -0.4, "text_encoder": 0.25}])
    merged = fused(theirs, ["one", "two"], [0.7, {"unet": -0.4, "text_encoder": 0.25}])
    assert_merged(weights(ours), merged, before)

    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "latents": latents,
        "output_type": "latent",
    }
    picture = ours.generate("a red circle", sampler="ddim", **call).images
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    error = oracle.relative_l2(picture, theirs("a red circle", **call).images)
    assert error <= LORA_PICTURE, f"latents differ by {error:.1e} from diffusers' with the same LoRAs"

    loras.unload_lora_weights()
    assert_same_bits(weights(ours), before, "unloaded")
    assert loras.get_list_adapters() == {}


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_diffusers_trainers(ours: fastsd.Pipeline, sd1: Path, tmp_path: Path, rslora: bool) -> None:
    """Saved by diffusers with PEFT's settings in the header: alphas that differ from the rank, and between layers."""
    theirs = oracle.load_pipeline(sd1)
    before = weights(ours)
    pattern = {} if rslora else {"alpha_pattern": {"attn2.to_k": 3, "mid_block.attentions.0.proj_in": 5}}
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_rslora": rslora}
    torch.manual_seed(0)
    theirs.unet.add_adapter(
        peft.LoraConfig(target_modules=["to_q", "to_k", "to_out.0", "proj_in", "conv1"], **pattern, **settings), "x"
    )
    theirs.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "fc2"], **settings), "x")
    theirs.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet, adapter_name="x"),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(theirs.text_encoder, adapter_name="x"),
        unet_lora_adapter_metadata=theirs.unet.peft_config["x"].to_dict(),
        text_encoder_lora_adapter_metadata=theirs.text_encoder.peft_config["x"].to_dict(),
    )
    loras = adapters(ours)
    assert loras.load_lora_weights(tmp_path) == "default_0"
    assert_merged(weights(ours), fused(theirs, ["x"], [1.0]), before)


OLD_NAMES: dict[str, Callable[[str, str], tuple[str, str, str]]] = {
    "PEFT": lambda component, module: (f"{component}.{module}", ".lora_A", ".lora_B"),
    "PEFT with an adapter's name": lambda component, module: (f"{component}.{module}", ".lora_A.mine", ".lora_B.mine"),
    "transformers' text_model": lambda component, module: (
        f"text_encoder.text_model.{module}" if component == "text_encoder" else f"unet.{module}",
        ".lora_linear_layer.down",
        ".lora_linear_layer.up",
    ),
    "attention processors": lambda component, module: (
        f"text_encoder.text_model.{module.replace('_proj', '').replace('self_attn.', 'self_attn.to_')}"
        if component == "text_encoder"
        else "unet." + module.replace(".to_", ".processor.to_").removesuffix(".0"),
        "_lora.down",
        "_lora.up",
    ),
    "attention processors of the UNet alone": lambda component, module: (
        f"text_model.{module}"
        if component == "text_encoder"
        else module.replace(".to_", ".processor.to_").removesuffix(".0"),
        "_lora.down" if component == "unet" else ".lora.down",
        "_lora.up" if component == "unet" else ".lora.up",
    ),
}


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_every_way_to_name_a_layer_means_the_same(ours: fastsd.Pipeline, tmp_path: Path, kind: str) -> None:
    attention = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    state = kohya_lora(ours, attention, alpha=None)
    renamed = {}
    for component, module, _ in layers(ours, attention):
        name, down, up = OLD_NAMES[kind](component, module)
        renamed[f"{name}{down}.weight"] = state[f"{kohya(component, module)}.lora_down.weight"]
        renamed[f"{name}{up}.weight"] = state[f"{kohya(component, module)}.lora_up.weight"]
    loras = adapters(ours)
    loras.load_lora_weights(save(state, tmp_path / "kohya.safetensors"), "kohya")
    wanted = weights(ours)
    loras.load_lora_weights(save(renamed, tmp_path / "renamed.safetensors"), "renamed")
    assert loras.get_active_adapters() == ["renamed"]
    assert_same_bits(weights(ours), wanted, f"named as {kind}")


def test_original_names_are_those_that_diffusers_maps() -> None:
    """Every layer of SD 1's UNet: its name in the original code leads diffusers back to the layer."""
    with torch.device("meta"):
        unet = [name for _, name in layer_shapes({"unet": UNet(SD15.unet)})]
    found = ldm_names(unet, SD15.unet)
    assert found.keys() == set(unet), f"without an original name: {sorted(set(unet) - found.keys())[:5]}"
    assert len(set(found.values())) == len(unet), "two layers share an original name"
    # diffusers takes this one for an attention, and has no rule for the first and last layers of SD 1
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    ends = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_2": "time_embed.2"}
    assert {name: found[name] for name in ends} == ends
    config = diffusers.configuration_utils.FrozenDict(layers_per_block=2)
    for name in set(unet) - {*ends, "time_embedding.linear_1", "up_blocks.0.upsamplers.0.conv"}:
        key = f"lora_unet_{found[name].replace('.', '_')}.lora_down.weight"
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers({key: 0}, config)
        back = _convert_unet_lora_key(mapped).replace(".processor", "").replace("_lora", ".lora")
        back = back.removesuffix(".lora.down.weight")
        assert back in (name, name.removesuffix(".0")), f"{name} is called {key}, which diffusers takes for {back}"


def test_files_with_original_names(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    found = ldm_names([name for component, name in layer_shapes(nets(ours)) if component == "unet"], ours.config.unet)
    state = {key: tensor for key, tensor in kohya_lora(ours, alpha=None).items() if key.startswith("lora_unet_")}
    names = {kohya("unet", name): "lora_unet_" + ldm.replace(".", "_") for name, ldm in found.items()}
    original = {f"{names[key.split('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in state.items()}
    loras = adapters(ours)
    loras.load_lora_weights(save(state, tmp_path / "diffusers.safetensors"), "diffusers")
    wanted = weights(ours)
    loras.load_lora_weights(save(original, tmp_path / "original.safetensors"), "original")
    assert_same_bits(weights(ours), wanted, "by the original names")


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5


def peft_layer(kind: str, layer: nn.Module, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A random LoHa or LoKr of PEFT's on one layer → its factors, and its ΔW, which has alpha 3."""
    torch.manual_seed(5)
    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    settings = config(r=2, alpha=3, target_modules=["0"], init_weights=False, **options)
    model = peft.get_peft_model(nn.Sequential(layer), settings)
    state = {key.split(".0.")[-1]: value for key, value in peft.get_peft_model_state_dict(model).items()}
    return state, model.base_model.model[0].get_delta_weight("default").detach()


LAYER = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",  # 64 × 64
    "conv": "down_blocks.1.resnets.0.conv1",  # 32 → 64, 3 × 3
}
LYCORIS = {
    "LoHa": ("loha", "linear", {}),
    "LoHa, convolution": ("loha", "conv", {}),
    "LoHa, convolution in Tucker form": ("loha", "conv", {"use_effective_conv2d": True}),
    "LoKr": ("lokr", "linear", {}),
    "LoKr, both of low rank": ("lokr", "linear", {"decompose_both": True, "decompose_factor": 16}),
    "LoKr, convolution": ("lokr", "conv", {}),
    "LoKr, convolution in Tucker form": ("lokr", "conv", {"use_effective_conv2d": True}),
}


def merged_difference(ours: fastsd.Pipeline, tmp_path: Path, module: str, state: dict[str, Tensor]) -> Tensor:
    """What a file with these factors for one layer adds to the layer's weight."""
    weight = ours.unet.get_parameter(f"{module}.weight")
    with torch.no_grad():
        weight.zero_()
    name = kohya("unet", module)
    path = save({f"{name}.{key}": tensor for key, tensor in state.items()}, tmp_path / "one.safetensors")
    adapters(ours).load_lora_weights(path)
    return weight.clone()


@pytest.mark.parametrize("case", LYCORIS)
def test_loha_and_lokr_are_pefts(ours: fastsd.Pipeline, tmp_path: Path, case: str) -> None:
    kind, place, options = LYCORIS[case]
    layer = nn.Linear(64, 64) if place == "linear" else nn.Conv2d(32, 64, 3, padding=1)
    state, truth = peft_layer(kind, layer, **options)
    assert len(state) >= 3, f"not the case that was meant: {sorted(state)}"
    found = merged_difference(ours, tmp_path, LAYER[place], state | {"alpha": torch.tensor(3.0)})
    error = oracle.relative_l2(found, truth)
    measured("relative L2", error, LORA_WEIGHT)
    assert error <= LORA_WEIGHT, f"{sorted(state)}: relative error {error:.1e} against PEFT"


def test_a_lora_in_tucker_form_is_three_convolutions(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """LoCon: down 1×1, mid 3×3, up 1×1, one after another."""
    up, mid, down = rand(64, 4, 1, 1), rand(4, 5, 3, 3), rand(5, 32, 1, 1)
    state = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    found = merged_difference(ours, tmp_path, LAYER["conv"], state)
    x = rand(1, 32, 9, 9)
    conv = nn.functional.conv2d
    truth = conv(conv(conv(x, down), mid, padding=1), up) * 2 / 5
    error = oracle.relative_l2(conv(x, found, padding=1), truth)
    assert error <= LORA_WEIGHT * 10, f"relative error {error:.1e} against the three convolutions"


class LargestResult(TorchDispatchMode):
    """How many elements the largest result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("ranks", [(1, 800), (800, 1), (300, 40), (3, 4)])
def test_tucker_factors_do_not_inflate(ranks: tuple[int, int]) -> None:
    """A rank may be anything; what is computed on the way stays as small as the factors or the weight."""
    core, a, b = rand(*ranks, 3, 3), rand(ranks[0], 16), rand(ranks[1], 32)
    with LargestResult() as seen:
        found = tucker(core, a, b)
    assert seen.elements <= max(x.numel() for x in (core, a, b, found)), f"{seen.elements} elements on the way"
    truth = torch.einsum("rshw,ro,si->oihw", core.double(), a.double(), b.double())
    assert oracle.relative_l2(found, truth) <= LORA_WEIGHT


def test_the_largest_scale_is_merged_with_the_largest_weight(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """In fp32, without an overflow: 3.4e35 · 1000 times a product of 1e-38."""
    weight = ours.unet.get_parameter(f"{LAYER['linear']}.weight")
    before = weight.detach().clone()
    name = kohya("unet", LAYER["linear"])
    up, down = torch.full((64, 1), 1e-19), torch.full((1, 64), 1e-19)
    state = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(MAX_SCALE, dtype=torch.float64)}
    loras = adapters(ours)
    loras.load_lora_weights(save({f"{name}.{k}": v for k, v in state.items()}, tmp_path / "scaled.safetensors"), "a")
    loras.set_adapters("a", 1000)
    truth = before.double() + MAX_SCALE * 1000 * up.double() @ down.double()
    assert oracle.relative_l2(weight.detach(), truth) <= LORA_WEIGHT


def test_a_lokr_of_whole_factors_has_no_alpha(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """LyCORIS writes an alpha there too, and takes the scale for 1."""
    w1, w2 = rand(4, 8), rand(16, 8)
    found = merged_difference(
        ours, tmp_path, LAYER["linear"], {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(0.5)}
    )
    assert oracle.relative_l2(found, torch.kron(w1, w2)) <= LORA_WEIGHT


@pytest.mark.parametrize("alpha", [None, 3.0, torch.tensor([3]), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_alpha_divides_by_the_rank(ours: fastsd.Pipeline, tmp_path: Path, alpha: Any) -> None:
    """Missing, it is the rank; it may be any kind of number, one a layer."""
    up, down = rand(64, 6), rand(6, 64)
    state = {"lora_up.weight": up, "lora_down.weight": down}
    state |= {} if alpha is None else {"alpha": torch.as_tensor(alpha)}
    found = merged_difference(ours, tmp_path, LAYER["linear"], state)
    assert oracle.relative_l2(found, up @ down * (1.0 if alpha is None else 0.5)) <= LORA_WEIGHT


@pytest.fixture
def two_files(ours: fastsd.Pipeline, tmp_path: Path) -> tuple[Path, Path]:
    small = {key: tensor * 0.3 for key, tensor in kohya_lora(ours, LINEAR, seed=4).items()}
    return save(small, tmp_path / "a.safetensors"), save(
        kohya_lora(ours, CONVS[2:], seed=5), tmp_path / "b.safetensors"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_way_off_gives_the_first_bits_back(sd1: Path, two_files: tuple[Path, Path], dtype: str) -> None:
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference", dtype=dtype)
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0, 0, 0] = -0.0  # adding 0 would make it 0
    before = weights(pipe)
    first_bits = {name: bits(tensor) for name, tensor in before.items()}
    addresses = [weight.data_ptr() for net in nets(pipe).values() for weight in net.parameters()]
    loras = adapters(pipe)

    def check(when: str, on: bool) -> None:
        now = weights(pipe)
        changed = [name for name, raw in first_bits.items() if not torch.equal(bits(now[name]), raw)]
        if not on:
            measured("values differ", len(changed), 0)
        assert bool(changed) == on, f"{when}: {len(changed)} weights have other bits than at first"

    for path, name in zip(two_files, "ab", strict=True):
        loras.load_lora_weights(path, name)
        check(f"{name} loaded", True)
    loras.set_adapters(["a", "b"], [0.0, {"unet": 0, "text_encoder": 0.0}])
    check("weights of 0", False)
    loras.set_adapters(["a", "b"], 0.5)
    both = weights(pipe)
    loras.disable_lora()
    check("disabled", False)
    loras.set_adapters("a")
    check("chosen while disabled", False)
    loras.enable_lora()
    check("enabled", True)
    loras.set_adapters([])
    check("none active", False)
    loras.set_adapters(("a", "b"), (0.5, 0.5))
    assert all(torch.equal(tensor, both[name]) for name, tensor in weights(pipe).items()), (
        "the way there changed the sum"
    )
    loras.delete_adapters(["a", "b", "a"])
    check("deleted", False)
    assert loras.get_list_adapters() == {}
    assert loras.get_active_adapters() == []
    assert addresses == [weight.data_ptr() for net in nets(pipe).values() for weight in net.parameters()], (
        "weights moved"
    )
    assert not loras._weights._kept, "originals are kept though nothing is loaded"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(sd1: Path, two_files: tuple[Path, Path], dtype: torch.dtype) -> None:
    """The error against fp64 is half a step of the dtype: neither ΔW nor a part of the sum was rounded before."""
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference", dtype=dtype)
    exact = {name: tensor.double() for name, tensor in weights(pipe).items()}
    loras = adapters(pipe)
    for path, name, weight in zip(two_files, "ab", (0.3, 0.7), strict=True):
        loras.load_lora_weights(path, name)
        for (component, module), delta in loras._adapters[name].items():
            value = delta.formula.value({part: factor.double() for part, factor in delta.factors.items()})
            exact[f"{component}.{module}.weight"] += weight * delta.scale * value.reshape(delta.shape)
    loras.set_adapters(["a", "b"], [0.3, 0.7])
    half_step = torch.finfo(dtype).eps / 2
    for name, tensor in weights(pipe).items():
        error = (tensor.double() - exact[name]).abs() - half_step * exact[name].abs() - torch.finfo(dtype).tiny
        assert error.max() <= 1e-6, f"{name}: {error.max():.1e} beyond one rounding"


def test_packed_weights_follow(sd1: Path, two_files: tuple[Path, Path]) -> None:
    """On the CPU's packed weights a picture changes with each LoRA, as on plain PyTorch, and comes back."""
    call: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 1, "output_type": "latent"}
    reference, packed = (fastsd.Pipeline(sd1, device="cpu", backend=name) for name in ("reference", "onednn"))
    first = packed.generate("a red circle", **call).images
    loras = [adapters(reference), adapters(packed)]
    for path in two_files:
        for each in loras:
            each.load_lora_weights(path)
        drawn, wanted = (
            packed.generate("a red circle", **call).images,
            reference.generate("a red circle", **call).images,
        )
        assert oracle.relative_l2(drawn, wanted) <= LORA_PICTURE, "the packed weights are not those of the LoRA"
        assert oracle.relative_l2(drawn, first) > 10 * LORA_PICTURE, "the LoRA changes nothing"
    loras[1].disable_lora()
    assert torch.equal(packed.generate("a red circle", **call).images, first), "the picture does not come back"


class Locked:
    """A pipeline as it holds the lock while it draws."""

    def __init__(self, pipe: fastsd.Pipeline) -> None:
        self.lock = SwapLock()
        self.pipe = pipe
        self.loras = LoraAdapters(nets(self.pipe), self.lock)

    def generate(self, **options: Any) -> Tensor:
        with self.lock.using():
            return self.pipe.generate(
                "a square", num_inference_steps=2, guidance_scale=1, seed=2, output_type="latent", **options
            ).images


def test_a_running_request_keeps_its_weights(ours: fastsd.Pipeline, two_files: tuple[Path, Path]) -> None:
    """Swapped in the middle of a picture, by another thread: the picture is the old one, the next is the new one."""
    locked = Locked(ours)
    old = locked.generate()
    started, swapped = threading.Event(), threading.Event()

    def swap() -> None:
        assert started.wait(60)
        locked.loras.load_lora_weights(two_files[0])
        swapped.set()

    def callback(pipe: Any, step: int, timestep: float, values: Any) -> None:
        started.set()
        assert not swapped.wait(0.2 if step == 0 else 0), "the weights were swapped under a request"
        if step == 1:  # a request of the request's own must not wait for the swap that waits for it
            assert torch.equal(locked.generate(), old)

    thread = threading.Thread(target=swap)
    thread.start()
    during = locked.generate(callback_on_step_end=callback)
    thread.join(60)
    assert not thread.is_alive(), "the swap never came to its turn"
    assert torch.equal(during, old), "a running request saw the new weights"
    assert not torch.equal(locked.generate(), old), "the next request did not"


def test_requests_run_together_and_swaps_take_turns() -> None:
    lock = SwapLock()
    both, log = threading.Barrier(2, timeout=30), []

    def use() -> None:
        with lock.using():
            both.wait()  # two are inside at once

    def swap(index: int) -> None:
        with lock.swapping():
            log.append(("in", index))
            threading.Event().wait(0.01)
            log.append(("out", index))

    users = [threading.Thread(target=use) for _ in range(2)]
    swaps = [threading.Thread(target=swap, args=(index,)) for index in range(4)]
    for threads in (users, swaps):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a deadlock"
    assert [index for _, index in log[::2]] == [index for _, index in log[1::2]], f"two swaps at once: {log}"


def test_a_callback_cannot_swap(ours: fastsd.Pipeline, two_files: tuple[Path, Path]) -> None:
    locked = Locked(ours)

    def callback(*_: Any) -> None:
        locked.loras.load_lora_weights(two_files[0])

    with pytest.raises(ParameterError, match="in a callback"):
        locked.generate(callback_on_step_end=callback)
    locked.loras.load_lora_weights(two_files[0], "afterwards")


def test_a_swap_that_fails_leaves_what_was(
    ours: fastsd.Pipeline, two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of merging: the weights, what is active, and what is loaded are as before."""
    loras = adapters(ours)
    loras.load_lora_weights(two_files[0], "a")
    before, add_to, calls = weights(ours), Delta.add_to, itertools.count()

    def failing(self: Delta, total: Tensor, scale: float, part: slice) -> None:
        if next(calls) == 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        add_to(self, total, scale, part)

    monkeypatch.setattr(Delta, "add_to", failing)
    with pytest.raises(OutOfMemoryError):
        loras.load_lora_weights(two_files[1], "b")
    assert_same_bits(weights(ours), before, "after a failed swap")
    assert loras.get_active_adapters() == ["a"]
    loras.load_lora_weights(two_files[1], "b")  # its name is free, and the next try works
    loras.unload_lora_weights()


def test_overflow_is_told_and_undone(sd1: Path, tmp_path: Path) -> None:
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference", dtype="float16")
    first = weights(pipe)
    large = {key: tensor * (1e4 if "lora_up" in key else 1) for key, tensor in kohya_lora(pipe, ("to_q",)).items()}
    loras = adapters(pipe)
    loras.load_lora_weights(save(large, tmp_path / "large.safetensors"), "large")
    before = weights(pipe)
    with pytest.raises(NumericsError, match="smaller weights"):
        loras.set_adapters("large", 1000)
    assert loras.get_active_adapters() == ["large"]
    assert_same_bits(weights(pipe), before, "after an overflow")
    loras.unload_lora_weights()
    assert_same_bits(weights(pipe), first, "unloaded after an overflow")


def bad_calls() -> Iterator[tuple[str, Callable[[LoraAdapters], Any], str]]:
    yield "unknown", lambda loras: loras.set_adapters(["a", "c"]), "'c' is not loaded; loaded: a, b"
    yield "nothing", lambda loras: loras.set_adapters(None), "a name or a list of names"
    yield "lengths", lambda loras: loras.set_adapters(["a", "b"], [1.0]), "give each its own"
    yield "twice", lambda loras: loras.set_adapters(["a", "a"], [1.0, 2.0]), "give each its own"
    yield "NaN", lambda loras: loras.set_adapters("a", float("nan")), "a number from -1000 to 1000"
    yield "infinite", lambda loras: loras.set_adapters(["a"], [float("inf")]), "a number from -1000 to 1000"
    yield "bool", lambda loras: loras.set_adapters("a", True), "a number from -1000 to 1000"
    yield "text", lambda loras: loras.set_adapters("a", "1"), "a number from -1000 to 1000"
    yield "component", lambda loras: loras.set_adapters("a", {"vae": 1.0}), "'vae' is no component"
    yield "text by block", lambda loras: loras.set_adapters("a", {"text_encoder": {"down": 1.0}}), "from -1000 to 1000"
    yield (
        "part",
        lambda loras: loras.set_adapters("a", {"unet": {"left": 1.0}}),
        "'left' is no part with attentions; give down",
    )
    yield "mixed", lambda loras: loras.set_adapters("a", {"down": 1.0, "unet": 1.0}), "'down' is no component"
    yield (
        "block",
        lambda loras: loras.set_adapters("a", {"down": {"block_1": 1.0}}),
        "'block_1' is no part .*give block_0",
    )
    yield "in a block", lambda loras: loras.set_adapters("a", {"up": {"block_1": "x"}}), "a number from -1000 to 1000"
    yield "in a list", lambda loras: loras.set_adapters("a", {"mid": [float("nan")]}), "a number from -1000 to 1000"
    yield (
        "list",
        lambda loras: loras.set_adapters("a", {"up": [1.0, 2.0, 3.0]}),
        "3 weights for the 2 attentions of up.block_1",
    )
    yield "deleting", lambda loras: loras.delete_adapters("c"), "'c' is not loaded"
    yield "no name", lambda loras: loras.load_lora_weights("x", adapter_name=""), "adapter_name: must be a string"


@pytest.mark.parametrize(("what", "call", "reason"), list(bad_calls()))
def test_bad_arguments_change_nothing(what: str, call: Any, reason: str, loaded: tuple[Any, LoraAdapters]) -> None:
    pipe, loras = loaded
    before, active = weights(pipe), loras.get_active_adapters()
    with pytest.raises(ParameterError, match=reason) as caught:
        call(loras)
    assert "\n" not in str(caught.value)
    assert loras.get_active_adapters() == active
    assert_same_bits(weights(pipe), before, f"after {what}")


@pytest.fixture(scope="module")
def loaded(sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[fastsd.Pipeline, LoraAdapters]:
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference")
    path = save(kohya_lora(pipe, ("to_q",)), tmp_path_factory.mktemp("loaded") / "a.safetensors")
    loras = adapters(pipe)
    loras.load_lora_weights(path, "a")
    loras.load_lora_weights(path, "b")
    return pipe, loras


def test_a_name_is_taken_once(loaded: tuple[fastsd.Pipeline, LoraAdapters], tmp_path: Path) -> None:
    pipe, loras = loaded
    path = save(kohya_lora(pipe, ("to_q",)), tmp_path / "again.safetensors")
    with pytest.raises(ParameterError, match="'a' is taken"):
        loras.load_lora_weights(path, "a")
    assert [loras.load_lora_weights(path) for _ in range(2)] == ["default_0", "default_1"]
    loras.delete_adapters("default_0")
    assert loras.load_lora_weights(path) == "default_0"
    loras.delete_adapters(["default_0", "default_1"])


def test_factors_are_used_as_they_are_stored(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """A file in half precision is merged in fp32: its factors are rounded, their product is not."""
    component, module, shape = next(layers(ours, ("to_q",)))
    up, down = (factor.half() for factor in factors(shape, 3, torch.Generator().manual_seed(0)))
    before = weights(ours)[f"{component}.{module}.weight"]
    name = kohya(component, module)
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    adapters(ours).load_lora_weights(save(state, tmp_path / "half.safetensors"))
    truth = before + up.float() @ down.float()
    assert oracle.relative_l2(weights(ours)[f"{component}.{module}.weight"], truth) <= LORA_WEIGHT
