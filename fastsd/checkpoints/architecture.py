"""Telling from a file's tensor names what it is, when it is not what it should be.

Used only to word an error: nothing is loaded on its evidence.
"""

import re
from collections.abc import Collection

COMPONENT_NAMES = {
    "unet": "the UNet",
    "vae": "the VAE",
    "text_encoder": "the text encoder",
    "taesd": "TAESD's decoder",
}

INPUT_CHANNELS = {
    5: "a depth-to-image UNet (5 input channels)",
    7: "an upscaler's UNet (7 input channels)",
    8: "an InstructPix2Pix UNet (8 input channels)",
    9: "an inpainting UNet (9 input channels)",
}

_SINGLE_FILE = (
    r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
    "a single-file checkpoint (LDM keys), to be opened by Pipeline.from_single_file",
)

RUN_INPUT_CHANNELS = (4, 9)
"""Of text-to-image and of inpainting UNets."""

# First match wins: what is specific stands before what it contains.
_FOREIGN: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?)_|.*[._]lora(_linear_layer)?[._](up|down|A|B)\.", "a LoRA, not a full set of weights"),
    (r"controlnet_(cond_embedding|down_blocks|mid_block)\.|control_model\.", "a ControlNet"),
    (r"conditioner\.embedders\.", "a single-file Stable Diffusion XL checkpoint (LDM keys)"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 transformer"),
    (r"(model\.diffusion_model\.)?double_blocks\.|single_transformer_blocks\.", "a FLUX transformer"),
    (r"transformer_blocks\.\d+\.(norm1_context|attn\.add_[qkv]_proj)\.", "a Stable Diffusion 3 or FLUX transformer"),
    _SINGLE_FILE,
    (r"model\.diffusion_model\.label_emb\.", "an unCLIP model, an upscaler or another with class conditioning"),
    (r"model\.diffusion_model\.time_embed\.cond_proj\.", "a latent consistency model"),
    (r"add_embedding\.", "a Stable Diffusion XL UNet"),
    (r".*motion_modules\.", "an AnimateDiff motion model"),
    (r"text_projection\.", "a text encoder with projection (Stable Diffusion XL's text_encoder_2)"),
    (r"(vision_model\.|vision_embeddings\.|visual_projection\.)", "a CLIP image model"),
    (r"(shared\.weight|encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.)", "a T5 text encoder"),
    (r"(string_to_param|emb_params|clip_[lg]$)", "a textual-inversion embedding"),
)

_OWN = {
    "unet": ("time_embedding.linear_1.weight", "conv_in.weight"),
    "vae": ("decoder.conv_in.weight", "decoder.conv_out.weight"),
    "text_encoder": ("embeddings.token_embedding.weight", "final_layer_norm.weight"),
}

_PARTS = {
    "the UNet": "model.diffusion_model.",
    "the VAE": "first_stage_model.",
    "the text encoder": "cond_stage_model.",
}


def recognise(component: str, names: Collection[str]) -> str | None:
    """What the tensors `names` (as the file has them) are, if that is not `component`; None if they do not tell."""
    bare = {name.removeprefix("text_model.") for name in names}
    for pattern, meaning in _FOREIGN:
        matches = re.compile(pattern).match
        if any(matches(name) for name in names):
            return meaning
    for other, landmarks in _OWN.items():
        if other != component and bare.issuperset(landmarks):
            return f"{COMPONENT_NAMES[other]}, in the place of {COMPONENT_NAMES[component]}"
    return None


def recognise_single_file(names: Collection[str]) -> str | None:
    """What the tensors `names` of a single file are, if they are not a whole Stable Diffusion model in LDM keys."""
    for pattern, meaning in _FOREIGN:
        matches = re.compile(pattern).match
        if (pattern, meaning) != _SINGLE_FILE and any(matches(name) for name in names):
            return meaning
    missing = [part for part, start in _PARTS.items() if not any(name.startswith(start) for name in names)]
    if len(missing) < len(_PARTS):
        return f"a single file without {' and '.join(missing)}" if missing else None
    for component, landmarks in _OWN.items():
        if {name.removeprefix("text_model.") for name in names}.issuperset(landmarks):
            return f"{COMPONENT_NAMES[component]} of a diffusers folder, alone"
    bare = {"input_blocks.": "a UNet alone (LDM keys)", "encoder.down.": "a VAE alone (LDM keys)"}
    alone = (kind for start, kind in bare.items() if any(name.startswith(start) for name in names))
    return next(alone, "no Stable Diffusion checkpoint: none of its tensors is called as they are")
