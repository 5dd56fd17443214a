"""The tags by which the web UI's prompts name what a picture is made with beside the model: `<lora:name:0.8>`.

`<lora:ink>` has weight 1, `<lora:ink:0.8>` 0.8, `<lora:ink:0.5:1>` 0.5 in the text encoder and 1 in the UNet; `te=0.5` and
`unet=1` say it by name. `<lyco:…>` is another word for it. A tag is no part of what is encoded, but stays in what is written into
files. The same LoRA named twice is added twice. Only the command line reads them, and only in the prompt.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from fastsd.errors import PromptError
from fastsd.wording import quoted

_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")  # what is within has no "<": linear time
_WRITABLE = re.compile(r"[^\s:<>](?:[^:<>\n]*[^\s:<>])?")
_DIFFUSERS = "pytorch_lora_weights"  # what diffusers calls the file of every LoRA


class LoraTag(NamedTuple):
    name: str
    """See `tag_name`."""
    text_encoder: float
    unet: float


class Tagged(NamedTuple):
    """A prompt, and what its tags ask for."""

    text: str
    """What is encoded: see `without_tags`."""
    loras: list[LoraTag]
    """One a name."""
    hypernets: list[str]
    """Names."""


def take_tags(prompt: str) -> Tagged:
    """PromptError for a tag without a name, and for a weight that is no number."""
    loras: dict[str, LoraTag] = {}
    hypernets = []
    for match in _TAG.finditer(prompt):
        if match[1] == "hypernet":
            hypernets.append(match[2].partition(":")[0])
            continue
        tag = _lora(match[0], match[2])
        before = loras.get(tag.name, LoraTag(tag.name, 0.0, 0.0))
        loras[tag.name] = LoraTag(tag.name, before.text_encoder + tag.text_encoder, before.unet + tag.unet)
    return Tagged(without_tags(prompt), list(loras.values()), hypernets)


def without_tags(prompt: str, kind: str = "") -> str:
    """The prompt without its tags, or those of a kind, and then without spaces at its ends; as it is if it has none."""
    text = _TAG.sub(lambda tag: "" if kind in ("", tag[1]) else tag[0], prompt)
    return prompt if text == prompt else text.strip()


def tag_name(stem: str, folder: str) -> str:
    """What a tag calls a LoRA: its file's name without the suffix, or its folder's where diffusers chose the file's."""
    return folder if stem == _DIFFUSERS and folder else stem


def with_tags(prompt: str, loras: Iterable[LoraTag]) -> str:
    """The prompt with tags behind it, so that with its own ones the weights of each name add up to what is said here.

    loras: one a name. A name that no tag can hold is left out.
    """
    try:
        own = {tag.name: tag for tag in take_tags(prompt).loras}
    except PromptError:  # a prompt of the library's, to which tags are words
        own = {}
    tags = []
    for tag in loras:
        before = own.get(tag.name, LoraTag(tag.name, 0.0, 0.0))
        if (tag.name not in own or before != tag) and _WRITABLE.fullmatch(tag.name):
            rest = _rest(tag.text_encoder, before.text_encoder), _rest(tag.unet, before.unet)
            tags.append(_written(LoraTag(tag.name, *rest)))
    return " ".join([prompt, *tags] if prompt else tags)


def with_prompt(parameters: str, text: str, prompt: str) -> str:
    """`parameters` of a picture that was drawn from `text`, what `take_tags` left of `prompt`: with `prompt` in its place, unless
    that has tags that cannot be read, or name what was not used."""
    if text == prompt:
        return parameters
    behind, used = parameters[len(text) :], list[LoraTag]()
    if text or behind.startswith("<"):
        tags, _, behind = behind.partition("\n")
        used = take_tags(tags).loras
    try:
        asked = {tag.name for tag in take_tags(prompt).loras}
    except PromptError:
        return parameters
    if not asked <= {tag.name for tag in used}:
        return parameters
    return f"{with_tags(prompt, used)}\n{behind}"


def _lora(tag: str, inside: str) -> LoraTag:
    name, *rest = inside.split(":")
    weights: dict[str, float] = {}
    for place, part in enumerate(rest):
        key, is_named, value = part.rpartition("=")
        key = key if is_named else ("te", "unet")[place] if place < 2 else ""
        try:
            weights[key] = float(value)
        except ValueError:
            key = ""
        if key not in ("te", "unet") or not math.isfinite(weights[key]):
            raise PromptError(
                f"prompt: {quoted(tag)}: {quoted(part)} is no weight; write <lora:name:0.8> or <lora:name:te=0.5:unet=1>"
            )
    if not name.strip():
        raise PromptError(f"prompt: {quoted(tag)} has no name; write <lora:name:0.8>")
    text_encoder = weights.get("te", 1.0)
    return LoraTag(name.strip(), text_encoder, weights.get("unet", text_encoder))


def _rest(whole: float, part: float) -> float:
    """What makes the whole with the part; of few digits where these do."""
    short = round(whole - part, 6)
    return short if part + short == whole else whole - part


def _written(tag: LoraTag) -> str:
    te, unet = (str(int(weight)) if weight.is_integer() else repr(weight) for weight in (tag.text_encoder, tag.unet))
    return f"<lora:{tag.name}:{te}>" if te == unet else f"<lora:{tag.name}:{te}:{unet}>"
