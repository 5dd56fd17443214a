"""The fit loop: AdamW, warm-up and cosine, clipping, moving averages, mixed precision, checkpoints that go on bit by bit.

What is trained is a `Task`; everything random comes from data.py by (seed, step), so nothing random needs to be stored.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsd.checkpoints.folder_writer import written
from fastsd.errors import CheckpointError, FastSDError, NumericsError
from fastsd.training import parallel
from fastsd.training.data import Batch, Draws, Share, Source, batches
from fastsd.training.determinism import Repeatable

logger = logging.getLogger("fastsd")

Precision = Literal["fp32", "bf16", "fp16"]
CHECKPOINT = "checkpoint.pt"
LOG = "losses.jsonl"


@dataclass(frozen=True)
class FitOptions:
    """How a task is fitted. The defaults are Stable Diffusion's where it has any (Rombach et al. 2022, appendix)."""

    steps: int
    batch_size: int = 32  # of all processes together
    learning_rate: float = 1e-4  # the highest: reached after `warmup_steps`, then down a cosine to `final_rate` of it
    warmup_steps: int = 100
    final_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01  # of matrices and kernels; biases and norms have none
    clip_norm: float = 1.0  # of all gradients together; 0: not clipped
    ema_decay: float = 0.9999  # of the moving average, which is what is kept; at first less; 0: none
    ema_ramp: float = 9.0  # until ema_decay is reached, the average weighs step s as s^(ema_ramp − 1)
    precision: Precision = "fp32"  # of the forward and backward pass; weights and their updates stay fp32
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    sample_every: int = 0  # steps between calls of `on_sample`; 0: never
    workers: int = 0  # processes that prepare batches


class Task(nn.Module):
    """What is trained: its trainable parameters, and its loss on a batch."""

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        """Scalars; "loss" is what is minimised, the others are logged. progress: of the run, in [0, 1)."""
        raise NotImplementedError


def fit(
    task: Task,
    source: Source,
    options: FitOptions,
    folder: Path,
    on_sample: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> bool:
    """Train until options.steps, from the checkpoint in `folder` if there is one; at the end `task` holds the moving average.

    Each process of `parallel.launch` calls it. on_sample: called with the step, the moving average in place. stop_after: end
    the run after that many steps, with a checkpoint. Returns whether all steps are done. Raises CheckpointError for a
    checkpoint of another run, NumericsError where the loss is not finite (the last checkpoint stays).
    """
    state = _State(task, options)
    path = folder / CHECKPOINT
    if path.exists():
        state.load(path)
    start = state.step
    stop = options.steps if stop_after is None else min(options.steps, start + stop_after)
    share = Share.of(options.batch_size, parallel.rank(), parallel.processes())
    log = _Log(folder, start, options.steps) if parallel.rank() == 0 else None
    for batch in batches(source, share, options.seed, start, stop, options.workers):
        values = state.advance(_moved(batch, state.device), share)
        if log is not None and (state.step % options.log_every == 0 or state.step == stop):
            log.write(state.step, values)
        if state.step % options.checkpoint_every == 0 or state.step == stop:
            if parallel.rank() == 0:
                state.save(path)
            parallel.wait()
        if on_sample is not None and options.sample_every and state.step % options.sample_every == 0:
            with state.averaged():
                _try_sample(on_sample, state.step)
    if log is not None:
        log.close()
    if state.step == options.steps:
        state.keep_average()
    return state.step == options.steps


def _try_sample(on_sample: Callable[[int], None], step: int) -> None:
    """Pictures on the way are not worth a run: memory may be too small for them, or the disk full."""
    try:
        on_sample(step)
    except (FastSDError, OSError) as error:
        logger.warning("samples of step %d: %s; the training goes on without them", step, error)


def learning_rate(step: int, options: FitOptions) -> float:
    """Of the step (from 0): linear warm-up, then half a cosine down to final_rate (Loshchilov & Hutter 2017)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    span = max(1, options.steps - options.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - options.warmup_steps) / span))
    return options.learning_rate * (options.final_rate + (1 - options.final_rate) * cosine)


def ema_decay(step: int, options: FitOptions) -> float:
    """(1 + step) / (1 + ema_ramp + step) at first: the average forgets the initial weights quickly, by the default.

    Weighs the steps by a power, as Karras et al. 2024 do (arXiv 2312.02696, eq. 1); a ramp of 1 weighs them all the same.
    """
    return min(options.ema_decay, (1 + step) / (1 + options.ema_ramp + step))


class _State:
    """All that a run is between two steps."""

    def __init__(self, task: Task, options: FitOptions) -> None:
        self.task, self.options, self.step = task, options, 0
        self.weights = {name: p for name, p in task.named_parameters() if p.requires_grad}
        matrices = [p for p in self.weights.values() if p.ndim > 1]
        vectors = [p for p in self.weights.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, foreach=True)
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()} if options.ema_decay else {}
        self.device = next(iter(self.weights.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.repeatable = Repeatable()

    def advance(self, batch: Batch, share: Share) -> dict[str, float]:
        """One step on this process's share of a batch → the losses, meaned over the processes."""
        options = self.options
        losses = self.repeatable(self._differentiated, batch, share)
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for p in self.weights.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parallel.average(p.grad for p in self.weights.values() if p.grad is not None)
        self.scaler.unscale_(self.optimizer)
        values = torch.stack([losses[name].detach().float() for name in losses])
        parallel.average([values])
        if not math.isfinite(values.sum().item()):
            raise NumericsError(
                f"training: the loss is not finite at step {self.step}; the last checkpoint is from before it: lower the "
                "learning rate, clip more, or train in fp32"
            )
        if options.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.weights.values(), options.clip_norm, foreach=True)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.weights.values() if p.grad is not None])
        if not self.scaler.is_enabled() and not math.isfinite(norm.item()):  # fp16's scaler leaves out such a step
            raise NumericsError(
                f"training: the gradient is not finite at step {self.step}; the last checkpoint is from before it: lower the "
                "learning rate, or train in fp32"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            weight = 1 - ema_decay(self.step, options)
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.weights.values()], weight)
        self.step += 1
        return dict(zip(losses, values.tolist(), strict=True)) | {"norm": norm.item(), "rate": rate}

    def _differentiated(self, batch: Batch, share: Share) -> dict[str, Tensor]:
        """The losses; their gradients lie in the weights' grad."""
        draws = Draws(self.options.seed, self.step, share, self.device)
        with self._precision():
            losses = self.task.losses(batch, draws, self.step / self.options.steps)
        self.optimizer.zero_grad(set_to_none=False)
        self.scaler.scale(losses["loss"]).backward()
        return losses

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Of the forward pass; the backward pass takes each operation's."""
        precision = self.options.precision
        if precision == "fp32":
            yield
            return
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with torch.autocast(self.device.type, dtype), ExitStack() as stack:
            if self.device.type == "cpu":  # PyTorch's flash attention: nine times slower backward in bf16 than in fp32
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights."""
        if not self.ema:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.weights.items()}
        _assign(self.weights, self.ema)
        try:
            yield
        finally:
            _assign(self.weights, kept)

    def keep_average(self) -> None:
        if self.ema:
            _assign(self.weights, self.ema)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with written(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # AdamW's step counts stay there
            shapes = {name: tuple(p.shape) for name, p in state["weights"].items()}
        except Exception as error:
            raise CheckpointError(
                f"{path.name}: is damaged, or not one of fastsd's; remove it to start anew"  # torch's reason is a page of advice
            ) from error
        if shapes != {name: tuple(p.shape) for name, p in self.weights.items()}:
            raise CheckpointError(f"{path.name}: is of other nets; choose another folder, or remove it to start anew")
        _assign(self.weights, state["weights"])
        try:
            if self.ema:
                _assign(self.ema, state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path.name}: is not whole, or of a run with other options ({error}); remove it to start anew"
            ) from error


def _assign(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.detach().copy_(values[name])


def _moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in batch.items()}


class _Log:
    """A line of JSON for each logged step, and a line on stderr."""

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _of_step(line) <= start]  # what a lost run logged will come again
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.start, self.steps, self.began, self.name = start, steps, time.monotonic(), folder.name

    def write(self, step: int, values: Mapping[str, float]) -> None:
        each = (time.monotonic() - self.began) / (step - self.start)
        line = {"step": step} | {name: round(value, 6) for name, value in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        left = each * (self.steps - step) / 60
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{self.name} {step}/{self.steps} {shown} {each:.3f} s/step {left:.1f} min left", file=sys.stderr)

    def close(self) -> None:
        self.file.close()


def _of_step(line: str) -> float:
    """The step of a line of the log; infinite if the line is torn, as a crash may leave the last one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
