"""Telling from a file's tensor names what it is, when it is not what it should be.

Used only to word an error: nothing is loaded on its evidence.
"""

import re
from collections.abc import Collection

COMPONENT_NAMES = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder"}

INPUT_CHANNELS = {
    5: "a depth-to-image UNet (5 input channels)",
    7: "an upscaler's UNet (7 input channels)",
    8: "an InstructPix2Pix UNet (8 input channels)",
    9: "an inpainting UNet (9 input channels)",
}

# First match wins: what is specific stands before what it contains.
_FOREIGN: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?)_|.*[._]lora(_linear_layer)?[._](up|down|A|B)\.", "a LoRA, not a full set of weights"),
    (r"controlnet_(cond_embedding|down_blocks|mid_block)\.|control_model\.", "a ControlNet"),
    (r"conditioner\.embedders\.", "a single-file Stable Diffusion XL checkpoint (LDM keys)"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 transformer"),
    (r"(model\.diffusion_model\.)?double_blocks\.|single_transformer_blocks\.", "a FLUX transformer"),
    (r"transformer_blocks\.\d+\.(norm1_context|attn\.add_[qkv]_proj)\.", "a Stable Diffusion 3 or FLUX transformer"),
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a single-file checkpoint (LDM keys); from_single_file comes in a later version",
    ),
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
