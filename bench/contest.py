"""One row of the latency benchmark: parity first, then time, the contenders taking turns; and each alone in a fresh process."""

import gc
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import ladder, peers, record
from bench.ladder import Engine
from bench.roofline import GPUS, floor, operations
from bench.shapes import Call, trace
from bench.unet_step import UNetStep
from bench.workloads import Case, Contender, Drawn, picture_gate, psnr, step_error, step_gate
from fastsd.config import ModelConfig

DRAWS = 3
"""Of each contender before its picture is checked: by the third, what is captured or compiled is what is used."""
WARM_UP = 1
OURS, PLAIN = "fastsd", "fastsd reference"
CHILD_SECONDS = 900
"""At most for one contender in a process of its own: compiling a UNet with max-autotune takes minutes."""
DIGITS = 4

Make = Callable[[], Contender]


def is_peer(key: str) -> bool:
    return key.startswith("diffusers")


def makers(case: Case, engines: dict[str, Engine], rivals: list[str]) -> dict[str, Make]:
    """What builds each contender, when it is asked."""
    if case.alone:
        step = UNetStep(case)
        ours: Callable[[Engine], Contender] = step.ours
        theirs: Callable[[str], Contender] = step.theirs
    else:
        ours, theirs = partial(ladder.picture, case), partial(peers.picture, case)
    made: dict[str, Make] = {key: partial(ours, engine) for key, engine in engines.items()}
    return made | {key: partial(theirs, key) for key in rivals}


def contest(case: Case, contenders: dict[str, Make], runs: int, failed: dict[str, str]) -> dict[str, Any]:
    """Times of each, {"seconds": {key: a list of runs}}. A breach of fastsd's parity leaves no times.

    diffusers as it comes is the oracle; without it, fastsd on plain PyTorch. failed: who has failed, and why, and takes no part;
    those that fail here are added.
    """
    ready: dict[str, Contender] = {}
    drawn: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    calls = 1
    for key, make in contenders.items():
        if key in failed:
            continue
        try:
            contender = make()
            for _ in range(DRAWS):
                made = contender.run()
            drawn[key] = made.array, None if contender.step is None else contender.step()
            calls = made.calls
            ready[key] = contender
        except Exception as error:
            failed[key] = reason(error)
    row: dict[str, Any] = {"failed": failed}
    oracle = next((key for key in (peers.EAGER, PLAIN) if key in ready), None)
    if OURS not in ready or oracle is None:
        return row | {"breaches": {OURS: failed.get(OURS, "nothing to compare with")}}

    row |= {"oracle": oracle, "parity": {}}
    breaches = {}
    for key in list(ready):
        row["parity"][key], why = compared(case, drawn[key], drawn[oracle])
        if why and is_peer(key):
            failed[key] = why
            del ready[key]
        elif why:
            breaches[key] = why
    if breaches:
        return row | {"breaches": breaches}
    times = take_turns(ready, runs, failed)
    if OURS not in times:
        return row | {"breaches": {OURS: failed[OURS]}}
    return row | {"calls": calls, "seconds": times, "contenders": {key: ready[key].name for key in times}}


def compared(
    case: Case, ours: tuple[np.ndarray, np.ndarray | None], theirs: tuple[np.ndarray, np.ndarray | None]
) -> tuple[dict[str, float | None], str | None]:
    """How far apart, and what breaches parity. A PSNR of None: equal."""
    dtype = case.torch_dtype
    if case.alone:
        return {"step_error": step_error(ours[0], theirs[0], dtype)}, step_gate(ours[0], theirs[0], dtype)
    assert ours[1] is not None
    assert theirs[1] is not None
    quality = psnr(ours[0], theirs[0])
    figures = {
        "psnr_db": round(quality, 1) if isfinite(quality) else None,
        "step_error": step_error(ours[1], theirs[1], dtype),
    }
    whys = (step_gate(ours[1], theirs[1], dtype), picture_gate(ours[0], theirs[0], dtype))
    return figures, "; ".join(filter(None, whys)) or None


def take_turns(
    contenders: dict[str, Contender], runs: int, failed: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each run: total, and text, step and decode of a picture. A B C A B C …, the first turn not counted.

    Whoever fails on the way is out, and goes into failed.
    """
    times: dict[str, list[dict[str, float]]] = {key: [] for key in contenders}
    for turn in range(WARM_UP + runs):
        for key in list(times):
            try:
                start = time.perf_counter()
                drawn = contenders[key].run()
                total = time.perf_counter() - start
            except Exception as error:
                failed[key] = reason(error)
                del times[key]
                continue
            if turn >= WARM_UP:
                times[key].append({"total": total} | stages(drawn, total))
    return times


def stages(drawn: Drawn, total: float) -> dict[str, float]:
    """Seconds of text, one UNet step (its share of the whole loop) and decode."""
    given = drawn.seconds
    if not given:
        return {"step": total}
    return {"text": given["text"], "step": given["unet"] / drawn.calls, "decode": given["decode"]}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    low, middle, high = np.percentile(seconds, [20, 50, 80])
    return {"p20": round(low * 1e3, DIGITS), "p50": round(middle * 1e3, DIGITS), "p80": round(high * 1e3, DIGITS)}


def work(config: ModelConfig, case: Case, calls: int, gpu: str | None) -> dict[str, dict[str, float]]:
    """For text, step, decode and total: {"tflop"}, and {"floor_s"} on a GPU whose peak is known. Calls: of the UNet."""
    two, rows = trace(config, case.pixels, 2), trace(config, case.pixels, 2 * case.batch)
    parts = {"step": [(1, rows["step"])]}
    parts["total"] = parts["step"]
    if not case.alone:
        parts |= {"text": [(1, two["text"])], "decode": [(case.batch, two["decode"])]}
        loop = [(1, two["prompt"]), (calls, rows["schedule"]), (calls, rows["step"])]
        parts["total"] = [*parts["text"], *loop, *parts["decode"]]
    peak = next((GPUS[name] for name in GPUS if gpu is not None and name in gpu.lower()), None)

    def summed(terms: list[tuple[int, Counter[Call]]]) -> dict[str, float]:
        each = [(times * count, call) for times, counted in terms for call, count in counted.items()]
        figures = {"tflop": sum(count * operations(call) for count, call in each) / 1e12}
        if peak is not None:
            figures["floor_s"] = sum(count * floor(call, peak) for count, call in each)
        return figures

    return {name: summed(terms) for name, terms in parts.items()}


def figures(row: dict[str, Any], amount: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A row for the report from `contest`'s: what it measured, as milliseconds, rates and shares of the floor."""
    if "breaches" in row:
        return row
    seconds: dict[str, list[dict[str, float]]] = row.pop("seconds")
    titles = row.pop("contenders")
    milliseconds, by_stage, speed = {}, {}, {}
    for key, taken in seconds.items():
        spread = {stage: percentiles([one[stage] for one in taken]) for stage in taken[0]}
        milliseconds[key] = {"contender": titles[key], "runs": len(taken)} | spread["total"]
        by_stage[key] = {stage: spread[stage] for stage in spread if stage != "total"}
        middle = {stage: spread[stage]["p50"] / 1e3 for stage in spread}
        speed[key] = {
            "iterations_per_second": round(1 / middle["step"], DIGITS),
            "tflops": {stage: round(amount[stage]["tflop"] / s, DIGITS) for stage, s in middle.items()},
        }
        if "floor_s" in amount["total"]:
            speed[key]["of_floor"] = {stage: round(amount[stage]["floor_s"] / s, DIGITS) for stage, s in middle.items()}
    rivals = {key: milliseconds[key]["p50"] for key in milliseconds if is_peer(key)}
    best = {"best_diffusers": min(rivals, key=rivals.__getitem__)} if rivals else {}
    return {"milliseconds": milliseconds, "stages_ms": by_stage, "speed": speed} | best | row


def alone(case: Case, key: str, threads: int) -> dict[str, Any]:
    """What `child` tells of one contender in a fresh process. RuntimeError with its last words where it fails."""
    order = json.dumps({"case": asdict(case), "key": key, "threads": threads})
    command = [sys.executable, "-m", "bench.latency", "--child", order]
    try:
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {CHILD_SECONDS} s in a process of its own") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(words[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(order: str) -> dict[str, Any]:
    """Seconds to load and to the first picture after that, and the peak of memory in MiB after DRAWS.

    On the CPU that is the process's resident memory, on a GPU what PyTorch allocated, and beside it what it reserved.
    """
    given = json.loads(order)
    case, key = Case(**given["case"]), given["key"]
    torch.set_num_threads(given["threads"])
    device = torch.device(case.device)
    on_gpu = device.type == "cuda"
    if is_peer(key):
        peers.import_diffusers()  # not counted as loading
    engines = {} if is_peer(key) else {key: ladder.standard(device)[key]}
    if on_gpu:
        settings(case)
        torch.cuda.init()
    start = time.perf_counter()
    contender = makers(case, engines, [key] if is_peer(key) else [])[key]()
    if on_gpu:
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    contender.run()
    first = time.perf_counter()
    for _ in range(DRAWS - 1):
        contender.run()
    told: dict[str, Any] = {}
    if not case.alone:  # whose weights are drawn, not loaded
        told["first_image"] = {"load_s": round(loaded - start, 3), "first_s": round(first - loaded, 3)}
    if on_gpu:
        told["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        told["reserved_memory_mib"] = torch.cuda.max_memory_reserved() // 2**20
    else:
        # Not getrusage: its peak survives exec, so a child would answer with its parent's.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        told["peak_memory_mib"] = int(peak[1]) // 1024
    return told


def settings(case: Case) -> None:
    """A GPU's, for all contenders: cuDNN chooses by measuring; fp32 is fp32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = case.torch_dtype != torch.float32  # PyTorch's default is True


def let_go(device: torch.device) -> None:
    """Give back what a row's contenders held, and let nothing that was compiled for it make the next one slower."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """A failure in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
