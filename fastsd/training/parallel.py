"""Several processes that train copies of the same nets, each on its share of every batch (gloo on CPUs, NCCL on GPUs)."""

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastsd import errors

ERROR = "error.json"


def launch(work: Callable[..., None], processes: int, threads: int, *args: Any) -> None:
    """work(*args) in each of the processes, in this one if it is the only one. threads: of PyTorch, in each; 0: its default.

    A FastSDError of any of them is raised here as itself, any other error as a RuntimeError with its traceback. It is the first
    that counts: the other processes fail in their turn as they lose the connection.
    """
    if processes == 1:
        if threads:
            torch.set_num_threads(threads)
        work(*args)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_enter, (work, processes, threads, folder, args), processes)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            first = Path(folder) / ERROR
            if not first.exists():
                raise
            kind, message, trace = json.loads(first.read_text(encoding="utf-8"))
            if hasattr(errors, kind):
                raise getattr(errors, kind)(message) from error
            raise RuntimeError(f"one of the processes failed:\n{trace}") from error


def _enter(
    rank: int, work: Callable[..., None], processes: int, threads: int, folder: str, args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // processes))
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    meet = f"file://{Path(folder) / 'meet'}"
    dist.init_process_group(backend, meet, world_size=processes, rank=rank, timeout=timedelta(hours=2))
    try:
        work(*args)
    except Exception as error:
        note = json.dumps([type(error).__name__, str(error), traceback.format_exc()])
        with suppress(FileExistsError), (Path(folder) / ERROR).open("x", encoding="utf-8") as file:
            file.write(note)
        raise
    finally:
        dist.destroy_process_group()
    _leave()


def _leave() -> None:
    """End this process without taking the interpreter down: now and then a thread of PyTorch's that still lets go of a tensor
    aborts it there, and a run that is done would fail (pytorch/pytorch issue 190489)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    """A process whose parent was killed would go on, and write to the folder that the next run writes to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def average(tensors: Iterable[Tensor]) -> None:
    """Each tensor, in place, becomes its mean over the processes; they travel as one."""
    if not dist.is_initialized():
        return
    kept = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in kept])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(kept, flat.split([tensor.numel() for tensor in kept]), strict=True):
        tensor.copy_(mean.view_as(tensor))
