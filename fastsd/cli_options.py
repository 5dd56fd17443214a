"""The options of `fastsd generate`, in the order of its help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Prompt = Annotated[str, typer.Option("--prompt", "-p", help='What to draw; "-" reads it from standard input.')]
NegativePrompt = Annotated[str, typer.Option("--negative-prompt", "-n", help="What to keep away from.")]
PromptStyle = Annotated[
    str, typer.Option(help="a1111: (more:1.2) [less] BREAK, any length; plain: no syntax, 77 tokens.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A diffusers folder, a single file or a Hub id.", show_default="the bundled one"
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="Sampling steps.")]
CfgScale = Annotated[float, typer.Option("--cfg-scale", help="Guidance: how closely to follow the prompt.")]
Seed = Annotated[int, typer.Option("--seed", "-s", help="Of the first image; the next take seed + 1, …; -1 is random.")]
Width = Annotated[
    int | None, typer.Option("--width", "-W", help="Pixels, a multiple of 8.", show_default="the model's")
]
Height = Annotated[
    int | None, typer.Option("--height", "-H", help="Pixels, a multiple of 8.", show_default="the model's")
]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Images to draw: out-0.png, out-1.png, ….")]
SamplingMethod = Annotated[
    str | None, typer.Option(help="A name that `fastsd samplers` lists.", show_default="the model's")
]
Scheduler = Annotated[
    str | None, typer.Option(help="The spacing of the steps, e.g. karras.", show_default="the sampler's")
]
Timesteps = Annotated[
    str | None, typer.Option(metavar="T,T,…", help="The timesteps to take, falling, instead of --steps.")
]
Sigmas = Annotated[
    str | None, typer.Option(metavar="S,S,…", help="The noise levels to take, falling, instead of --steps.")
]
GuidanceRescale = Annotated[float, typer.Option(help="How far to pull the contrast of guidance back, 0 to 1.")]
ClipSkip = Annotated[
    int, typer.Option(min=1, help="The CLIP layer to stop at, from the end: 2 is the one before the last.")
]
Eta = Annotated[
    float | None, typer.Option(help="Noise of DDIM or γ of TCD, 0 to 1.", show_default="0 for DDIM, 0.3 for TCD")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:WEIGHT]", help="A LoRA, LoHa or LoKr to merge, at weight 1 if none is said; again for more."
    ),
]
LoraDir = Annotated[
    list[Path] | None,
    typer.Option(
        envvar="FASTSD_LORA_DIR", help="Where the files lie that <lora:name:0.8> in the prompt means. Again for more."
    ),
]
Embedding = Annotated[
    list[Path] | None,
    typer.Option(help="A textual inversion; its word is the file's own, or its name. Again for more."),
]
InitImage = Annotated[
    Path | None, typer.Option("--init-image", "-i", help="Begin from this picture; the size is its own.")
]
Strength = Annotated[
    float | None, typer.Option(help="Share of the steps that change it, 0 to 1.", show_default="0.75, with a mask 1")
]
Mask = Annotated[Path | None, typer.Option(help="Paint the picture where this one is white; of its size.")]
MaskBlur = Annotated[float | None, typer.Option(help="Pixels to soften the mask's edge by; pastes back.")]
OnlyMasked = Annotated[
    int | None,
    typer.Option(metavar="PADDING", help="Paint the mask's surroundings alone, enlarged, so many pixels round it."),
]
PasteBack = Annotated[bool, typer.Option("--paste-back", help="Outside the mask keep the picture bit for bit.")]
HiresScale = Annotated[float | None, typer.Option(help="Draw so many times larger in a second pass, 1 to 8.")]
HiresSteps = Annotated[int | None, typer.Option(help="Steps of the second pass.", show_default="as many")]
HiresStrength = Annotated[float | None, typer.Option(help="Strength of the second pass, 0 to 1.", show_default="0.7")]
HiresUpscaler = Annotated[str | None, typer.Option(help="latent, latent-nearest or lanczos.", show_default="latent")]
VariationSeed = Annotated[
    int | None,
    typer.Option(help="Whose noise to turn to: of the first image; the next take the next.", show_default="random"),
]
VariationStrength = Annotated[
    float | None, typer.Option(help="How far to turn to it, 0 to 1; all images then share --seed.")
]
Rng = Annotated[str, typer.Option(help="Whose noise a seed stands for: cpu; gpu is CUDA's and the web UI's.")]
StepNoise = Annotated[
    str, typer.Option(help="Noise of the SDE samplers' steps: independent, or brownian as in web UIs.")
]
TILINGS: dict[str | None, bool | str] = {None: False, "x": "x", "y": "y", "both": True}
"""The command line's words for the library's."""
Tiling = Annotated[
    Literal["x", "y", "both"] | None,
    typer.Option(help="Opposite edges that shall meet, left and right (x) or top and bottom: the picture tiles."),
]
VaeTiling = Annotated[
    bool | None,
    typer.Option(
        "--vae-tiling/--no-vae-tiling",
        help="Take large pictures through the VAE in tiles.",
        show_default="after running out of memory",
    ),
]
Preview = Annotated[Path | None, typer.Option(help="Show here what is being drawn: a file that is written anew.")]
PreviewEvery = Annotated[int | None, typer.Option(min=1, help="Steps from one preview to the next.", show_default="5")]
Taesd = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="TAESD's decoder, for finer previews.", show_default="a linear map of the latents"
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")]
ReplayOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="A .png, .jpg or .webp file.", show_default="the picture's name with -replay behind it"
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Backend = Annotated[str, typer.Option(help="auto, reference (plain PyTorch), or one that `fastsd info` lists.")]
Variant = Annotated[str | None, typer.Option(help="Which weight files of the model, e.g. fp16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Vae = Annotated[
    str | None,
    typer.Option(help="Another autoencoder: a folder, a single file or a Hub id.", show_default="the model's"),
]
UseEma = Annotated[bool, typer.Option("--use-ema", help="Of a single file take the averaged UNet.")]
PredictionType = Annotated[
    str | None,
    typer.Option(help="epsilon or v_prediction.", show_default="what the checkpoint says, or is taken for"),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickles: .bin, .ckpt, .pt (never code).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no timings.")]
