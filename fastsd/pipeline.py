"""What happens to a prompt, from top to bottom.

prompt ─tokenizer─► tokens [P, 77] ─CLIP─► context [2B, 77, C] ──────────┐ (cross-attention K/V: once a prompt)
seed ─► latents [B, H/8, W/8, 4] ─► UNet × n, each followed by one row of ─► VAE decode ─► image [B, H, W, 3]
sampler ─► table (timesteps, update matrices): once, in fp64, on the host ─┘
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd import compiling, images
from fastsd.adapters import TextualInversions
from fastsd.backends import select_ops
from fastsd.callbacks import after_step
from fastsd.checkpoints import open_model
from fastsd.checks import present, text_or_none
from fastsd.config import ModelConfig
from fastsd.device import Stopwatch, computing, select_device, select_dtype
from fastsd.errors import CheckpointError, FastSDError, ParameterError
from fastsd.first_stage import nchw, tell
from fastsd.hires import enlarge
from fastsd.image_source import put_back
from fastsd.jobs import Job, check_job, check_requests, each, images_by_shape
from fastsd.model_hash import ModelFile
from fastsd.ops import Ops
from fastsd.previews import Previews
from fastsd.prompt import encode_prompts, encode_request
from fastsd.prompt_cache import ContextCache
from fastsd.request import StepCallback, check_texts
from fastsd.result import MadeWith, Result, describe
from fastsd.sampling import NoiseSchedule
from fastsd.seamless import WRAPS, check_tiling
from fastsd.stages import check_vocabulary
from fastsd.start import Beginner
from fastsd.tokenizer import Tokenizer
from fastsd.walks import Walk
from fastsd.wording import quoted

BUNDLED = Path(__file__).parent / "assets" / "shapes-128"


class Pipeline(Previews):
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
        vae: str | Path | None = None,
        graphs: bool = True,
    ) -> None:
        """Load a model: a diffusers folder, a single file, or a Hugging Face Hub id (`owner/name`).

        device: "auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1". dtype: "auto" (fp16 on cuda, fp32 on the
        cpu), "float32", "float16", "bfloat16" or a torch.dtype. backend: "auto"; "reference" is plain PyTorch, "onednn" that
        with packed weights on the CPU, "triton" our kernels on the GPU; or an `fastsd.ops.Ops` of your own mixing.
        variant: which weight files, e.g. "fp16". revision, token, cache_dir, local_files_only: as huggingface_hub takes
        them. allow_pickle: also read `.bin` and `.ckpt` weights (never code). use_ema: a single file's averaged weights.
        prediction_type: "epsilon" or "v_prediction", where the checkpoint says it wrong or, as SD 2.x single files, not at all.
        vae: another autoencoder instead of the model's: a folder, a single file or a Hub id; unless it says how its latents are
        scaled, the UNet's scale stays.
        graphs: on a GPU, capture each stage of a size in a CUDA graph the second time it is drawn; 4 GiB bound them.

        Raises CheckpointError (HubError for the Hub) if the model cannot be had or is not SD 1.x or 2.x, and
        ParameterError for the arguments.
        """
        for name, value in {"model": model, "vae": vae}.items():
            if not isinstance(value, str | Path) and not (name == "vae" and value is None):
                raise ParameterError(f"{name}: must be a folder, a file or a Hub id, not {quoted(value)}")
        for name, value in {"variant": variant, "revision": revision}.items():
            text_or_none(name, value)
        chosen = select_device(device)
        chosen_dtype = select_dtype(dtype, chosen)
        ops = select_ops(backend, chosen)
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
            vae=vae,
        )
        self._model_file, self._vae_file = ModelFile(model), None if vae is None else ModelFile(vae)
        self.name = self._model_file.stem
        config = ModelConfig.from_json(source.text_encoder, source.unet, source.vae)
        # Stable Diffusion was trained to be sampled from timestep 1; diffusers overrides older configs likewise.
        self.noise_schedule = NoiseSchedule.from_config(source.scheduler | {"steps_offset": 1})
        self.tokenizer = Tokenizer.from_folder(source.tokenizer)
        check_vocabulary(self.tokenizer, config.text_encoder)
        super().__init__(config, source, ops, chosen, chosen_dtype, graphs)
        self._words = words = TextualInversions(self, self._swaps)
        self.load_textual_inversion = words.load_textual_inversion
        self.unload_textual_inversion = words.unload_textual_inversion
        own = weakref.proxy(self)  # not self: the memory of a dropped Pipeline would wait for the garbage collector
        self._contexts = ContextCache(self.text_encoder, lambda ids, skip: own._encode_tokens(ids, skip))
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
        rng: str = "cpu",
        step_noise: str = "independent",
        tiling: bool | str = False,
        output_type: str = "pil",
        vae_tiling: bool | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Result:
        """Draw images from a prompt. Names and defaults are diffusers'. On a GPU where none of the model's Triton kernels was
        compiled before, they are first, in parallel.

        prompt, negative_prompt: one or several. prompt_style: "plain" cuts them at 77 tokens, and then a warning says what fell
        off; "a1111" reads the web UI's weights and BREAK, see `fastsd.prompt_syntax`, and takes up to 32 chunks of 75 tokens.
        height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion and the bundled model), 16.8 million
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
        rng: "gpu" draws the noise that a CUDA device draws for a seed, on any machine: see `fastsd.philox.Philox`. step_noise:
        "brownian" draws that of the SDE samplers as k-diffusion and the web UI do, from a Brownian path.
        tiling: True makes opposite edges of the picture meet, so that it can be laid side by side with itself; "x": left and
        right ones only, "y": top and bottom ones.
        output_type: "pil", "np", "pt" or "latent"; see Result.images. vae_tiling: True runs the VAE in tiles where the picture
        is larger than the model was trained at, None only after running out of memory, False never.
        callback_on_step_end: f(pipeline, step, timestep, {"latents": [B, 4, H/8, W/8], "denoised": what these latents are
        estimated to become, "num_steps": n}) after each step; may return {"latents": replacement}; an exception it raises
        cancels the call and reaches the caller. `fastsd.previews.Previewer` is one that shows pictures on the way.

        Raises PromptError, ParameterError, ImageError; NumericsError if a net produces a non-finite value; OutOfMemoryError.
        """
        asked = {name: value for name, value in locals().items() if name != "self"}
        job = check_job(self.config, self.noise_schedule, asked)
        [result] = self._run([job])
        if isinstance(result, FastSDError):
            raise result
        return result

    def generate_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Result | FastSDError]:
        """Several requests at once, each a dict of what `generate` takes: → for each its Result, or the error that it got.

        They may differ in everything. Those of one size, with or all without guidance, share the UNet's calls at each step: text
        to image, from images and inpainting, whatever the sampler, schedule and steps; the ones with fewer steps leave the batch
        when they are done. Each gets the images that it gets alone, up to the last bits of the sums. timings are of all together.

        Raises ParameterError if requests is no list of such dicts, or two of them share a generator, which would draw for both
        in turn; OutOfMemoryError; and what a callback raises, or ParameterError for its answer, which ends all.
        """
        given: list[Job | FastSDError] = []
        for asked in check_requests(requests, Pipeline.generate):
            try:
                given.append(check_job(self.config, self.noise_schedule, asked))
            except FastSDError as error:
                given.append(error)
        done = iter(self._run([job for job in given if isinstance(job, Job)]))
        return [next(done) if isinstance(job, Job) else job for job in given]

    def _run(self, jobs: list[Job]) -> list[Result | FastSDError]:
        """The way of the data, from top to bottom."""
        shapes = images_by_shape(jobs)
        for (height, width, wrap), count in shapes.items():
            self._compile(height, width, count, wrap)
        clock = Stopwatch(self.device)
        asked = " and ".join(f"{count} images of {width}x{height}" for (height, width, _), count in shapes.items())
        with self._swaps.using(), computing(self.device, f"{asked} in {self.dtype}"):
            self._refresh()
            with clock.stage("text"):
                each(jobs, self._read)
            with clock.stage("encode") if any(job.source for job in jobs) else nullcontext():
                each(jobs, self._begin)
            with clock.stage("unet"):
                self._denoise(jobs)
            larger = [job for job in jobs if job.hires]
            with clock.stage("hires") if larger else nullcontext():
                each(larger, self._begin_larger)
                self._denoise(larger)
            with clock.stage("vae"):
                each(jobs, self._draw)
        return [self._answer(job, clock.timings) for job in jobs]

    def _read(self, job: Job) -> None:
        """Prompts → context."""
        job.loras, job.words = self._loras.used(), self._words.hashes()
        encode = partial(self._contexts.encode, clip_skip=job.request.clip_skip)
        encoded = encode_request(job.request, self.tokenizer, encode, self.device, self.dtype, job.notes)
        job.context, job.rows = encoded

    def _begin(self, job: Job) -> None:
        """Seeds, and images if there are some → the first latents."""
        job.start = self._beginner(job).begin(job.request, job.source, job.tables[0], job.notes)

    def _begin_larger(self, job: Job) -> None:
        """The first pass' latents, enlarged → the second's first ones."""
        first = present(job.hires), job.request, present(job.latents)
        second, enlarged = enlarge(*first, lambda x: self._vae("decode", job)([x]))
        job.start = self._beginner(job).begin(second, enlarged, job.tables[1], job.notes)

    def _beginner(self, job: Job) -> Beginner:
        return Beginner(self.config, self.noise_schedule, self._vae("encode", job), self.device)

    def _vae(self, method: str, job: Job) -> Callable[[list[Tensor | None]], Tensor]:
        tiling, wrap = job.request.vae_tiling, job.request.wrap
        return partial(self._finite, method, notes=job.notes, degraded=job.degraded, tiling=tiling, wrap=wrap)

    def _denoise(self, jobs: list[Job]) -> None:
        """The loop of every sampler: first latents → latents."""
        times: dict[bytes, Tensor] = {}  # the time's projections: once a schedule
        going = [job for job in jobs if job.error is None]
        walks = [self._walk_of(job, times) for job in going]
        hooks = [
            after_step(job.callback, self, walk, self.noise_schedule) for job, walk in zip(going, walks, strict=True)
        ]
        for job, walk, walked in zip(going, walks, self._denoiser.run(walks, hooks), strict=True):
            job.latents = walked.latents
            job.error = self._not_finite(walked.survived, len(walk.table))
            job.degraded += walked.degraded

    def _walk_of(self, job: Job, times: dict[bytes, Tensor]) -> Walk:
        request, start = job.request, present(job.start)
        key = start.table.timesteps.tobytes()
        if key not in times:
            times[key] = self.unet.project_time(torch.from_numpy(start.table.timesteps).to(self.device, torch.float32))
        keys = self.unet.project_context(present(job.context))  # once a prompt
        return Walk(
            keys=[(k[job.rows], v[job.rows]) for k, v in keys],
            time_bias=times[key],
            table=start.table,
            guidance=request.guidance_scale,
            rescale=request.guidance_rescale if request.guided else 0.0,
            noise=start.noise,
            latents=start.latents,
            kept=start.kept,
            condition=start.condition,
            wrap=request.wrap,
        )

    def _draw(self, job: Job) -> None:
        """Latents → what output_type asks for, put back into the pictures they came from where that was asked."""
        latents, output_type = present(job.latents), job.request.output_type
        if output_type == "latent":
            job.drawn = nchw(latents)
            return
        painted = self._vae("decode", job)([latents])
        if job.source:
            job.drawn = put_back(job.source, painted, output_type)
        else:
            job.drawn = images.from_tensor(painted, output_type)

    def _answer(self, job: Job, timings: dict[str, float]) -> Result | FastSDError:
        tell(job.notes + job.degraded)
        if job.drawn is None:
            return present(job.error)
        large = self._larger_than_a_tile(max(map(max, job.sizes)))
        tiles = bool(job.request.vae_tiling and large) or any(told.startswith("vae: tiled") for told in job.degraded)
        made_with = MadeWith(self._model_file, self._vae_file, job.loras, job.words, tiles)
        texts = describe(job.request, job.source, job.hires, job.tables[0], made_with)
        return Result(job.drawn, job.request.seeds, dict(timings), texts, job.notes + job.degraded, job.degraded)

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]] = (),
        num_images_per_prompt: int = 1,
        guidance: bool | None = None,
        tiling: bool | str = False,
    ) -> None:
        """Have everything compiled, in parallel, and captured for sizes (height, width): the next image of each is a fast one.

        No sizes: the model's own. guidance: with, without, or None for both. tiling: as `generate` takes it. Prompts, seeds,
        samplers, steps and guidance scales then change nothing. On a CPU it packs the weights.
        """
        own = self.config.unet.sample_size * self.config.vae.downscale
        for height, width in sizes or [(own, own)]:
            self._compile(height, width, num_images_per_prompt, WRAPS[check_tiling(tiling)], always=True)
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
                        tiling=tiling,
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
        tell(notes)
        return embeds
