"""What happens to a prompt, from top to bottom.

prompt ─tokenizer─► tokens [P, 77] ─CLIP─► context [2B, 77, C] ──────────┐ (cross-attention K/V: once a prompt)
seed ─► latents [B, H/8, W/8, 4] ─► UNet × n, each followed by one row of ─► VAE decode ─► image [B, H, W, 3]
sampler ─► table (timesteps, update matrices): once, in fp64, on the host ─┘
"""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd import compiling, images
from fastsd.adapters import TextualInversions
from fastsd.backends import select_ops
from fastsd.callbacks import after_step
from fastsd.checkpoints import open_model
from fastsd.checks import choice, float_tensor, text_or_none
from fastsd.config import ModelConfig
from fastsd.denoise import Walk
from fastsd.device import Stopwatch, computing, select_device, select_dtype
from fastsd.errors import CheckpointError, ParameterError
from fastsd.hires import check_hires, enlarge, walks
from fastsd.image_source import Source, check_count, check_source, put_back
from fastsd.noise import NoiseSource
from fastsd.ops import Ops
from fastsd.prompt import encode_prompts, encode_request
from fastsd.prompt_cache import ContextCache
from fastsd.request import Request, StepCallback, check_request, check_seeds, check_texts
from fastsd.result import Result, describe
from fastsd.sampling import SAMPLERS, NoiseSchedule, make_table
from fastsd.stages import Stages, check_vocabulary
from fastsd.start import Beginner, Start
from fastsd.tokenizer import Tokenizer
from fastsd.wording import quoted

BUNDLED = Path(__file__).parent / "assets" / "shapes-64"
logger = logging.getLogger("fastsd")


class Pipeline(Stages):
    """A Stable Diffusion model, ready to draw. `Pipeline()` is the small model that comes with fastsd.

    But for the adapters it was given, its methods keep no state between calls: threads may share one Pipeline, and each gets
    what it would get alone. Adapters are swapped when no call is running.
    """

    def __init__(
        self,
        model: str | Path = BUNDLED,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str | Ops = "auto",
        variant: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        use_ema: bool = False,
        prediction_type: str | None = None,
        graphs: bool = True,
    ) -> None:
        """Load a model: a diffusers folder, a single file, or a Hugging Face Hub id (`owner/name`).

        device: "auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1". dtype: "auto" (fp16 on cuda, fp32 on the
        cpu), "float32", "float16", "bfloat16" or a torch.dtype. backend: "auto"; "reference" is plain PyTorch, "onednn" that
        with packed weights on the CPU, "triton" our kernels on the GPU; or an `fastsd.ops.Ops` of your own mixing.
        variant: which weight files, e.g. "fp16". revision, token, cache_dir, local_files_only: as huggingface_hub takes
        them. allow_pickle: also read `.bin` and `.ckpt` weights (never code). use_ema: a single file's averaged UNet.
        prediction_type: "epsilon" or "v_prediction", where the checkpoint says it wrong or, as SD 2.x single files, not at all.
        graphs: on a GPU, capture each stage of a size in a CUDA graph the second time it is drawn; 4 GiB bound them.

        Raises CheckpointError (HubError for the Hub) if the model cannot be had or is not SD 1.x or 2.x, and
        ParameterError for the arguments.
        """
        if not isinstance(model, str | Path):
            raise ParameterError(f"model: must be a folder, a file or a Hub id, not {quoted(model)}")
        for name, value in {"variant": variant, "revision": revision}.items():
            text_or_none(name, value)
        chosen = select_device(device)
        chosen_dtype = select_dtype(dtype, chosen)
        ops = backend if isinstance(backend, Ops) else select_ops(backend, chosen)
        source = open_model(
            model,
            revision=revision,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_pickle=allow_pickle,
            use_ema=use_ema,
            prediction_type=prediction_type,
        )
        path = Path(model).resolve()  # of which the name alone goes into files, never the path
        self.name = path.stem if path.is_file() else path.name if path.is_dir() else str(model)
        config = ModelConfig.from_json(source.text_encoder, source.unet, source.vae)
        # Stable Diffusion was trained to be sampled from timestep 1; diffusers overrides older configs likewise.
        self.noise_schedule = NoiseSchedule.from_config(source.scheduler | {"steps_offset": 1})
        self.tokenizer = Tokenizer.from_folder(source.tokenizer)
        check_vocabulary(self.tokenizer, config.text_encoder)
        super().__init__(config, source, ops, chosen, chosen_dtype, graphs)
        words = TextualInversions(self, self._swaps)
        self.load_textual_inversion = words.load_textual_inversion
        self.unload_textual_inversion = words.unload_textual_inversion
        self._contexts = ContextCache(self.text_encoder, self._encode_tokens)
        self._compile = partial(compiling.prepare, self.config, self.ops, self.device, self.dtype)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> "Pipeline":
        """A diffusers folder or a Hub id; options as the constructor takes them."""
        return cls(name_or_path, **options)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> "Pipeline":
        """A whole SD 1.x or 2.x checkpoint in one file (LDM keys); options as the constructor takes them. Needs no network."""
        if not isinstance(path, str | Path) or not os.path.isfile(path):
            raise CheckpointError(f"no such file: {quoted(str(path))}")
        return cls(path, **options)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        clip_skip: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_style: str = "plain",
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        mask_blur: float = 0.0,
        padding_mask_crop: int | None = None,
        paste_back: bool = False,
        hires_scale: float | None = None,
        hires_steps: int | None = None,
        hires_strength: float | None = None,
        hires_upscaler: str | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> Result:
        """Draw images from a prompt. Names and defaults are diffusers'. On a GPU where none of the model's Triton kernels was
        compiled before, they are first, in parallel.

        prompt, negative_prompt: one or several. prompt_style: "plain" cuts them at 77 tokens, and then a warning says what fell
        off; "a1111" reads the web UI's weights and BREAK, see `fastsd.prompt_syntax`, and takes up to 32 chunks of 75 tokens.
        height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion, 4 for the bundled model), 16.8 million
        together at most; default the size the model was trained at.
        num_inference_steps: 1 to the length of the noise schedule (1000). guidance_scale: classifier-free guidance where
        above 1. guidance_rescale: 0 to 1 (arXiv 2305.08891). num_images_per_prompt: 1 to 256, and 256 images in all.
        seed: 0 to 2⁶⁴ − 1, of the first image, the next take seed + 1, …; or one an image; None or −1: random. An image
        depends on its own seed alone: in another batch it differs in the last bits at most. generator: torch's, instead of
        seed, as diffusers uses it.
        sampler, schedule: see `fastsd samplers`; default the checkpoint's own. timesteps, sigmas: custom, where the sampler
        takes them. eta: 0 to 1, the noise of DDIM and the γ of TCD; None: theirs.
        clip_skip: CLIP layers to leave out at the end, 1 = penultimate.
        latents: the initial noise [B, 4, H/8, W/8], unit Gaussian; the seeds then draw only the noise of the steps.
        prompt_embeds: [P, L, C] instead of prompt, as `encode_prompt` gives them.
        image: begin from it: a path, a PIL image, an array or tensor (see `fastsd.images.to_tensor`), latents [B, 4, H/8, W/8];
        one, one a prompt or one an image. The size is then the image's. strength: 0 to 1, the share of the steps that are taken,
        default 0.8 or with a mask 1. mask_image: paint where it is white; its size is the image's. padding_mask_crop: paint that
        part alone with so many pixels round it, enlarged to height x width, and put it back. paste_back: outside the mask
        the result is the image, bit for bit. mask_blur: pixels (0 to 64) to soften its edge by; pastes back as well.
        hires_scale: 1 to 8, draw so much larger in a second pass, of hires_steps (as many) at hires_strength (0.7), from the
        first one's picture enlarged by hires_upscaler: "latent", "latent-nearest", "lanczos".
        variation_strength: 0 to 1, how far the noise of seed is turned to that of variation_seed, then of the next, ….
        output_type: "pil", "np", "pt" or "latent"; see Result.images.
        callback_on_step_end: f(pipeline, step, timestep, {"latents": [B, 4, H/8, W/8], "num_steps": n}) after each step;
        may return {"latents": replacement}; an exception it raises cancels the call and reaches the caller.

        Raises PromptError, ParameterError, ImageError; NumericsError if a net produces a non-finite value; OutOfMemoryError.
        """
        source = check_source(
            self.config,
            image=image,
            strength=strength,
            mask_image=mask_image,
            mask_blur=mask_blur,
            padding_mask_crop=padding_mask_crop,
            paste_back=paste_back,
            height=height,
            width=width,
            output_type=output_type,
        )
        request = check_request(
            self.config,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_style=prompt_style,
            num_images_per_prompt=num_images_per_prompt,
            height=source.height if source else height,
            width=source.width if source else width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            clip_skip=clip_skip,
            seed=seed,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=callback_on_step_end,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
        )
        if source:
            check_count(source, request)
        hires = check_hires(self.config, request, source, hires_scale, hires_steps, hires_strength, hires_upscaler)
        tables = [
            make_table(
                self.noise_schedule,
                steps,
                sampler,
                schedule,
                eta=request.eta,
                timesteps=timesteps,
                sigmas=sigmas,
                strength=share,
            )
            for steps, share in walks(request, source, hires)
        ]
        self._compile(request.height, request.width, request.batch)
        if hires:
            self._compile(hires.height, hires.width, request.batch)
        clock = Stopwatch(self.device)
        notes = list(request.warnings)
        if request.eta and SAMPLERS[tables[0].sampler].default_eta is None:
            notes.append(f"eta: has no effect on {tables[0].sampler}; it is the noise of ddim and tcd")
        size = f"{request.batch} images of {request.width}x{request.height} in {self.dtype}"
        with self._swaps.using(), computing(self.device, size):
            self._refresh()
            with clock.stage("text"):
                encode = partial(self._contexts.encode, clip_skip=request.clip_skip)
                context, rows = encode_request(request, self.tokenizer, encode, self.device, self.dtype, notes)
            encode_images = partial(self._finite, "encode", notes=notes)
            beginner = Beginner(self.config, self.noise_schedule, encode_images, self.device)
            with clock.stage("encode") if source else nullcontext():
                start = beginner.begin(request, source, tables[0], notes)
            with clock.stage("unet"):
                x = self._denoise(request, start, context, rows, callback_on_step_end)
            if hires:
                with clock.stage("hires"):
                    second, enlarged = enlarge(hires, request, x, lambda x: self._finite("decode", [x], notes))
                    start = beginner.begin(second, enlarged, tables[1], notes)
                    x = self._denoise(second, start, context, rows, callback_on_step_end)
            with clock.stage("vae"):
                drawn = self._draw(x, request.output_type, notes, source)
        for note in notes:
            logger.warning(note)
        return Result(
            drawn, request.seeds, clock.timings, describe(request, source, hires, tables[0], self.name), notes
        )

    def warmup(
        self, sizes: Sequence[tuple[int, int]] = (), num_images_per_prompt: int = 1, guidance: bool | None = None
    ) -> None:
        """Have everything compiled, in parallel, and captured for sizes (height, width): the next image of each is a fast one.

        No sizes: the model's own. guidance: with, without, or None for both. Prompts, seeds, samplers, steps and guidance
        scales then change nothing. On a CPU it packs the weights.
        """
        own = self.config.unet.sample_size * self.config.vae.downscale
        for height, width in sizes or [(own, own)]:
            self._compile(height, width, num_images_per_prompt, always=True)
            for scale in {None: (7.5, 1.0), True: (7.5,), False: (1.0,)}[guidance]:
                for turn in range(2):  # eagerly, then captured
                    self.generate(
                        f"warm-up {turn}",  # a prompt that was encoded already is not encoded again
                        height=height,
                        width=width,
                        num_inference_steps=1,
                        guidance_scale=scale,
                        num_images_per_prompt=num_images_per_prompt,
                        seed=0,
                        output_type="np",
                    )

    def encode_prompt(
        self, prompt: str | Sequence[str], *, prompt_style: str = "plain", clip_skip: int | None = None
    ) -> Tensor:
        """Prompts → what `generate` takes as prompt_embeds, [P, L, C]: 77 tokens a chunk, all prompts as long as the longest.

        Arguments as `generate` takes them. Prompt and negative prompt of different lengths are to be encoded together.
        """
        texts, style, skip = check_texts(self.config, prompt, prompt_style, clip_skip)
        notes: list[str] = []
        with self._swaps.using(), computing(self.device, f"encoding {len(texts)} prompts in {self.dtype}"):
            self._refresh()
            encode = partial(self._contexts.encode, clip_skip=skip)
            context, row_of = encode_prompts(self.tokenizer, encode, texts, style, notes)
            embeds = context[[row_of[text] for text in texts]]
        for note in notes:
            logger.warning(note)
        return embeds

    def encode_image(self, image: Any, seed: int | Sequence[int] | None = None) -> Tensor:
        """Images → latents as the UNet sees them, [B, C, H/8, W/8] fp32.

        image: a path, PIL images, an array or a tensor; see `fastsd.images.to_tensor`. Without a seed the latents are the
        mean of the VAE's distribution; with one (image i of a batch takes seed + i) they are a sample of it.

        Raises ImageError for the image, ParameterError for the seed, NumericsError if the VAE gives a non-finite value.
        """
        unit = self.config.vae.downscale
        x = images.to_tensor(image, unit)
        noise = None
        if seed is not None:
            size = (x.shape[1] // unit, x.shape[2] // unit, self.config.vae.latent_channels)
            noise = NoiseSource.from_seeds(check_seeds(seed, len(x))).draw(*size, self.device)
        with (
            self._swaps.using(),
            computing(self.device, f"encoding {len(x)} images of {x.shape[2]}x{x.shape[1]} in {self.dtype}"),
        ):
            self._refresh()
            return _nchw(self._finite("encode", [x, noise], []))

    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Latents [B, C, H/8, W/8], as `encode_image` or output_type="latent" gives them → images as output_type asks.

        Raises ParameterError for the arguments, NumericsError if the VAE gives a non-finite value.
        """
        choice("output_type", output_type, images.OUTPUT_TYPES)
        shape = (None, self.config.vae.latent_channels, None, None)
        float_tensor("latents", latents, shape, "images, channels, height, width")
        with self._swaps.using(), computing(self.device, f"decoding latents {list(latents.shape)} in {self.dtype}"):
            self._refresh()
            return self._draw(_nhwc(latents.to(self.device, torch.float32)), output_type, [])

    def _denoise(
        self, request: Request, start: Start, context: Tensor, rows: Tensor, callback: StepCallback | None
    ) -> Tensor:
        """The loop of every sampler: noise, or an image and noise → latents [B, H, W, C] fp32."""
        walk = Walk(
            keys=[(k[rows], v[rows]) for k, v in self.unet.project_context(context)],  # once a prompt
            time_bias=self.unet.project_time(self._fp32(start.table.timesteps)),  # once a schedule
            table=start.table,
            guidance=request.guidance_scale,
            rescale=request.guidance_rescale if request.guided else 0.0,
            noise=request.noise,
            latents=start.latents,
            kept=start.kept,
            condition=start.condition,
        )
        return self._walk(walk, after_step(callback, self, start.table))

    def _draw(
        self, latents: Tensor, output_type: str, notes: list[str], source: Source | None = None
    ) -> "list[Image.Image] | np.ndarray | Tensor":
        """Latents [B, H, W, C] → what output_type asks for, put back into the pictures they came from where that was asked."""
        if output_type == "latent":
            return _nchw(latents)
        painted = self._finite("decode", [latents], notes)
        return images.from_tensor(painted, output_type) if source is None else put_back(source, painted, output_type)

    def _fp32(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.float32)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
