"""The names that LoRA files have for layers and for their factors; fastsd's are diffusers'.

lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight     kohya; LyCORIS with hada_… and lokr_…
lora_unet_input_blocks_1_1_proj_in.lora_down.weight               kohya, by the names of the original (LDM) UNet
lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight        kohya, the text encoder
unet.down_blocks.0.attentions.0.proj_in.lora_A.weight             diffusers since 0.22, PEFT
unet.….attn1.processor.to_q_lora.down.weight                      diffusers before, with or without `unet.`
text_encoder.….self_attn.to_q_lora.down.weight                    diffusers before, the text encoder
text_encoder.….mlp.fc1.lora_linear_layer.up.weight                diffusers in between
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from fastsd.checkpoints.ldm_keys import UNET, inverse, renamed, unet_table
from fastsd.config import UNetConfig

Layer = tuple[str, str]
"""(component, module), as in ("unet", "conv_in")."""

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
"""What kohya's names begin with; the dots of the layer's name become underscores."""

_LORA = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.weight")
_OTHER = re.compile(
    r"(.+)\.(alpha|dora_scale|lora_magnitude_vector|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?)(\..+)?"
)
_PARTS = {"A": "down", "B": "up", "dora_scale": "dora", "lora_magnitude_vector": "dora"}

_UNET_PROCESSOR = re.compile(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?")
_TEXT_PROJECTION = re.compile(r"(.+\.self_attn)\.(q|k|v|out)_proj")

# What a file is for, told by some of its names. First match wins.
_FOREIGN = (
    (r".*(double_blocks|single_blocks|single_transformer_blocks)", "FLUX"),
    (r".*joint_blocks|.*lora_te3_|text_encoder_3\.", "Stable Diffusion 3"),
    (r"(transformer|lora_transformer|diffusion_model)[._]", "a transformer (FLUX, Stable Diffusion 3, …)"),
    (r"lora_te[12]_|text_encoder_2\.|.*(label_emb|add_embedding)", "Stable Diffusion XL"),
    (r"(lora_unet_|unet\.).*transformer_blocks[._][1-9]", "Stable Diffusion XL"),
    (r"lora_controlnet|lora_unet_lllite|.*motion_modules", "ControlNet or AnimateDiff"),
)


def layer_shapes(nets: Mapping[str, nn.Module]) -> dict[Layer, tuple[int, ...]]:
    """The weight's shape of every layer that an adapter may change: linear ones and convolutions."""
    return {
        (component, name): tuple(module.weight.shape)
        for component, net in nets.items()
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def spellings(layers: Collection[Layer], config: UNetConfig) -> dict[str, Layer]:
    """Every name that some program has for a layer → the layer. config: the UNet's."""
    ldm = ldm_names([name for component, name in layers if component == "unet"], config)
    found = {}
    for component, name in layers:
        names = _unet_names(name, ldm.get(name)) if component == "unet" else _text_names(name)
        found.update(dict.fromkeys(names, (component, name)))
    return found


def _unet_names(name: str, ldm: str | None) -> Iterator[str]:
    yield f"base_model.model.{name}"
    for original in (name, ldm):
        if original:
            yield KOHYA["unet"] + original.replace(".", "_")
    for dotted in (name, _UNET_PROCESSOR.sub(r"\1.processor.\2", name)):
        yield from (dotted, f"unet.{dotted}")


def _text_names(name: str) -> Iterator[str]:
    yield KOHYA["text_encoder"] + name.replace(".", "_")
    for dotted in (name, _TEXT_PROJECTION.sub(r"\1.to_\2", name)):
        for prefix in ("text_model.", "text_encoder.text_model.", "text_encoder.", "base_model.model.text_model."):
            yield prefix + dotted


def split_key(key: str) -> tuple[str, str] | None:
    """A file's key → (its name for the layer, which factor it is: "up", "down", "alpha", "hada_w1_a", …, or "dora")."""
    match = _LORA.fullmatch(key) or _OTHER.fullmatch(key)
    return (match[1], _PARTS.get(match[2], match[2])) if match else None


def foreign(keys: Collection[str]) -> str | None:
    """The model that a LoRA with such keys was made for, if it is none that fastsd runs."""
    return next((model for pattern, model in _FOREIGN if any(re.match(pattern, key) for key in keys)), None)


def ldm_names(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """A UNet's layers → their names in the original code, where blocks are counted through."""
    table = inverse(unet_table(config))
    found = {name: renamed(name, table) for name in names}
    return {name: original.removeprefix(UNET) for name, original in found.items() if original is not None}
