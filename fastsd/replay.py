"""From a picture's file back to the request that made it: A1111's `parameters` as arguments of `Pipeline.generate`."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from fastsd.errors import FastSDError, ImageError, PromptError
from fastsd.hires import UPSCALERS
from fastsd.images import MAX_PIXELS
from fastsd.metadata import RNG_LABELS, hash_name, parse_parameters
from fastsd.prompt_tags import LoraTag, Tagged, take_tags, without_tags
from fastsd.sampling import SAMPLERS, canonical_sampler, canonical_schedule

_USER_COMMENT = 0x9286
_CHARACTER_CODES = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii", b"\0" * 8: "utf-8"}
_ARGUMENTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "eta": "eta",
    "guidance_rescale": "guidance_rescale",
    "tiling": "tiling",
    "vae_tiling": "vae_tiling",
    "variation_seed": "variation_seed",
    "variation_strength": "variation_strength",
    "hires_scale": "hires_scale",
    "hires_steps": "hires_steps",
}
_HASH = re.compile("[0-9a-fA-F]{6,64}")


@dataclass(frozen=True)
class Replay:
    """What a file says of how it was made."""

    arguments: dict[str, Any]
    """For `Pipeline.generate`."""
    model: str | None
    hashes: dict[str, str]
    """By what they are of: "model", "vae", "lora:name", "embed:name"; lower case, as long as the file gives them."""
    lost: list[str] = field(default_factory=list)
    """Settings that are not replayed, each with its reason."""
    vae: str | None = None
    """In the place of the model's own."""
    prompt: str = ""
    """As the file has it, but for hypernetworks; what is to be drawn of it is among the arguments."""
    loras: list[LoraTag] = field(default_factory=list)
    """What its tags ask for."""


def read_parameters(path: str | Path) -> str:
    """The text that a PNG, JPEG or WebP carries of how it was made. A PNG is decoded only to find one behind its pixels.

    ImageError if the file cannot be read, is none of these, is larger than 16.8 million pixels, or carries no such text.
    """
    if not os.path.isfile(path):  # nor a named pipe, which might be waited for in vain
        raise ImageError(f"{Path(path).name} cannot be read: there is no such file")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            comment = None
            if width * height <= MAX_PIXELS and "parameters" not in image.info:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT)
            text = image.info.get("parameters")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "it is damaged, or something else"
        raise ImageError(f"{Path(path).name} cannot be read as PNG, JPEG or WebP: {why}") from error
    if width * height > MAX_PIXELS:
        raise ImageError(f"{Path(path).name} has {width}x{height} pixels, more than {MAX_PIXELS}")
    if not isinstance(text, str):
        text = _decoded(comment) if isinstance(comment, bytes) else comment
    if not isinstance(text, str) or not text.strip("\0 \n"):
        raise ImageError(f"{Path(path).name} does not say how it was made: it carries no `parameters`")
    return text


def _decoded(comment: bytes) -> str:
    """EXIF 2.3's UserComment: eight bytes name the characters. The web UI writes UTF-16 with the high byte first."""
    encoding = _CHARACTER_CODES.get(comment[:8])
    return comment[8:].decode(encoding, errors="replace") if encoding else comment.decode(errors="replace")


def read_replay(text: str) -> Replay:
    """What `parameters` ask of fastsd. ImageError where the text holds no settings, only a prompt."""
    fields = parse_parameters(text)
    if "steps" not in fields:
        raise ImageError("the file's `parameters` hold no settings (Steps, Sampler, …), only a prompt")
    extra: dict[str, str] = fields.pop("extra", {})
    arguments = {ours: fields[name] for name, ours in _ARGUMENTS.items() if name in fields}
    lost: list[str] = []
    for name, canonical in (("sampler", canonical_sampler), ("schedule_type", canonical_schedule)):
        value = fields.get(name)
        if value is not None:
            try:
                canonical(value)
            except FastSDError as error:
                lost.append(str(error))
            else:
                arguments["schedule" if name == "schedule_type" else name] = value
    if fields.get("clip_skip", 1) > 1:
        arguments["clip_skip"] = fields["clip_skip"] - 1  # the web UI counts the last layer as 1
    if "hires_scale" in fields:
        arguments["hires_strength"] = fields.get("denoising_strength")
        _upscaler(fields.get("hires_upscaler"), arguments, lost)
    elif "denoising_strength" in fields:
        lost.append("Denoising strength: it was made from another image, which the file does not hold")
    if "seed" not in fields:
        lost.append("Seed: the file has none; a random one is taken")
    if "made_with" in fields:
        lost.append(f"Made with {fields['made_with']}: that is not replayed")
    ours = str(fields.get("version", "")).startswith("fastsd")
    arguments["prompt_style"] = "plain" if fields.get("emphasis") == "None" else "a1111"
    _noise(fields, ours, arguments, lost)
    lost += [f"{label}: {value}" for label, value in extra.items() if label != "Hashes"]
    prompt = fields["prompt"]
    tags = Tagged(prompt, [], [])
    if not ours or "lora_hashes" in fields:
        tags, prompt = _tags(prompt, lost), without_tags(prompt, "hypernet")
    arguments["prompt"] = tags.text
    hashes = dict(_hashes(fields, extra, lost))
    return Replay(arguments, fields.get("model"), hashes, lost, fields.get("vae"), prompt, tags.loras)


def _tags(prompt: str, lost: list[str]) -> Tagged:
    """A prompt of the web UI's, or one of ours that a LoRA was merged for: else the library was given it, which reads no tags."""
    try:
        tags = take_tags(prompt)
    except PromptError as error:
        lost.append(f"{error}: none of its tags is replayed")
        return Tagged(without_tags(prompt), [], [])
    lost += [f"{name}: fastsd runs no hypernetworks" for name in tags.hypernets]
    return tags


def _noise(fields: Mapping[str, Any], ours: bool, arguments: dict[str, Any], lost: list[str]) -> None:
    """Where the noise came from. The web UI draws it on the GPU unless the file says otherwise, and that of the steps of the SDE
    samplers always from a Brownian path."""
    known = {label: rng for rng, label in RNG_LABELS.items()} | {"GPU": "gpu"}
    label = fields.get("rng", "CPU" if ours else "GPU")
    if label in known:
        arguments["rng"] = known[label]
    else:
        lost.append(f"RNG: fastsd has not {label}; it has {', '.join(known)}")
    sampler = arguments.get("sampler")
    stochastic = sampler is not None and SAMPLERS[canonical_sampler(sampler)[0]].brownian
    if fields.get("step_noise") == "Brownian" or (stochastic and not ours):
        arguments["step_noise"] = "brownian"


def _upscaler(label: str | None, arguments: dict[str, Any], lost: list[str]) -> None:
    known = {name: ours for ours, name in UPSCALERS.items()}
    if label in known:
        arguments["hires_upscaler"] = known[label]
    elif label is not None:
        lost.append(f"Hires upscaler: fastsd has not {label}; it has {', '.join(known)}")


def _hashes(fields: Mapping[str, Any], extra: Mapping[str, str], lost: list[str]) -> Iterator[tuple[str, str]]:
    for label, name in (("model_hash", "model"), ("vae_hash", "vae")):
        if _HASH.fullmatch(fields.get(label, "")):
            yield name, fields[label].lower()
    for label, kind in (("lora_hashes", "lora"), ("ti_hashes", "embed")):
        told: dict[str, str] = {}
        for part in fields.get(label, "").split(","):
            name, value = (side.strip() for side in part.rpartition(":")[::2])
            if _HASH.fullmatch(value):
                if told.setdefault(name, value.lower()) != value.lower():
                    lost.append(f"{kind}:{name} has two hashes, of two files; {value.lower()} is looked for alone")
                yield f"{kind}:{name}", value.lower()
    try:
        listed = json.loads(extra.get("Hashes", "{}"))
    except (ValueError, RecursionError):
        listed = {}
    for name, value in listed.items() if isinstance(listed, dict) else ():
        if isinstance(value, str) and _HASH.fullmatch(value):
            yield name, value.lower()


def find_hashed(hashes: Mapping[str, str], files: Iterable[Path]) -> tuple[dict[str, Path], list[str]]:
    """Those of the files that have these hashes, by what the hash is of, and what could not be read, line by line.

    A file is known by the start of its SHA-256, as the web UI gives it for models and embeddings, or by that of all behind a
    safetensors header, as it does for LoRAs. A picture may be an embedding alone.
    """
    wanted = dict(hashes)
    found: dict[str, Path] = {}
    lost = []
    for path in files:
        picture = path.suffix.lower() == ".png"
        asked = {name: value for name, value in wanted.items() if name.startswith("embed:") or not picture}
        if not asked:
            continue
        try:
            digests = _digests(path)
        except OSError as error:
            lost.append(f"{path.name} cannot be read ({error.strerror or error}); it may be what was not found")
            continue
        for name in [name for name, value in asked.items() if any(d.startswith(value) for d in digests)]:
            found[name] = path
            del wanted[name]
    return found, lost


def find_adapters(
    asked: Replay, hashed: Mapping[str, Path], named: Mapping[str, Path]
) -> tuple[list[tuple[LoraTag, Path]], dict[Path, str], list[str]]:
    """→ the LoRAs with their files, the files of embeddings with their words, and what could not be found, line by line.

    hashed: what `find_hashed` found. named: files by their names, for what it did not.
    """
    loras, words, lost = [], {}, []
    told = {name: f"{name} ({value})" for name, value in asked.hashes.items()}
    tags = {f"lora:{hash_name(tag.name)}": tag for tag in asked.loras}
    for name in {**told, **tags}:
        kind, _, stem = name.partition(":")
        path = hashed.get(name)
        if path is None and (name in tags or kind == "embed"):
            path = named.get(tags[name].name if name in tags else stem)
            if path is not None and name in told:
                lost.append(f"{told[name]} was not found; {path.name}, which is taken for it, has another hash")
        if path is None:
            lost.append(f"{told.get(name, name)} was not found")
        elif name in tags:
            loras.append((tags[name], path))
        elif kind == "lora":
            lost.append(f"{name}: the prompt does not say its weight; left out")
        elif kind == "embed":
            words[path] = stem
    return loras, words, lost


def _digests(path: Path) -> tuple[str, str]:
    """SHA-256 of the file, and of what follows a safetensors header."""
    whole, rest = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        whole.update(start)
        header = int.from_bytes(start, "little") if len(start) == 8 and path.suffix.lower() == ".safetensors" else 0
        left = header
        while block := file.read(1 << 20):
            whole.update(block)
            rest.update(block[min(left, len(block)) :])
            left -= min(left, len(block))
    return whole.hexdigest(), rest.hexdigest()
