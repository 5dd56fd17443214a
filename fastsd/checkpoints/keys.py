"""The one place where names in a diffusers checkpoint become names of fastsd's modules.

Modules carry the names that current diffusers and transformers write, so this is only about older files. A rule rewrites
the name by a regular expression; the rules of a component apply in order.
"""

import re
from typing import NamedTuple


class Rename(NamedTuple):
    pattern: re.Pattern[str]
    replacement: str


_VAE_ATTENTION = r"(?P<block>.*attentions\.\d+)\."

RENAMES: dict[str, tuple[Rename, ...]] = {
    "unet": (),
    # diffusers before 0.17 named the VAE's attention layers so
    "vae": (
        Rename(re.compile(_VAE_ATTENTION + r"query\.(weight|bias)"), r"\g<block>.to_q.\2"),
        Rename(re.compile(_VAE_ATTENTION + r"key\.(weight|bias)"), r"\g<block>.to_k.\2"),
        Rename(re.compile(_VAE_ATTENTION + r"value\.(weight|bias)"), r"\g<block>.to_v.\2"),
        Rename(re.compile(_VAE_ATTENTION + r"proj_attn\.(weight|bias)"), r"\g<block>.to_out.0.\2"),
    ),
    # transformers before 5 wrapped the text model
    "text_encoder": (Rename(re.compile(r"text_model\.(.+)"), r"\1"),),
    "taesd": (),
}

DROPPED: dict[str, frozenset[str]] = {
    "unet": frozenset(),
    "vae": frozenset(),
    "taesd": frozenset(),
    # 0..76, a buffer that transformers before 4.31 saved
    "text_encoder": frozenset({"embeddings.position_ids"}),
}

_ATTENTION_WEIGHT = re.compile(_VAE_ATTENTION + r"to_(q|k|v|out\.0)\.weight")


def module_name(component: str, name: str) -> str | None:
    """The module's name for checkpoint key `name`; None for a buffer that is dropped."""
    for rule in RENAMES[component]:
        match = rule.pattern.fullmatch(name)
        if match:
            name = match.expand(rule.replacement)
            break
    return None if name in DROPPED[component] else name


def module_shape(component: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The module's shape for a tensor now called `name`: the VAE's attention was once a 1×1 convolution."""
    if component == "vae" and len(shape) == 4 and shape[2:] == (1, 1) and _ATTENTION_WEIGHT.fullmatch(name):
        return shape[:2]
    return shape
