"""What happens to a prompt, from top to bottom.

prompt ─tokenizer─► tokens [P, 77] ─CLIP─► context [2B, 77, C] ──────────┐ (cross-attention K/V: once a prompt)
seed ─► latents [B, H/8, W/8, 4] ─► UNet × n, each followed by one row of ─► VAE decode ─► image [B, H, W, 3]
sampler ─► table (timesteps, update matrices): once, in fp64, on the host ─┘
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd import compiling, images, metadata
from fastsd.backends import select_ops
from fastsd.checkpoints import open_folder, resolve
from fastsd.checks import choice, float_tensor, text_or_none
from fastsd.config import CLIPConfig, ModelConfig
from fastsd.denoise import Walk
from fastsd.device import Stopwatch, computing, select_device, select_dtype
from fastsd.errors import CheckpointError, ParameterError
from fastsd.noise import NoiseSource
from fastsd.ops import Ops
from fastsd.prompt import encode_request
from fastsd.request import Request, StepCallback, check_request, check_seeds
from fastsd.result import Result
from fastsd.sampling import SAMPLERS, NoiseSchedule, Table, make_table
from fastsd.stages import Stages
from fastsd.tokenizer import Tokenizer
from fastsd.wording import quoted

BUNDLED = Path(__file__).parent / "assets" / "shapes-64"
logger = logging.getLogger("fastsd")


class Pipeline(Stages):
    """A Stable Diffusion model, ready to draw. `Pipeline()` is the small model that comes with fastsd.

    Its methods keep no state between calls: threads may share one Pipeline, and each gets what it would get alone.
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
        graphs: bool = True,
    ) -> None:
        """Load a model: a diffusers folder, or a Hugging Face Hub id (`owner/name`).

        device: "auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1". dtype: "auto" (fp16 on cuda, fp32 on the
        cpu), "float32", "float16", "bfloat16" or a torch.dtype. backend: "auto"; "reference" is plain PyTorch, "onednn" that
        with packed weights on the CPU, "triton" our kernels on the GPU; or an `fastsd.ops.Ops` of your own mixing.
        variant: which weight files, e.g. "fp16". revision, token, cache_dir, local_files_only: as huggingface_hub takes
        them. allow_pickle: also read `.bin` weights, which old folders hold (never code).
        graphs: on a GPU, capture each stage of a size in a CUDA graph the second time it is drawn; 4 GiB bound them.

        Raises CheckpointError (HubError for the Hub) if the model cannot be had or is not SD 1.x or 2.x, and
        ParameterError for the arguments.
        """
        if not isinstance(model, str | Path):
            raise ParameterError(f"model: must be a folder or a Hub id, not {quoted(model)}")
        for name, value in {"variant": variant, "revision": revision}.items():
            text_or_none(name, value)
        chosen = select_device(device)
        chosen_dtype = select_dtype(dtype, chosen)
        ops = backend if isinstance(backend, Ops) else select_ops(backend, chosen)
        path = resolve(
            model,
            revision=revision,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        folder = open_folder(path, variant=variant, allow_pickle=allow_pickle)
        self.name = (
            Path(model).resolve().name if Path(model).is_dir() else str(model)
        )  # never a path: it goes into files
        config = ModelConfig.from_json(folder.text_encoder, folder.unet, folder.vae)
        # Stable Diffusion was trained to be sampled from timestep 1; diffusers overrides older configs likewise.
        self.noise_schedule = NoiseSchedule.from_config(folder.scheduler | {"steps_offset": 1})
        self.tokenizer = Tokenizer.from_folder(folder.tokenizer)
        check_vocabulary(self.tokenizer, config.text_encoder)
        super().__init__(config, folder, ops, chosen, chosen_dtype, graphs)
        self._compile = partial(compiling.prepare, self.config, self.ops, self.device, self.dtype)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> "Pipeline":
        """A diffusers folder or a Hub id; options as the constructor takes them."""
        return cls(name_or_path, **options)

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
        eta: float = 0.0,
        clip_skip: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> Result:
        """Draw images from a prompt. Names and defaults are diffusers'. On a GPU where none of the model's Triton kernels was
        compiled before, they are first, in parallel.

        prompt, negative_prompt: one or several; cut at 77 tokens, and then a warning says what fell off.
        height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion, 4 for the bundled model), 16.8 million
        together at most; default the size the model was trained at.
        num_inference_steps: 1 to the length of the noise schedule (1000). guidance_scale: classifier-free guidance where
        above 1. guidance_rescale: 0 to 1 (arXiv 2305.08891). num_images_per_prompt: 1 to 256, and 256 images in all.
        seed: 0 to 2⁶⁴ − 1, of the first image, the next take seed + 1, …; or one an image; None or −1: random. An image
        depends on its own seed alone: in another batch it differs in the last bits at most. generator: torch's, instead of
        seed, as diffusers uses it.
        sampler, schedule: see `fastsd samplers`; default the checkpoint's own. timesteps, sigmas: custom, where the sampler
        takes them. eta: 0 to 1, the noise of DDIM.
        clip_skip: CLIP layers to leave out at the end, 1 = penultimate.
        latents: the initial noise [B, 4, H/8, W/8], unit Gaussian; the seeds then draw only the noise of the steps.
        prompt_embeds: [P, L, C] instead of prompt.
        output_type: "pil", "np", "pt" or "latent"; see Result.images.
        callback_on_step_end: f(pipeline, step, timestep, {"latents": [B, 4, H/8, W/8], "num_steps": n}) after each step;
        may return {"latents": replacement}; an exception it raises cancels the call and reaches the caller.

        Raises PromptError, ParameterError; NumericsError if a net produces a non-finite value; OutOfMemoryError.
        """
        request = check_request(
            self.config,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
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
        )
        table = make_table(
            self.noise_schedule,
            request.steps,
            sampler,
            schedule,
            eta=request.eta,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        self._compile(request.height, request.width, request.batch)
        clock = Stopwatch(self.device)
        notes = list(request.warnings)
        if request.eta and table.sampler != "ddim":
            notes.append(f"eta: has no effect on {table.sampler}; it is the noise of ddim")
        size = f"{request.batch} images of {request.width}x{request.height} in {self.dtype}"
        with computing(self.device, size):
            self._refresh()
            with clock.stage("text"):
                encode = partial(self._encode_tokens, clip_skip=request.clip_skip)
                context, rows = encode_request(request, self.tokenizer, encode, self.device, self.dtype, notes)
            with clock.stage("unet"):
                x = self._denoise(request, table, context, rows, callback_on_step_end)
            with clock.stage("vae"):
                drawn = self._draw(x, request.output_type, notes)
        for note in notes:
            logger.warning(note)
        return Result(drawn, request.seeds, clock.timings, self._parameters(request, table), notes)

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
                for _ in range(2):  # eagerly, then captured
                    self.generate(
                        "warm-up",
                        height=height,
                        width=width,
                        num_inference_steps=1,
                        guidance_scale=scale,
                        num_images_per_prompt=num_images_per_prompt,
                        seed=0,
                        output_type="np",
                    )

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
        with computing(self.device, f"encoding {len(x)} images of {x.shape[2]}x{x.shape[1]} in {self.dtype}"):
            self._refresh()
            return _nchw(self._finite("encode", [x, noise], []))

    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Latents [B, C, H/8, W/8], as `encode_image` or output_type="latent" gives them → images as output_type asks.

        Raises ParameterError for the arguments, NumericsError if the VAE gives a non-finite value.
        """
        choice("output_type", output_type, images.OUTPUT_TYPES)
        shape = (None, self.config.vae.latent_channels, None, None)
        float_tensor("latents", latents, shape, "images, channels, height, width")
        with computing(self.device, f"decoding latents {list(latents.shape)} in {self.dtype}"):
            self._refresh()
            return self._draw(_nhwc(latents.to(self.device, torch.float32)), output_type, [])

    def _denoise(
        self, request: Request, table: Table, context: Tensor, rows: Tensor, callback: StepCallback | None
    ) -> Tensor:
        """The loop of every sampler: noise → latents [B, H, W, C] fp32."""
        down = self.config.vae.downscale
        shape = (request.height // down, request.width // down, self.config.vae.latent_channels)
        unit = request.noise.draw(*shape, self.device) if request.latents is None else _nhwc(request.latents)
        walk = Walk(
            keys=[(k[rows], v[rows]) for k, v in self.unet.project_context(context)],  # once a prompt
            time_bias=self.unet.project_time(self._fp32(table.timesteps)),  # once a schedule
            table=table,
            guidance=request.guidance_scale,
            rescale=request.guidance_rescale if request.guided else 0.0,
            noise=request.noise,
            latents=unit.to(self.device, torch.float32),
        )
        after_step = None if callback is None else partial(self._call_back, callback, table)
        return self._walk(walk, after_step)

    def _call_back(self, callback: StepCallback, table: Table, step: int, latents: Tensor) -> None:
        """latents [B, H, W, C]: a view of the state, overwritten by what the callback returns instead."""
        values: dict[str, Any] = {"latents": _nchw(latents).clone(), "num_steps": len(table)}
        answer = callback(self, step, float(table.timesteps[step]), values)
        if not isinstance(answer, dict | None):
            raise ParameterError(f"callback_on_step_end: must return a dict or None, not {quoted(answer)}")
        replaced = (answer or {}).get("latents")
        if replaced is not None:
            shape = values["latents"].shape
            if not isinstance(replaced, Tensor) or replaced.shape != shape:
                raise ParameterError(
                    f"callback_on_step_end: the latents it returns must be a tensor {list(shape)}, not {quoted(replaced)}"
                )
            latents.copy_(_nhwc(replaced.to(self.device, torch.float32)))

    def _draw(self, latents: Tensor, output_type: str, notes: list[str]) -> "list[Image.Image] | np.ndarray | Tensor":
        """Latents [B, H, W, C] → what output_type asks for."""
        if output_type == "latent":
            return _nchw(latents)
        return images.from_tensor(self._finite("decode", [latents], notes), output_type)

    def _parameters(self, request: Request, table: Table) -> list[str]:
        """A1111's text for each image."""
        per_prompt = request.images_per_prompt
        texts = []
        for index in range(request.batch):
            fields = {
                "prompt": request.prompts[index // per_prompt] if request.prompts else "",
                "negative_prompt": request.negative_prompts[index // per_prompt] if request.negative_prompts else "",
                "steps": len(table) if table.schedule == "custom" else request.steps,
                "sampler": SAMPLERS[table.sampler].label,
                "schedule_type": table.schedule.capitalize(),
                "cfg_scale": request.guidance_scale,
                "seed": request.seeds[index] if request.seeds else None,
                "width": request.width,
                "height": request.height,
                "model": self.name,
                "clip_skip": request.clip_skip + 1 if request.prompts else None,  # A1111 counts the last layer as 1
                "eta": request.eta if request.eta and table.sampler == "ddim" else None,
                "guidance_rescale": request.guidance_rescale or None,
            }
            texts.append(metadata.format_parameters({key: value for key, value in fields.items() if value is not None}))
        return texts

    def _fp32(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.float32)


def check_vocabulary(tokenizer: Tokenizer, config: CLIPConfig) -> None:
    """CheckpointError unless the text encoder has a row for every token and a position for each place."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text_encoder knows {config.vocab_size}"
        )
    if tokenizer.max_length > config.max_position_embeddings:
        raise CheckpointError(
            f"the tokenizer pads to {tokenizer.max_length}, but the text_encoder has {config.max_position_embeddings} positions"
        )


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
