"""What a picture's file says of how it was made, as a request; and the files that it was made with, found by their hashes."""

import hashlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.cli_adapters import HASHED, by_name, files_under
from fastsd.convert import convert
from fastsd.errors import ImageError
from fastsd.metadata import parse_parameters, save_image
from fastsd.prompt_tags import LoraTag
from fastsd.replay import find_adapters, find_hashed, read_parameters, read_replay
from tests.adapter_builders import kohya_lora, save
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL

WEB_UI = (
    "a (red:1.2) circle, BREAK\nsecond line\n"
    "Negative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
    "Model hash: 6CE0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, Denoising strength: 0.7, "
    'Lora hashes: "ink: 0b1c2d3e4f5a, two: ffeeddccbbaa", TI hashes: "bad-hands: 0123456789ab", '
    'Hires something: 3, Hashes: {"model": "6ce0161689"}, Version: v1.9.3'
)


def test_a_picture_of_the_web_ui_becomes_a_request() -> None:
    replay = read_replay(WEB_UI)
    assert replay.arguments == {
        "prompt": "a (red:1.2) circle, BREAK\nsecond line",
        "negative_prompt": "blurry",
        "num_inference_steps": 20,
        "sampler": "DPM++ 2M",
        "schedule": "Karras",
        "guidance_scale": 7.0,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "prompt_style": "a1111",
        "rng": "gpu",
    }
    assert replay.model == "v1-5-pruned-emaonly"
    assert replay.hashes == {
        "model": "6ce0161689",
        "lora:ink": "0b1c2d3e4f5a",
        "lora:two": "ffeeddccbbaa",
        "embed:bad-hands": "0123456789ab",
    }
    assert any(line.startswith("Denoising strength: it was made from another image") for line in replay.lost)
    assert "Hires something: 3" in replay.lost


def test_a_second_pass_is_replayed() -> None:
    text = WEB_UI.replace("Hires something: 3", "Hires upscale: 1.5, Hires steps: 9, Hires upscaler: Latent")
    replay = read_replay(text)
    asked = {name: value for name, value in replay.arguments.items() if name.startswith("hires")}
    assert asked == {"hires_scale": 1.5, "hires_steps": 9, "hires_strength": 0.7, "hires_upscaler": "latent"}
    unknown = read_replay(
        text.replace("Upscaler: Latent", "upscaler: Latent").replace("er: Latent", "er: R-ESRGAN 4x+")
    )
    assert any("R-ESRGAN" in line for line in unknown.lost)


def test_what_fastsd_lacks_is_named() -> None:
    text = WEB_UI.replace("DPM++ 2M", "Restart").replace("Version: v1.9.3", "RNG: CPU, Version: v1.9.3")
    replay = read_replay(text)
    assert "sampler" not in replay.arguments
    assert any("Restart" in line for line in replay.lost)
    assert not any(line.startswith("RNG") for line in replay.lost), "the noise is the CPU's"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_of_ours_is_drawn_again(pipe: fastsd.Pipeline, tmp_path: Path, suffix: str) -> None:
    drawn = pipe.generate(
        "a small blue square", "red, \u65e5\u672c", num_inference_steps=3, guidance_scale=4.5, seed=5, sampler="Euler a",
        schedule="karras", width=48,
    )  # fmt: skip
    path = save_image(drawn.images[0], tmp_path / f"made{suffix}", drawn.parameters[0])
    replay = read_replay(read_parameters(path))
    assert not replay.lost
    again = pipe.generate(**replay.arguments)
    assert_equal(np.asarray(again.images[0]), np.asarray(drawn.images[0]), "the picture")
    assert again.parameters == drawn.parameters


@pytest.mark.parametrize("style", ["plain", "a1111"])
def test_brackets_are_read_as_they_were(pipe: fastsd.Pipeline, style: str) -> None:
    drawn = pipe.generate("a (red:1.4) circle", prompt_style=style, num_inference_steps=2, seed=1)
    replay = read_replay(drawn.parameters[0])
    assert replay.arguments["prompt_style"] == style
    assert np.array_equal(*(np.asarray(one.images[0]) for one in (drawn, pipe.generate(**replay.arguments))))


def test_the_command(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    out, again = str(tmp_path / "out.png"), str(tmp_path / "again.png")
    asked = ["generate", "-p", "a (large:1.2) red circle", "--steps", "2", "-s", "9", "-o", out]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
    done = CliRunner().invoke(cli.app, ["replay", out, "-o", again])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{again}\tseed 9\n"
    assert Path(again).read_bytes() == Path(out).read_bytes(), "not the same file"


def test_the_command_names_what_it_lacks(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    drawn = pipe.generate("x", num_inference_steps=2, seed=1)
    text = WEB_UI.replace("512x768", "64x64")
    path = save_image(drawn.images[0], tmp_path / "web.png", text)
    done = CliRunner().invoke(cli.app, ["replay", str(path), "-o", str(tmp_path / "out.png")])
    assert done.exit_code == 2
    assert "v1-5-pruned-emaonly (6ce0161689)" in done.stderr
    small_model = str(SMALL_MODEL)
    done = CliRunner().invoke(cli.app, ["replay", str(path), "-m", small_model, "-o", str(tmp_path / "out.png")])
    assert done.exit_code == 0, done.output
    for name in ("model (6ce0161689)", "lora:ink (0b1c2d3e4f5a)", "embed:bad-hands (0123456789ab)"):
        assert f"{name} was not found" in done.stderr


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_parameters(path)
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


def encoded(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", size).save(buffer, kind)
    return buffer.getvalue()


def test_files_that_say_nothing(tmp_path: Path) -> None:
    assert "does not say how it was made" in refused(tmp_path, encoded())
    assert "cannot be read" in refused(tmp_path, b"")
    assert "cannot be read" in refused(tmp_path, encoded()[:30])
    assert "cannot be read" in refused(tmp_path, encoded(kind="GIF"))
    assert "pixels" in refused(tmp_path, encoded((8192, 8192)))
    with pytest.raises(ImageError, match="no settings"):
        read_replay("only a prompt")


def test_a_comment_in_ascii_or_unnamed(tmp_path: Path) -> None:
    for code in (b"ASCII\0\0\0", b"\0" * 8, b"UNICODE\0"):
        exif = Image.Exif()
        text = WEB_UI.encode("utf-16-be" if code == b"UNICODE\0" else "ascii")
        exif.get_ifd(ExifTags.IFD.Exif)[0x9286] = code + text
        path = tmp_path / "file.jpg"
        Image.new("RGB", (8, 8)).save(path, exif=exif)
        assert read_parameters(path) == WEB_UI


def test_files_are_found_by_their_hashes(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    for seed, name in enumerate(["model.safetensors", "lora/ink.safetensors", "lora/other.safetensors"]):
        weights = {"w": torch.randn(400_000, generator=torch.Generator().manual_seed(seed))}
        save_file(weights, tmp_path / name)
    model = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    content = (tmp_path / "lora/ink.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    hashes = {
        "model": model[:10],
        "lora:ink": hashlib.sha256(tensors).hexdigest()[:12],
        "lora:gone": "000000000000",
    }
    found, unread = find_hashed(hashes, files_under([tmp_path]))
    assert found == {"model": tmp_path / "model.safetensors", "lora:ink": tmp_path / "lora/ink.safetensors"}
    assert unread == []


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the LoRA `ink` and the embedding `thing`."""
    pipe, folder = fastsd.Pipeline(SMALL_MODEL, device="cpu"), tmp_path_factory.mktemp("adapters")
    save(kohya_lora(pipe, ("to_q", "fc1")), folder / "ink.safetensors")
    save({"emb_params": torch.ones(2, pipe.text_encoder.config.hidden_size)}, folder / "thing.safetensors")
    return folder


def command(*arguments: str):
    model = [] if "-m" in arguments else ["-m", str(SMALL_MODEL)]
    done = CliRunner().invoke(cli.app, [*arguments, *model, "-q"])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("way", ["tag", "option", "library"])
def test_a_picture_with_adapters_is_drawn_again(adapters: Path, tmp_path: Path, way: str) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    asked = ["generate", "--steps", "2", "-s", "9", "-o", str(out), "--embedding", str(adapters / "thing.safetensors")]
    if way == "tag":
        command(*asked, "-p", "a thing <lora:ink:0.5:0.75>, large", "--lora-dir", str(adapters))
    elif way == "option":
        command(*asked, "-p", "a large thing", "--lora", f"{adapters / 'ink.safetensors'}:-0.5")
    else:
        pipe = fastsd.Pipeline(SMALL_MODEL)
        pipe.load_textual_inversion(adapters / "thing.safetensors")
        pipe.load_lora_weights(adapters / "ink.safetensors")
        drawn = pipe.generate("a (large) thing", num_inference_steps=2, seed=9)
        save_image(drawn.images[0], out, drawn.parameters[0])
    done = command("replay", str(out), "-o", str(again), "--look-in", str(adapters))
    assert done.stderr == "", "something was lost"
    assert again.read_bytes() == out.read_bytes(), "not the same file"
    missing = command("replay", str(out), "-o", str(again))
    assert len(re.findall(r"(lora:ink|embed:thing) \([0-9a-f]{12}\) was not found", missing.stderr)) == 2
    assert not np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(out))), "they make no difference"


def test_a_picture_with_another_vae_is_drawn_again(small_model: Path, tmp_path: Path) -> None:
    out, again, other = tmp_path / "out.png", tmp_path / "again.png", tmp_path / "other.safetensors"
    convert(small_model, other)
    with safe_open(other, "pt") as file:
        tensors, stored = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["first_stage_model.decoder.conv_out.weight"] *= 0.5
    save_file(tensors, other, metadata=stored)
    command("generate", "-p", "a red circle", "--steps", "2", "-s", "9", "-o", str(out), "--vae", str(other))
    fields = parse_parameters(read_parameters(out))
    assert (fields["vae"], fields["vae_hash"]) == (other.name, hashlib.sha256(other.read_bytes()).hexdigest()[:10])
    for option in ("--look-in", str(tmp_path)), ("--vae", str(other)):
        done = command("replay", str(out), "-o", str(again), *option)
        assert again.read_bytes() == out.read_bytes(), f"not the same file by {option[0]}"
        assert ("vae" in done.stderr) == (option[0] == "--vae"), "a hash that was not looked for is not found"
    missing = command("replay", str(out), "-o", str(again))
    assert f"vae ({fields['vae_hash']}) was not found" in missing.stderr
    command("generate", "-p", "a red circle", "--steps", "2", "-o", str(out), "--vae", str(small_model / "vae"))
    assert "made with vae" in command("replay", str(out), "-o", str(again)).stderr, "a folder has no hash to look for"


def test_adapters_by_name_alone(adapters: Path, tmp_path: Path) -> None:
    """Another file of the same name is taken for it, and that is said; tags without a hash, and hashes without a tag."""
    text = WEB_UI.replace("512x768", "64x64").replace("circle,", "circle <lora:ink:0.5> <lora:gone:1>,")
    asked = read_replay(text.replace("bad-hands", "thing"))
    assert asked.loras == [LoraTag("ink", 0.5, 0.5), LoraTag("gone", 1, 1)]
    assert asked.arguments["prompt"] == "a (red:1.2) circle  , BREAK\nsecond line"
    named = {"ink": adapters / "ink.safetensors", "thing": adapters / "thing.safetensors"}
    loras, words, lost = find_adapters(asked, {"lora:two": tmp_path / "two.pt"}, named)
    assert loras == [(LoraTag("ink", 0.5, 0.5), named["ink"])]
    assert words == {named["thing"]: "thing"}
    assert lost == [
        "model (6ce0161689) was not found",
        "lora:ink (0b1c2d3e4f5a) was not found; ink.safetensors, which is taken for it, has another hash",
        "lora:two: the prompt does not say its weight; left out",
        "embed:thing (0123456789ab) was not found; thing.safetensors, which is taken for it, has another hash",
        "lora:gone was not found",
    ]


def test_tags_that_fastsd_cannot_read() -> None:
    replay = read_replay(WEB_UI.replace("circle,", "circle <lora:ink:1:lbw=ALL> <hypernet:old:1>,"))
    assert replay.arguments["prompt"] == "a (red:1.2) circle  , BREAK\nsecond line", "a tag would be encoded"
    assert any("lbw=ALL" in line for line in replay.lost)
    hypernet = read_replay(WEB_UI.replace("circle,", "circle <hypernet:old:1>,"))
    assert "old: fastsd runs no hypernetworks" in hypernet.lost


def test_what_the_library_drew_from_a_tag_was_text(pipe: fastsd.Pipeline) -> None:
    drawn = pipe.generate("x <lora:ink:1>", prompt_style="a1111", num_inference_steps=1, seed=1)
    assert read_replay(drawn.parameters[0]).arguments["prompt"] == "x <lora:ink:1>"


# --- the command, and what it must not do -----------------------------------------------------------------------------


def drawn_by_command(*arguments: str) -> str:
    """What the file says that this writes: out.png in the current folder."""
    command("generate", "--steps", "2", "-s", "9", "-o", "out.png", *arguments)
    return read_parameters("out.png")


def test_the_picture_that_is_replayed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn_by_command("-p", "a red circle")
    made = Path("out.png").read_bytes()
    (tmp_path / "other").mkdir()
    shutil.copy("out.png", "other/photo.PNG")
    Path("link.png").symlink_to("out.png")
    assert command("replay", "out.png").stdout == "out-replay.png\tseed 9\n"
    assert command("replay", "other/photo.PNG").stdout == "photo-replay.PNG\tseed 9\n", "in the current folder"
    shutil.copy("out.png", "no-suffix")
    assert command("replay", "no-suffix").stdout == "no-suffix-replay.png\tseed 9\n"
    for output in ("out.png", "./other/../out.png", str(tmp_path / "out.png"), "link.png"):
        done = CliRunner().invoke(cli.app, ["replay", "out.png", "-o", output])
        assert done.exit_code == 2, output
        assert "--output: is the picture that is to be replayed" in done.stderr
    assert Path("out.png").read_bytes() == made, "the input was overwritten"


def test_tags_that_cannot_be_read_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tags = "<lora:> <lora:x:y> <lora:ink:0.5>,"
    text = WEB_UI.replace("512x768", "64x64").replace("Steps: 20", "Steps: 2").replace("circle,", f"circle {tags}")
    save_image(Image.new("RGB", (64, 64)), "web.png", text)
    done = command("replay", "web.png", "-m", str(SMALL_MODEL))
    assert "none of its tags is replayed" in done.stderr
    again = read_replay(read_parameters("web-replay.png"))
    assert again.arguments["prompt"] == read_replay(text).arguments["prompt"], "it says what was drawn"
    gone = WEB_UI.replace("512x768", "64x64").replace("Steps: 20", "Steps: 2").replace("circle,", "circle <lora:ink:1>")
    save_image(Image.new("RGB", (64, 64)), "web.png", gone)
    command("replay", "web.png", "-m", str(SMALL_MODEL))
    assert "<lora" not in read_parameters("web-replay.png"), "it names a LoRA that was not found"


def test_a_hypernetwork_is_not_said_of_what_was_drawn_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = WEB_UI.replace("512x768", "64x64").replace("Steps: 20", "Steps: 2")
    save_image(Image.new("RGB", (64, 64)), "web.png", text.replace("circle,", "circle <hypernet:old:1>,"))
    done = command("replay", "web.png", "-m", str(SMALL_MODEL))
    assert "old: fastsd runs no hypernetworks" in done.stderr
    assert "hypernet" not in read_parameters("web-replay.png")


def test_a_lora_by_option_and_by_tag(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights add up, and the file says the sum."""
    monkeypatch.chdir(tmp_path)
    option = f"{adapters / 'ink.safetensors'}:0.25"
    text = drawn_by_command("-p", "a <lora:ink:0.5> circle", "--lora", option, "--lora-dir", str(adapters))
    assert text.startswith("a <lora:ink:0.5> circle <lora:ink:0.25>\n")
    assert read_replay(text).loras == [LoraTag("ink", 0.75, 0.75)]
    assert command("replay", "out.png", "--look-in", str(adapters)).stderr == ""
    pictures = (np.asarray(Image.open(name), int) for name in ("out.png", "out-replay.png"))
    assert np.abs(np.subtract(*pictures)).max() <= 1, "0.25 and 0.5 of it round as 0.75 to a level"


def test_two_loras_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In diffusers' folders, which tell them apart, and as files, which a number does."""
    monkeypatch.chdir(tmp_path)
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu")
    for seed, folder in enumerate(["first", "second"]):
        Path(folder).mkdir()
        save(kohya_lora(pipe, ("to_q", "fc1"), seed=seed), Path(folder, "pytorch_lora_weights.safetensors"))
        save(kohya_lora(pipe, ("to_v", "fc2"), seed=seed), Path(folder, "ink.safetensors"))
    files = [
        f"{folder}/pytorch_lora_weights.safetensors:{weight}" for folder, weight in (("first", 0.5), ("second", -1))
    ]
    text = drawn_by_command("-p", "a circle", "--lora", files[0], "--lora", files[1])
    assert read_replay(text).loras == [LoraTag("first", 0.5, 0.5), LoraTag("second", -1, -1)]
    assert command("replay", "out.png", "--look-in", ".").stderr == ""
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes(), "not the same file"
    by_tag = drawn_by_command("-p", "a circle <lora:first:0.5> <lora:second:-1>", "--lora-dir", ".")
    assert by_tag == text
    pipe.load_lora_weights("first", weight_name="ink.safetensors", adapter_name="one")
    pipe.load_lora_weights("second/ink.safetensors", adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -1])
    drawn = pipe.generate("a circle", prompt_style="a1111", num_inference_steps=2, seed=9)
    assert drawn.parameters[0].startswith("a circle <lora:ink:0.5> <lora:ink-2:-1>\n")
    save_image(drawn.images[0], "lib.png", drawn.parameters[0])
    assert command("replay", "lib.png", "--look-in", ".").stderr == ""
    assert_equal(np.asarray(Image.open("lib-replay.png")), np.asarray(drawn.images[0]), "the picture")


def test_two_hashes_of_one_name_are_told() -> None:
    replay = read_replay(WEB_UI.replace("two: ffeeddccbbaa", "ink: FFEEDDCCBBAA, ink: ffeeddccbbaa"))
    (told,) = [line for line in replay.lost if "two hashes" in line][:1]
    assert told == "lora:ink has two hashes, of two files; ffeeddccbbaa is looked for alone"
    assert replay.hashes["lora:ink"] == "ffeeddccbbaa"
    assert not [line for line in read_replay(WEB_UI).lost if "two hashes" in line]


def test_tiles_of_the_vae_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = drawn_by_command("-p", "a circle", "-W", "128", "-H", "96", "--vae-tiling")
    assert ", VAE tiling: True, " in text
    assert command("replay", "out.png").stderr == ""
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes(), "not the same file"
    assert "VAE tiling" not in drawn_by_command("-p", "a circle", "--vae-tiling"), "it fits into one tile"
    assert "VAE tiling" not in drawn_by_command("-p", "a circle", "-W", "128", "-H", "96")


def test_what_no_file_can_hold_is_told(pipe: fastsd.Pipeline) -> None:
    def lost(*prompts: Any, **options: Any) -> list[str]:
        return read_replay(pipe.generate(*prompts, num_inference_steps=1, **options).parameters[0]).lost

    assert lost("x", seed=1) == []
    assert lost("x", generator=torch.Generator().manual_seed(1)) == ["Seed: the file has none; a random one is taken"]
    (told,) = lost(prompt_embeds=pipe.encode_prompt("x"), seed=1)
    assert told == "Made with embeddings in the place of a prompt: that is not replayed"
    (told,) = lost("x", latents=torch.zeros(1, pipe.config.vae.latent_channels, 16, 16), seed=1)
    assert told == "Made with latents of its own: that is not replayed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Steps: 20", "Steps: 100001"), "num_inference_steps: "),
        (("512x768", "63x64"), "width: "),
        (("circle,", "circle <lora:ink:1e9>,"), "adapter_weights: "),
    ],
)
def test_the_file_is_blamed_for_what_it_asks(
    adapters: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = WEB_UI.replace(*change).replace("512x768", "64x64").replace("Steps: 20", "Steps: 2")
    save_image(Image.new("RGB", (64, 64)), tmp_path / "web.png", text)
    options = ["-m", str(SMALL_MODEL), "--look-in", str(adapters), "-o", str(tmp_path / "out.png")]
    done = CliRunner().invoke(cli.app, ["replay", str(tmp_path / "web.png"), *options, "-q"])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"fastsd: error: web.png asks for what cannot be drawn: {message}"), done.stderr
    assert not (tmp_path / "out.png").exists()


# --- files as they come -----------------------------------------------------------------------------------------------


def test_pixels_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(Image.new("RGB", (64, 64)), tmp_path / "out.png", WEB_UI)
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "x"  # without one Pillow takes it for empty
    exif.get_ifd(ExifTags.IFD.Exif)[0x9286] = b"UNICODE\0" + WEB_UI.encode("utf-16-be")
    Image.new("RGB", (64, 64)).save(tmp_path / "exif.png", exif=exif)
    content = path.read_bytes()
    start, end = content.index(b"tEXt") - 4, content.index(b"IDAT") - 4
    (tmp_path / "behind.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert read_parameters(tmp_path / "exif.png") == read_parameters(tmp_path / "behind.png") == WEB_UI
    (tmp_path / "large.png").write_bytes(encoded((8192, 8192)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("the picture is decoded"))
    assert read_parameters(path) == WEB_UI
    with pytest.raises(ImageError, match="8192x8192 pixels"):
        read_parameters(tmp_path / "large.png")
    path.write_bytes(path.read_bytes()[:-40])
    assert read_parameters(path) == WEB_UI, "the text is intact"


def test_only_files_are_read(tmp_path: Path) -> None:
    """Not folders, links that lead nowhere, or pipes, which would be waited for."""
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "ink.safetensors").write_bytes(b"abc")
    assert files_under([tmp_path], HASHED) == [tmp_path / "ink.safetensors"]
    assert by_name([tmp_path]) == {"ink": tmp_path / "ink.safetensors"}
    for name in ("pipe.png", "folder.png", "gone.safetensors", "nothing", "nul\0"):
        with pytest.raises(ImageError, match="cannot be read: there is no such file"):
            read_parameters(tmp_path / name)
    found, unread = find_hashed({"model": "ba7816bf8f"}, [tmp_path / "gone.safetensors", tmp_path / "ink.safetensors"])
    assert found == {"model": tmp_path / "ink.safetensors"}
    assert unread == ["gone.safetensors cannot be read (No such file or directory); it may be what was not found"]
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "web.png", WEB_UI)
    done = CliRunner().invoke(cli.app, ["replay", str(path), "--look-in", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "--look-in: " in done.stderr
    assert "none' is no folder" in done.stderr


def test_every_kind_of_file_is_looked_at(tmp_path: Path) -> None:
    names = ["INK.SAFETENSORS", "wash.bin", "old.CKPT", "thing.PNG"]
    save_file({"w": torch.ones(3)}, tmp_path / names[0])
    for name in names[1:]:
        (tmp_path / name).write_bytes(name.encode())
    tensors = np.ones(3, np.float32).tobytes()
    contents = [tensors, *(name.encode() for name in names[1:])]
    hashes = dict(
        zip(
            ["lora:ink", "lora:wash", "model", "embed:thing"],
            [hashlib.sha256(content).hexdigest()[:12] for content in contents],
            strict=True,
        )
    )
    found, unread = find_hashed(hashes, files_under([tmp_path], HASHED))
    assert {name: path.name for name, path in found.items()} == dict(zip(hashes, names, strict=True))
    assert unread == []
    assert by_name([tmp_path]).keys() == {"INK", "wash", "old"}, "a picture beside a LoRA is its preview"
    picture = {"model": hashes["embed:thing"]}
    assert find_hashed(picture, [tmp_path / "thing.PNG"])[0] == {}, "no picture is a model"
