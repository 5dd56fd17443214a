"""The command line: `fastsd generate | replay | compile | verify | convert | info | samplers`, also as `python -m fastsd`.

Results (paths and seeds, tables) go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 a wrong option or
value, 130 interrupted. An error is one line, what is wrong and how to mend it; --debug puts the traceback before it.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastsd import cli_options as options
from fastsd.cli_adapters import HASHED, by_name, check_folders, files_under, load_adapters, tagged, weighted, weights_of
from fastsd.cli_preview import check_preview, with_preview
from fastsd.cli_program import app, one_line
from fastsd.errors import ImageError, ParameterError, PromptError
from fastsd.metadata import SUFFIXES, check_output_path, save_image
from fastsd.progress import progress
from fastsd.prompt_tags import Tagged, take_tags, with_prompt, without_tags

# What is slow to import (torch and what needs it) is imported inside the commands: help and usage errors do without.
if TYPE_CHECKING:
    from fastsd import Pipeline
    from fastsd.result import Result

INIT_STRENGTH = 0.75  # as AUTOMATIC1111's web UI; with a mask the library's


def main() -> None:
    """The console entry point. Always leaves through SystemExit."""
    app(prog_name="fastsd")


@app.command()
def generate(
    prompt: options.Prompt,
    negative_prompt: options.NegativePrompt = "",
    prompt_style: options.PromptStyle = "a1111",
    model: options.Model = None,
    steps: options.Steps = 20,
    cfg_scale: options.CfgScale = 7.5,
    seed: options.Seed = -1,
    width: options.Width = None,
    height: options.Height = None,
    batch: options.Batch = 1,
    sampling_method: options.SamplingMethod = None,
    scheduler: options.Scheduler = None,
    timesteps: options.Timesteps = None,
    sigmas: options.Sigmas = None,
    guidance_rescale: options.GuidanceRescale = 0.0,
    clip_skip: options.ClipSkip = 1,
    eta: options.Eta = None,
    lora: options.Lora = None,
    lora_dir: options.LoraDir = None,
    embedding: options.Embedding = None,
    init_image: options.InitImage = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    mask_blur: options.MaskBlur = None,
    only_masked: options.OnlyMasked = None,
    paste_back: options.PasteBack = False,
    hires_scale: options.HiresScale = None,
    hires_steps: options.HiresSteps = None,
    hires_strength: options.HiresStrength = None,
    hires_upscaler: options.HiresUpscaler = None,
    variation_seed: options.VariationSeed = None,
    variation_strength: options.VariationStrength = None,
    rng: options.Rng = "cpu",
    step_noise: options.StepNoise = "independent",
    tiling: options.Tiling = None,
    vae_tiling: options.VaeTiling = None,
    preview: options.Preview = None,
    preview_every: options.PreviewEvery = None,
    taesd: options.Taesd = None,
    output: options.Output = Path("out.png"),
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    variant: options.Variant = None,
    revision: options.Revision = None,
    vae: options.Vae = None,
    use_ema: options.UseEma = False,
    prediction_type: options.PredictionType = None,
    allow_pickle: options.AllowPickle = False,
    debug: options.Debug = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw images from a prompt. Prints each file's path and seed, a tab between."""
    asked: dict[str, Any] = {
        "image": init_image,
        "strength": INIT_STRENGTH if strength is None and init_image and not mask else strength,
        "mask_image": mask,
        "mask_blur": mask_blur,
        "padding_mask_crop": only_masked,
        "paste_back": paste_back or None,
        "timesteps": _numbers("timesteps", timesteps),
        "sigmas": _numbers("sigmas", sigmas),
        "guidance_rescale": guidance_rescale or None,
        "hires_scale": hires_scale,
        "hires_steps": hires_steps,
        "hires_strength": hires_strength,
        "hires_upscaler": hires_upscaler,
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "tiling": options.TILINGS[tiling] or None,
        "vae_tiling": vae_tiling,
        "rng": rng,
        "step_noise": step_noise,
    }
    paths = _output_paths(output, batch)
    check_preview(preview, preview_every, taesd)
    prompt = _read_prompt(prompt)
    tags = take_tags(prompt) if prompt_style == "a1111" else Tagged(prompt, [], [])
    loras = [*map(weighted, lora or ()), *tagged(tags.loras, lora_dir or [])]
    for name in tags.hypernets:
        typer.echo(f"fastsd: warning: {one_line(name)}: fastsd runs no hypernetworks; left out", err=True)
    if tags.hypernets:
        prompt = without_tags(prompt, "hypernet")  # nor is it said of the picture
    pipe = load_pipeline(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        variant=variant,
        revision=revision,
        allow_pickle=allow_pickle,
        vae=vae,
        use_ema=use_ema,
        prediction_type=prediction_type,
    )
    load_adapters(pipe, loras, dict.fromkeys(embedding or ()), allow_pickle)
    with progress(quiet) as on_step:
        result = pipe.generate(
            tags.text,
            negative_prompt=negative_prompt,
            prompt_style=prompt_style,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            num_images_per_prompt=batch,
            eta=eta,
            seed=None if seed == -1 else seed,
            sampler=sampling_method,
            schedule=scheduler,
            clip_skip=None if clip_skip == 1 else clip_skip - 1,  # the library counts as diffusers does
            callback_on_step_end=with_preview(on_step, pipe, preview, preview_every, taesd),
            **{name: value for name, value in asked.items() if value is not None},  # else the library's defaults
        )
    for warning in result.warnings:
        typer.echo(f"fastsd: warning: {one_line(warning)}", err=True)
    _save(result, paths, tags.text, prompt)
    if not quiet:
        typer.echo(", ".join(f"{stage} {ms:.0f} ms" for stage, ms in result.timings.items()), err=True)


@app.command()
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP that fastsd or the web UI made.")],
    model: options.Model = None,
    vae: options.Vae = None,
    look_in: Annotated[
        list[Path] | None, typer.Option("--look-in", help="Folders whose files may be those that it was made with.")
    ] = None,
    output: options.ReplayOutput = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    allow_pickle: options.AllowPickle = False,
    debug: options.Debug = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a picture again by what its file says, and name all that could not be found. Prints the file's path and seed."""
    from fastsd.pipeline import BUNDLED
    from fastsd.replay import find_adapters, find_hashed, read_parameters, read_replay

    paths = _output_paths(output or _replayed(image), 1)
    if os.path.exists(paths[0]) and os.path.exists(image) and os.path.samefile(paths[0], image):
        raise ParameterError("--output: is the picture that is to be replayed; choose another name")
    check_folders("--look-in", look_in or [])
    asked = read_replay(read_parameters(image))
    found, unread = find_hashed(asked.hashes, files_under(look_in or [], HASHED))
    if model is None and asked.model != BUNDLED.name:
        if "model" not in found:
            made_with = f"{asked.model or 'a model that it does not name'} ({asked.hashes.get('model', 'no hash')})"
            raise ParameterError(
                f"model: the picture was made with {made_with}; give it, or a folder of it to --look-in"
            )
        model = str(found["model"])
    loras, words, lost = find_adapters(asked, found, by_name(look_in or []))
    if vae is None and "vae" in found:
        vae = str(found["vae"])
    elif vae is None and asked.vae and "vae" not in asked.hashes:
        lost.append(f"VAE: the picture was made with {asked.vae}; the model's own is taken, give that one by --vae")
    pipe = load_pipeline(model, vae=vae, device=device, dtype=dtype, backend=backend, allow_pickle=allow_pickle)
    try:
        load_adapters(pipe, [(str(path), weights_of(tag)) for tag, path in loras], words, allow_pickle)
        with progress(quiet) as on_step:
            result = pipe.generate(**asked.arguments, callback_on_step_end=on_step)
    except (ParameterError, PromptError) as error:  # no option's fault
        raise ImageError(f"{image.name} asks for what cannot be drawn: {error}") from error
    for line in [*lost, *unread, *asked.lost, *result.warnings]:
        typer.echo(f"fastsd: warning: {one_line(line)}", err=True)
    _save(result, paths, asked.arguments["prompt"], asked.prompt)


def _save(result: "Result", paths: list[Path], text: str, prompt: str) -> None:
    """The images into their files, each told with its seed. text: what `take_tags` left of the prompt, and was drawn."""
    for image, path, image_seed, parameters in zip(
        result.images, paths, result.seeds or [], result.parameters, strict=True
    ):
        save_image(image, path, with_prompt(parameters, text, prompt))
        typer.echo(f"{one_line(str(path))}\tseed {image_seed}")


def _replayed(image: Path) -> Path:
    """photo.png → photo-replay.png, in the current folder."""
    return Path(f"{image.stem}-replay{image.suffix if image.suffix.lower() in SUFFIXES else '.png'}")


def _output_paths(output: Path, batch: int) -> list[Path]:
    """out.png, or out-0.png, out-1.png, … ; refused here rather than after the work."""
    paths = [output] if batch == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(batch)]
    try:
        check_output_path(output)
        for path in paths:
            check_output_path(path)
    except ImageError as error:
        raise ParameterError(f"--output: {error}") from error
    return paths


def _numbers(name: str, given: str | None) -> list[float] | None:
    try:
        return None if given is None else [float(number) for number in given.split(",")]
    except ValueError as error:
        raise ParameterError(f"{name}: {one_line(given or '')!r} must be numbers with commas between") from error


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    from fastsd.tokenizer import MAX_PROMPT_BYTES

    try:  # one byte more than allowed, so that too long a prompt is refused and not cut
        return sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt on standard input is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def load_pipeline(model: str | None, **options: Any) -> "Pipeline":
    # The pipeline logs what it also returns as `warnings`; without a handler Python would print it a second time.
    logging.getLogger("fastsd").addHandler(logging.NullHandler())
    import fastsd

    return fastsd.Pipeline(**options) if model is None else fastsd.Pipeline.from_pretrained(model, **options)


from fastsd import cli_tools as cli_tools  # noqa: E402 -- the other commands, listed after these
from fastsd import cli_train as cli_train  # noqa: E402
