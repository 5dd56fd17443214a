"""What an image was made with, written into its file as AUTOMATIC1111's web UI writes it, and read back.

    a red circle
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 64x64, …, Version: fastsd-0.1.0

PNG holds it in a text chunk named `parameters`, JPEG and WebP in EXIF's UserComment. A value with `,`, `:` or a newline in it
is a JSON string. The settings are always the last line, so prompts of any number of lines survive, lines like "Steps: 3" too.
What the format cannot tell apart: a prompt's own line that starts with "Negative prompt: " begins the negative prompt when
read (the first such line does, as in the web UI), and a text without settings whose last line looks like three or more
of them loses that line to them.
"""

import errno
import io
import json
import math
import numbers
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fastsd.errors import ImageError, ParameterError

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

RNG_LABELS = {"cpu": "CPU", "gpu": "NV"}
"""Our names of what draws the noise, and the web UI's; its default, "GPU", draws the same as "NV"."""

_NEGATIVE = "Negative prompt:"
_MIN_SETTINGS = 3  # fewer `key: value` pairs on the last line, and it is part of the prompt: the web UI's rule

_USER_COMMENT = 0x9286
_UNICODE = b"UNICODE\0"  # EXIF 2.3's character code; the web UI follows it with big-endian UTF-16

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}
_MODES = {"PNG": ("L", "RGB", "RGBA"), "JPEG": ("L", "RGB"), "WEBP": ("RGB", "RGBA")}


def _whole(value: Any) -> int:
    text_is_wrong = isinstance(value, str) and not re.fullmatch("-?[0-9]{1,20}", value)
    if text_is_wrong or isinstance(value, bool) or not isinstance(value, str | numbers.Integral):
        raise ValueError("a whole number")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise ValueError("a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _tiling(value: Any) -> bool | str:
    known: dict[str, bool | str] = {"True": True, "False": False, "x": "x", "y": "y"}
    if str(value) not in known:
        raise ValueError("True, False, x or y")
    return known[str(value)]


def _flag(value: Any) -> bool:
    if str(value) not in ("True", "False"):
        raise ValueError("True or False")
    return str(value) == "True"


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


# (field, the label it is written under, how its value is checked), in the order of writing. Width and height are one Size.
_SETTINGS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("steps", "Steps", _whole),
    ("sampler", "Sampler", _string),
    ("schedule_type", "Schedule type", _string),
    ("cfg_scale", "CFG scale", _number),
    ("seed", "Seed", _whole),
    ("size", "Size", _string),
    ("model_hash", "Model hash", _string),
    ("model", "Model", _string),
    ("vae_hash", "VAE hash", _string),
    ("vae", "VAE", _string),
    ("vae_tiling", "VAE tiling", _flag),
    ("clip_skip", "Clip skip", _whole),
    ("variation_seed", "Variation seed", _whole),
    ("variation_strength", "Variation seed strength", _number),
    ("denoising_strength", "Denoising strength", _number),
    ("mask_blur", "Mask blur", _number),
    ("padding", "Masked area padding", _whole),
    ("tiling", "Tiling", _tiling),
    ("hires_scale", "Hires upscale", _number),
    ("hires_steps", "Hires steps", _whole),
    ("hires_upscaler", "Hires upscaler", _string),
    ("emphasis", "Emphasis", _string),
    ("eta", "Eta DDIM", _number),
    ("guidance_rescale", "CFG rescale", _number),
    ("rng", "RNG", _string),
    ("step_noise", "Step noise", _string),
    ("lora_hashes", "Lora hashes", _string),
    ("ti_hashes", "TI hashes", _string),
    ("made_with", "Made with", _string),
    ("version", "Version", _string),
)
_BY_LABEL = {label: (field, check) for field, label, check in _SETTINGS}
_REQUIRED = ("prompt", "steps", "sampler", "cfg_scale", "width", "height")
_KNOWN = {*_REQUIRED, "negative_prompt", *(field for field, _, _ in _SETTINGS)} - {"size"}


def format_parameters(fields: Mapping[str, Any]) -> str:
    """The web UI's text for one image.

    fields: prompt, steps, sampler (the web UI's label), cfg_scale, width and height (pixels); optional, left out when None
    or "": negative_prompt, schedule_type, seed, model_hash, model, vae_hash, vae, vae_tiling (whether the VAE ran in tiles),
    clip_skip (the web UI's count, also left out at 1), variation_seed, variation_strength, denoising_strength, mask_blur
    (pixels), padding (of the masked area, pixels), tiling, hires_scale, hires_steps, hires_upscaler, emphasis, eta,
    guidance_rescale, rng, step_noise, lora_hashes and ti_hashes ("name: hash, name: hash"), made_with (what no setting can
    say), version (default: this fastsd).
    ParameterError names a field that is unknown, missing or of the wrong kind.
    """
    unknown = sorted(set(fields) - _KNOWN)
    if unknown:
        raise ParameterError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_KNOWN))}")
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise ParameterError(f"{missing[0]} is missing; an image's parameters need {', '.join(_REQUIRED)}")
    values = dict(fields)
    values["size"] = f"{_checked('width', _whole, values['width'])}x{_checked('height', _whole, values['height'])}"
    values.setdefault("version", f"fastsd-{_version()}")
    if values.get("clip_skip") == 1:
        del values["clip_skip"]
    prompt, negative = (_checked(name, _string, values.get(name) or "") for name in ("prompt", "negative_prompt"))
    settings = [
        f"{label}: {_quote(_spell(_checked(field, check, values[field])))}"
        for field, label, check in _SETTINGS
        if values.get(field) not in (None, "")
    ]
    lines = [prompt] if prompt else []
    lines += [f"{_NEGATIVE} {negative}"] if negative else []
    return "\n".join([*lines, ", ".join(settings)])


def parse_parameters(text: str) -> dict[str, Any]:
    """The fields of a text that `format_parameters` or the web UI wrote, in time linear in its length.

    `prompt` and `negative_prompt` are always there, the other fields of `format_parameters` where the text has them.
    Settings of other names (Face restoration, VAE hash, …), and known ones whose value is of the wrong kind, are
    strings under `extra`, by their label. Any text parses: without settings it is all prompt.
    """
    head, _, last = text.rstrip().rpartition("\n")
    settings = _read_settings(last)
    if len(settings) < _MIN_SETTINGS:
        head, settings = text, {}
    prompt, negative = _split_prompts(head)
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    extra: dict[str, str] = {}
    for label, value in settings.items():
        try:
            fields |= _field(label, value)
        except (KeyError, ValueError):
            extra[label] = value
    return fields | {"extra": extra} if extra else fields


def save_image(image: Image.Image, path: str | Path, parameters: str | None = None) -> Path:
    """Write an image with its parameters; the file appears whole or not at all, and an existing one is replaced.

    The suffix decides: .png, .jpg or .jpeg (quality 95, no chroma subsampling), .webp (quality 95). The same image and text
    give the same bytes. Nothing else that the image carries (EXIF, comments, profiles) is written. A NUL, which a text chunk
    cannot hold, becomes U+FFFD. ImageError says what to do about a bad name, a full disk or a folder one may not write to.
    """
    path = check_output_path(path)
    content = _encode(image, SUFFIXES[path.suffix.lower()], parameters, path)
    temporary = (
        path.parent / f".fastsd-{secrets.token_hex(8)}.tmp"
    )  # in the same folder: a rename across disks is a copy
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a network disk may say only here that it is full
        os.replace(temporary, path)
    except OSError as error:
        raise ImageError(f"cannot write {path}: {_advice(error)}") from error
    finally:  # a Ctrl-C passes here as well
        temporary.unlink(missing_ok=True)
    return path


def check_output_path(path: str | Path) -> Path:
    """The path, if an image can be written there; else ImageError. To be asked before hours of work, not after."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"cannot write {str(path)!r}: the name must end in {', '.join(SUFFIXES)}")
    if "\0" in str(path):
        raise ImageError(f"cannot write {str(path)!r}: a name cannot hold a NUL; choose another one")
    try:
        is_folder, parent_exists = path.is_dir(), path.parent.is_dir()
    except OSError as error:  # a name too long, a folder one may not look into
        raise ImageError(f"cannot write {path}: {_advice(error)}") from error
    if is_folder:
        raise ImageError(f"cannot write {path}: it is a folder; give the name of a file in it")
    if not parent_exists:
        raise ImageError(f"cannot write {path}: there is no folder {str(path.parent)!r}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ImageError(f"cannot write {path}: {_advice(PermissionError(errno.EACCES, ''))}")
    return path


def hash_name(name: str) -> str:
    """What a file is called in a list of hashes: without the marks that part them."""
    return name.translate({ord(mark): None for mark in ":,"})


def file_name(name: str) -> str:
    """A file's name as it can be written into a picture: what of it is not UTF-8 becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def _checked(name: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ParameterError(f"{name} must be {error}, not {value!r}") from None


def _spell(value: int | float | str) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)  # 7, not 7.0
    return str(value)


def _quote(value: str) -> str:
    # The web UI quotes for the first three only. What is added here would otherwise be lost to its own reader.
    ambiguous = any(mark in value for mark in ",:\n") or value.startswith('"') or value != value.strip()
    return json.dumps(value, ensure_ascii=False) if ambiguous else value


def _version() -> str:
    from fastsd import __version__  # the package imports the pipeline, and that this file

    return __version__


_LABEL = re.compile(r"\s*(\w[\w \-/]{0,79}):\s*")
_QUOTED = re.compile(r'("(?:\\.|[^\\"])*")\s*(?:,|$)')


def _read_settings(line: str) -> dict[str, str]:
    """`a: b, c: "d, e"` as {"a": "b", "c": "d, e"}. A part without a label is passed over; of two alike the last counts."""
    settings: dict[str, str] = {}
    position = 0
    while position < len(line):
        label = _LABEL.match(line, position)
        start = label.end() if label else position
        quoted = _QUOTED.match(line, start) if label else None
        end = quoted.end() if quoted else _next_comma(line, start)
        if label:
            settings[label[1]] = _unquote(quoted[1]) if quoted else line[start:end].removesuffix(",").strip()
        position = end
    return settings


def _next_comma(line: str, position: int) -> int:
    comma = line.find(",", position)
    return len(line) if comma < 0 else comma + 1


def _unquote(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _split_prompts(text: str) -> tuple[str, str]:
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if line == _NEGATIVE or line.startswith(f"{_NEGATIVE} "):
            first = line.removeprefix(_NEGATIVE).removeprefix(" ")
            return "\n".join(lines[:index]), "\n".join([first, *lines[index + 1 :]])
    return text, ""


def _field(label: str, value: str) -> dict[str, Any]:
    """One setting as a field, or two; KeyError for an unknown label, ValueError for a value of the wrong kind."""
    if label == "Size":
        size = re.fullmatch("([0-9]{1,7})x([0-9]{1,7})", value)
        if size is None:
            raise ValueError(value)
        return {"width": int(size[1]), "height": int(size[2])}
    field, check = _BY_LABEL[label]
    return {field: check(value)}


def _encode(image: Image.Image, kind: str, parameters: str | None, path: Path) -> bytes:
    """The file's bytes, made in memory so that what fails here leaves nothing on the disk."""
    clean = image.copy() if image.mode in _MODES[kind] else image.convert("RGB")
    clean.info = {}  # Pillow copies comments, profiles and resolution from here into the file
    options = dict(_SAVE_OPTIONS[kind])
    buffer = io.BytesIO()
    try:
        if parameters is not None:
            options |= _embedded(parameters.replace("\0", "\ufffd"), kind)
        clean.save(buffer, kind, **options)
    except UnicodeEncodeError as error:
        raise ImageError(
            f"cannot write {path}: its parameters hold a lone surrogate; decode the prompt as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot write {path} as {kind} ({error}); .png has no such limit") from error
    return buffer.getvalue()


def _embedded(parameters: str, kind: str) -> dict[str, Any]:
    if kind == "PNG":
        info = PngInfo()
        info.add_text("parameters", parameters)  # tEXt; iTXt where the text is not Latin-1
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[_USER_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    return {"exif": exif}


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full; free some space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "you may not write to its folder; choose another one"
    return f"{error.strerror or error}; choose another name or folder"
