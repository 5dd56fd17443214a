"""An adapter's weight block by block, against diffusers' set_adapters with PEFT."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsd
from tests import oracle
from tests.adapter_builders import CONVS, LINEAR, adapters, fused, kohya_lora, largest_difference, save, weights
from tests.adapter_builders import save_small_model as save_small
from tests.measured import measured
from tests.tolerances import LORA_WEIGHT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

# The small model has attentions in down block 0 (one) and up block 1 (two), and in the middle.
FORMS: dict[str, Any] = {
    "parts": {"unet": {"down": 0.3, "mid": -1.5, "up": 0.6}},
    "one part": {"unet": {"up": 0.25}, "text_encoder": 0.5},
    "blocks": {"unet": {"down": {"block_0": 0.0}, "up": {"block_1": [0.5, 2.0]}}},
    "lists of one": {"unet": {"mid": [0.5], "down": [0.2], "up": {"block_1": [3]}}},
    "nothing": {"unet": {}},
}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_diffusers(sd1: Path, tmp_path: Path, form: str) -> None:
    ours, theirs = fastsd.Pipeline(sd1, device="cpu", backend="reference"), oracle.load_pipeline(sd1)
    before = weights(ours)
    path = save(kohya_lora(ours, LINEAR + CONVS, alpha=lambda index: 2.0), tmp_path / "one.safetensors")
    loras = adapters(ours)
    loras.load_lora_weights(path, "one")
    theirs.load_lora_weights(str(path), adapter_name="one")
    loras.set_adapters("one", FORMS[form])
    truth = fused(theirs, ["one"], [FORMS[form]])
    error, name = largest_difference(weights(ours), truth)
    measured("relative L2", error, LORA_WEIGHT)
    assert error <= LORA_WEIGHT, f"{name}: relative error {error:.1e} against diffusers"
    loras.unload_lora_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ours).items())


def test_parts_alone_are_the_unets(sd1: Path, tmp_path: Path) -> None:
    """{"down": …} without a component; what lies outside of blocks with attentions weighs 1."""
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference")
    loras = adapters(pipe)
    loras.load_lora_weights(save(kohya_lora(pipe), tmp_path / "one.safetensors"), "one")
    whole = weights(pipe)
    loras.set_adapters(["one"], [{"down": 0, "mid": 0, "up": 0}])
    parts = weights(pipe)
    loras.set_adapters("one", {"unet": {"down": 0, "mid": 0, "up": 0}, "text_encoder": 1})
    assert all(torch.equal(tensor, parts[name]) for name, tensor in weights(pipe).items())
    loras.disable_lora()
    first = weights(pipe)
    for name, tensor in parts.items():
        weighed = re.match(r"unet\.(down_blocks\.0|mid_block\.attentions|up_blocks\.1)\.", name)
        same = first if weighed else whole
        assert torch.equal(tensor, same[name]), f"{name} is not weighed as meant"


def test_only_what_changes_is_written(sd1: Path, tmp_path: Path) -> None:
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference")
    loras = adapters(pipe)
    loras.load_lora_weights(save(kohya_lora(pipe), tmp_path / "one.safetensors"), "one")

    def counts() -> dict[str, int]:
        return {f"{c}.{n}": w._version for c, net in loras._nets.items() for n, w in net.named_parameters()}

    before = counts()
    loras.set_adapters("one", {"mid": 0.5})
    after = counts()
    written = {name for name, count in after.items() if count != before[name]}
    assert written, "nothing was written"
    assert all(name.startswith("unet.mid_block.attentions.0.") for name in written), sorted(written)[:5]
    loras.set_adapters("one", {"mid": 0.5})
    assert counts() == after, "written again, to the same"


def test_weights_that_others_change_meanwhile(sd1: Path, tmp_path: Path) -> None:
    """While no adapter is on, a changed weight is the new first one; it is not undone by the next switch."""
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference")
    loras = adapters(pipe)
    loras.load_lora_weights(save(kohya_lora(pipe, ("to_q",)), tmp_path / "one.safetensors"), "one")
    loras.disable_lora()
    weight = pipe.unet.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    with torch.no_grad():
        weight.mul_(2.0)
    mine = weight.clone()
    loras.enable_lora()
    assert not torch.equal(weight, mine)
    loras.unload_lora_weights()
    assert torch.equal(weight, mine)
