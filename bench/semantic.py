"""`python -m bench.semantic --model FOLDER --gate`: how well the pictures mean what the prompts say.

Prompts of the procedural data set's kind, by default for pairs of shape and colour that no training picture shows, are drawn,
each with a seed of its own; the pictures are read by image analysis (bench/shape_reader.py) and judged by what the prompts state.
Results are compared by `--baseline`, for the same prompts; `--gate` demands 97% of each attribute and 95% of whole pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import record
from bench.semantic_judge import Verdict, below_gate, failures, judge, lost, tally
from bench.semantic_prompts import Prompt, digest, make_prompts
from bench.semantic_report import run_report, samplers_report, verdict_grid
from bench.shape_reader import read
from fastsd.device import DTYPES
from fastsd.errors import FastSDError, ParameterError
from fastsd.pipeline import BUNDLED, Pipeline
from fastsd.sampling.names import SAMPLERS, canonical_sampler

DISTILLED = ("lcm", "tcd")
"""Samplers for models that are trained for them; `--sampler all` leaves them out."""
REFERENCE_STEPS = 50
"""Of DDIM, which several samplers are compared with."""


@dataclass(frozen=True)
class Way:
    """How pictures are drawn. sampler: any name `generate` takes."""

    sampler: str
    steps: int
    guidance: float
    batch: int

    @property
    def name(self) -> str:
        """ "dpmpp_2m karras" """
        return " ".join(filter(None, canonical_sampler(self.sampler)))


def draw(pipe: Pipeline, prompts: Sequence[Prompt], way: Way) -> Iterator[Image.Image]:
    """A picture for each prompt, at the model's own size."""
    for start in range(0, len(prompts), way.batch):
        some = prompts[start : start + way.batch]
        yield from pipe.generate(
            [prompt.text for prompt in some],
            seed=[prompt.seed for prompt in some],
            sampler=way.sampler,
            num_inference_steps=way.steps,
            guidance_scale=way.guidance,
        ).images


def judge_pictures(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Verdict]:
    """Of each picture what is right. ImageError for pictures that are not square."""
    readings = [read(picture) for picture in pictures]
    return [Verdict(p, reading, judge(reading, p.stated)) for p, reading in zip(prompts, readings, strict=True)]


def measure(pipe: Pipeline, prompts: Sequence[Prompt], way: Way, grid_path: Path | None) -> dict[str, Any]:
    """One sampler's run: its scores and failures; or "failed", why there are none."""
    about = {"sampler": way.name, "steps": way.steps}
    start = time.perf_counter()
    try:
        pictures = list(draw(pipe, prompts, way))
        seconds = time.perf_counter() - start
        verdicts = judge_pictures(pictures, prompts)
    except FastSDError as error:
        return about | {"failed": str(error)}
    if grid_path is not None:
        grid_path.parent.mkdir(parents=True, exist_ok=True)
        verdict_grid(pictures, verdicts).save(grid_path, format="PNG")
    return about | {"drawing_seconds": round(seconds, 2)} | tally(verdicts) | {"failures": failures(verdicts)}


def ways_of(args: argparse.Namespace) -> list[Way]:
    """One a sampler; ParameterError for an unknown one."""
    names = [name for name in SAMPLERS if name not in DISTILLED] if args.sampler == "all" else args.sampler.split(",")
    ways = {way.name: way for way in (Way(name, args.steps, args.guidance, args.batch) for name in names)}
    return list(ways.values())


def baseline_of(path: Path, prompts: Sequence[Prompt], ways: Sequence[Way]) -> dict[str, Mapping[str, Any]]:
    """Sampler → the attributes' scores in an earlier result; ParameterError unless it has each of them, for these prompts."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        runs = {(run["sampler"], run["steps"]): run for run in result["runs"]}
        asked = result["prompts"]
        same = asked["digest"] == digest(prompts)
        told = f"--prompts {asked['number']} --split {asked['split']} --seed {asked['seed']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"--baseline: {path.name} is no result of bench.semantic ({error!r})") from error
    if not same:
        raise ParameterError(f"--baseline: {path.name} is of other prompts; ask for its own: {told}")
    for way in ways:
        if "attributes" not in runs.get((way.name, way.steps), {}):
            raise ParameterError(f"--baseline: {path.name} has no scores of {way.name} at {way.steps} steps")
    return {way.name: runs[way.name, way.steps]["attributes"] for way in ways}


def complaints(
    run: Mapping[str, Any], baseline: Mapping[str, Mapping[str, Any]] | None, allowed: float, gate: bool
) -> list[str]:
    """Why the exit code is 1: what failed, is worse than in the baseline, or does not reach the gate."""
    if "failed" in run:
        return [f"{run['sampler']}: no pictures: {run['failed']}"]
    lines = below_gate(run["attributes"]) if gate else []
    lines += lost(run["attributes"], baseline[run["sampler"]], allowed) if baseline is not None else []
    return [f"{run['sampler']}: {line}" for line in lines]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def counted(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return number

    parser = argparse.ArgumentParser(prog="python -m bench.semantic", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a diffusers folder or a single file (default: the bundled one)")
    parser.add_argument("--prompts", type=counted, default=200, help="how many (default 200)")
    parser.add_argument("--steps", type=counted, default=20, help="of each sampler (default 20)")
    parser.add_argument("--guidance", type=float, default=2.5, help="scale (default 2.5)")
    parser.add_argument(
        "--sampler",
        default="ddim",
        help=f"one, several parted by commas, or all (but {' and '.join(DISTILLED)}); several are compared "
        f"with DDIM at {REFERENCE_STEPS} steps (default ddim)",
    )
    parser.add_argument("--split", choices=["held_out", "train"], default="held_out", help="default held_out")
    parser.add_argument("--seed", type=int, default=0, help="of prompts; picture i has seed + i (default 0)")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="default fp16 on cuda, fp32 on the cpu"
    )
    parser.add_argument("--backend", default="auto", help="auto, reference, onednn or triton")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=counted, default=10, help="pictures drawn together (default 10)")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/semantic-<model>-<device>.json)")
    parser.add_argument("--grid", type=Path, help="PNG of the first 64 pictures; of several samplers, one PNG each")
    parser.add_argument("--baseline", type=Path, help="an earlier JSON file: exit 1 where this one is worse")
    parser.add_argument("--allowed", type=float, default=1.0, help="points an attribute may lose (default 1)")
    parser.add_argument(
        "--gate", action="store_true", help="exit 1 unless each sampler has 97%% of each attribute, 95%% of all"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    return args


def run(args: argparse.Namespace) -> list[str]:
    """Draws, prints, writes. → complaints."""
    prompts, ways = make_prompts(args.prompts, args.split, args.seed), ways_of(args)
    baseline = None if args.baseline is None else baseline_of(args.baseline, prompts, ways)
    pipe = Pipeline(args.model or BUNDLED, device=args.device, dtype=args.dtype, backend=args.backend)
    name = pipe.name if args.model else "bundled"
    size = pipe.config.unet.sample_size * pipe.config.vae.downscale
    result = record.header() | {
        "model": name,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "backend": args.backend,
        "threads": torch.get_num_threads(),
        "pixels": size,
        "guidance": args.guidance,
        "batch": args.batch,
        "prompts": {"number": len(prompts), "split": args.split, "seed": args.seed, "digest": digest(prompts)},
        "runs": [],
    }
    print(json.dumps({key: result[key] for key in ("commit", "cpu", "gpus", "versions")}, ensure_ascii=False))
    print(
        f"{name}, {size}x{size}, {result['dtype']}, guidance {args.guidance:g}, {len(prompts)} prompts of {args.split}"
    )
    out = args.out or record.RESULTS / f"semantic-{name}-{pipe.device.type}.json"
    found: list[str] = []
    for way in ways:
        path = args.grid
        if path is not None and len(ways) > 1:
            path = path.with_stem(f"{path.stem}-{way.name.replace(' ', '-')}")
        result["runs"].append(measure(pipe, prompts, way, path))
        print("\n" + run_report(result["runs"][-1]), flush=True)
        found += complaints(result["runs"][-1], baseline, args.allowed, args.gate)
        record.save(out, result)  # what is measured stays if the next is stopped
    if len(ways) > 1:
        result["reference"] = measure(pipe, prompts, Way("ddim", REFERENCE_STEPS, args.guidance, args.batch), None)
        print("\n" + samplers_report([*result["runs"], result["reference"]], result["reference"]))
        record.save(out, result)
    print(f"written to {out}")
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        found = run(args)
    except FastSDError as error:
        print(f"bench.semantic: {error}")
        return 2
    for line in found:
        print(f"bench.semantic: {line}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
