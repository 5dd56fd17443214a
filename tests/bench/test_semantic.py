"""The judging of pictures by meaning: each claim can fail alone, and a worse result does not pass."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import semantic
from bench.semantic_judge import ALL, ATTRIBUTES, GATE, Verdict, below_gate, judge, lost, tally, wilson
from bench.semantic_prompts import SUITES, Prompt, digest, make_prompts
from bench.semantic_report import SHOWN, verdict_grid
from bench.shape_reader import Found, Reading
from fastsd.errors import NumericsError
from fastsd.pipeline import Pipeline
from fastsd.training.shape_captions import SLOTS
from fastsd.training.shape_scenes import HELD_OUT, Scene, Thing, draw
from fastsd.training.shapes import Shapes
from tests.small_model import SMALL_MODEL

CIRCLE = Found("red", "circle", "large", (0.27, 0.5), 0.18, 0.95, 0.02)
STAR = Found("blue", "star", "small", (0.73, 0.5), 0.1, 0.9, 0.02)
ONE = {"count": "1", "colour": "red", "shape": "circle", "size": "large", "position": "left", "background": "gray"}
PAIR = {"colour": "red", "shape": "circle", "size": "large", "colour 2": "blue", "shape 2": "star", "size 2": "small"}
PAIR |= {"relation": "left of", "background": "gray"}
THREE = {"count": "3", "colour": "blue", "shape": "star", "size": "small"}


def reading(*objects: Found) -> Reading:
    return Reading("gray", objects)


def moved(one: Found, x: float, y: float) -> Found:
    return replace(one, middle=(x, y))


STARS = [moved(STAR, x, 0.5) for x in (0.17, 0.5, 0.83)]


def wrong(read: Reading, stated: dict[str, str]) -> set[str]:
    right = judge(read, stated)
    assert right[ALL] == all(right[name] for name in right if name != ALL), right
    return {name for name, holds in right.items() if not holds} - {ALL}


@pytest.mark.parametrize(
    ("read", "stated"),
    [(reading(CIRCLE), ONE), (reading(CIRCLE, STAR), PAIR), (reading(STAR, CIRCLE), PAIR), (reading(*STARS), THREE)],
    ids=["one", "pair", "pair, found in the other order", "three"],
)
def test_what_is_as_stated_is_right(read: Reading, stated: dict[str, str]) -> None:
    right = judge(read, stated)
    assert all(right.values()), right
    claimed = {slot.removesuffix(" 2") for slot in stated} | {"count", ALL}
    assert right.keys() == claimed, "what the caption states is judged, no more, and the count"


@pytest.mark.parametrize(
    ("attribute", "read", "stated"),
    [
        ("colour", reading(replace(CIRCLE, colour="orange")), ONE),
        ("shape", reading(replace(CIRCLE, shape="unclear")), ONE),
        ("size", reading(replace(CIRCLE, size="small")), ONE),
        ("position", reading(moved(CIRCLE, 0.5, 0.5)), ONE),
        ("background", Reading("white", (CIRCLE,)), ONE),
        ("count", reading(CIRCLE, STAR), ONE),
        ("colour", reading(CIRCLE, replace(STAR, colour="green")), PAIR),
        ("shape", reading(replace(CIRCLE, shape="ring"), STAR), PAIR),
        ("size", reading(CIRCLE, replace(STAR, size="large")), PAIR),
        ("relation", reading(moved(CIRCLE, 0.73, 0.5), moved(STAR, 0.27, 0.5)), PAIR),
        ("relation", reading(moved(CIRCLE, 0.5, 0.27), moved(STAR, 0.5, 0.73)), PAIR),
        ("relation", reading(moved(CIRCLE, 0.27, 0.2), moved(STAR, 0.73, 0.8)), PAIR),
        ("relation", reading(moved(CIRCLE, 0.46, 0.5), moved(STAR, 0.54, 0.5)), PAIR),
        ("background", Reading("unclear", (CIRCLE, STAR)), PAIR),
        ("count", reading(CIRCLE, STAR, moved(STAR, 0.5, 0.8)), PAIR),
        ("colour", reading(*STARS[:2], replace(STARS[2], colour="red")), THREE),
        ("shape", reading(*STARS[:2], replace(STARS[2], shape="heart")), THREE),
        ("size", reading(*STARS[:2], replace(STARS[2], size="large")), THREE),
        ("count", reading(*STARS[:2]), THREE),
        ("count", reading(*STARS, moved(STAR, 0.5, 0.2)), THREE),
    ],
)
def test_each_attribute_fails_alone(attribute: str, read: Reading, stated: dict[str, str]) -> None:
    assert wrong(read, stated) == {attribute}, f"{read} for {stated}"


def test_colours_given_to_the_wrong_things_are_wrong() -> None:
    swapped = reading(replace(CIRCLE, colour="blue"), replace(STAR, colour="red"))
    assert wrong(swapped, PAIR) == {"colour"}
    unsized = {slot: value for slot, value in PAIR.items() if not slot.startswith("size")}
    for found in (swapped.objects, swapped.objects[::-1]):
        assert wrong(reading(*found), unsized) == {"colour"}, (
            "as colours, the relation would be wrong beside the shapes"
        )


@pytest.mark.parametrize("stated", [ONE, PAIR, THREE], ids=["one", "pair", "three"])
def test_nothing_drawn_is_all_wrong_but_the_background(stated: dict[str, str]) -> None:
    assert wrong(reading(), stated) == judge(reading(), stated).keys() - {"background", ALL}


def test_one_of_a_pair_missing() -> None:
    assert wrong(reading(CIRCLE), PAIR) == {"colour", "shape", "size", "relation", "count"}


@pytest.mark.parametrize("relation", SLOTS["relation"])
def test_each_relation_as_it_is_drawn(relation: str) -> None:
    scene = Scene((Thing("circle", "red", "large"), Thing("star", "blue", "small")), "gray", relation=relation)
    prompt = Prompt("captions", "", PAIR | {"relation": relation}, 0)
    (verdict,) = semantic.judge_pictures([Image.fromarray(draw(scene, np.random.default_rng(0)))], [prompt])
    assert verdict.right[ALL], f"{relation}: {verdict.right}, {verdict.reading}"
    for other in set(SLOTS["relation"]) - {relation}:
        assert wrong(verdict.reading, PAIR | {"relation": other}) == {"relation"}, f"drawn {relation}, stated {other}"


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_that_of_newcombe_1998(right: int, number: int, low: float, high: float) -> None:
    assert wilson(right, number) == pytest.approx((low, high), abs=5e-5)
    assert wilson(number - right, number) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_prompts_are_the_same_at_each_call_and_held_out() -> None:
    prompts = make_prompts(200)
    assert prompts == make_prompts(200)
    assert prompts[:50] == make_prompts(50), "a longer list begins as a shorter one"
    assert digest(prompts) != digest(make_prompts(200, seed=1)), "another seed, other prompts"
    assert [prompt.seed for prompt in prompts] == list(range(200))
    suites = [prompt.suite for prompt in prompts]
    assert {suite: suites.count(suite) for suite in SUITES} == {"captions": 120, "reworded": 40, "short": 40}
    for prompt in prompts:
        pairs = {
            (prompt.stated["shape" + s], prompt.stated["colour" + s])
            for s in ("", " 2")
            if "shape" + s in prompt.stated
        }
        assert pairs & HELD_OUT, f"{prompt.text} names nothing that is held out"
        assert all(value in SLOTS[slot] for slot, value in prompt.stated.items()), prompt
    assert set().union(*(prompt.stated for prompt in prompts)) == set(SLOTS), "every slot is asked for"


def test_the_train_split_names_nothing_held_out() -> None:
    for prompt in make_prompts(100, "train"):
        assert (prompt.stated["shape"], prompt.stated["colour"]) not in HELD_OUT, prompt.text


def test_short_prompts_are_bare() -> None:
    texts = [prompt.text for prompt in make_prompts(200) if prompt.suite == "short"]
    words = {word for text in texts for word in text.split()}
    assert not words & {"a", "an", "small", "large", "background", "on", "center", "top"}, sorted(words)
    assert any(text.startswith(("two ", "2 ", "three ", "3 ")) for text in texts)
    assert any(" and " in text for text in texts)
    assert any(len(text.split()) == 2 for text in texts)


def true_pictures(prompts: Sequence[Prompt]) -> list[Image.Image]:
    shapes = Shapes(split="held_out")
    return [Image.fromarray(shapes.image(prompt.seed)) for prompt in prompts]


def test_true_pictures_are_all_right() -> None:
    prompts = make_prompts(100)
    scores = tally(semantic.judge_pictures(true_pictures(prompts), prompts))
    assert scores["attributes"].keys() == {*ATTRIBUTES, ALL}
    assert all(score["right"] == score["number"] > 0 for score in scores["attributes"].values()), scores
    assert sum(score["number"] for score in scores["suites"].values()) == scores["attributes"][ALL]["number"] == 100
    assert below_gate(scores["attributes"]) == []


def test_pictures_of_other_prompts_are_seldom_right() -> None:
    prompts = make_prompts(101)
    scores = tally(semantic.judge_pictures(true_pictures(prompts)[1:], prompts[:-1]))
    assert scores["attributes"][ALL]["accuracy"] < 0.05, scores


def score(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy}


def test_the_gate_is_97_percent_of_each_and_95_of_all() -> None:
    enough = {name: score(0.97) for name in ATTRIBUTES} | {ALL: score(0.95)}
    assert below_gate(enough) == []
    for name in (*ATTRIBUTES, ALL):
        (line,) = below_gate(enough | {name: score(GATE[name] - 0.005)})
        assert line.startswith(f"{name} is right in"), line


def test_a_loss_beyond_the_allowed_points_is_told() -> None:
    before = {"colour": score(0.99), ALL: score(0.95)}
    assert lost({"colour": score(0.98), ALL: score(0.96)}, before, 1.0) == [], "a point is allowed, a gain anyway"
    (line,) = lost({"colour": score(0.975), ALL: score(0.95)}, before, 1.0)
    assert line.startswith("colour lost 1.5 points"), line
    assert len(lost({ALL: score(0.95)}, before, 1.0)) == 1, "an attribute that is no longer there is lost"


def test_the_grid_frames_failures_in_red() -> None:
    prompts = make_prompts(70)
    pictures = true_pictures(prompts)
    verdicts = semantic.judge_pictures(pictures, prompts)
    verdicts[9] = replace(verdicts[9], right={**verdicts[9].right, ALL: False})
    sheet = np.asarray(verdict_grid(pictures, verdicts))
    assert (sheet == (224, 0, 0)).all(-1).any(), "no red frame"
    rows, columns = np.nonzero((sheet == (224, 0, 0)).all(-1))
    height, width = sheet.shape[0] // (SHOWN // 8), sheet.shape[1] // 8
    assert {(int(r) // height, int(c) // width) for r, c in zip(rows, columns, strict=True)} == {(1, 1)}


@pytest.fixture(scope="module")
def small_model() -> Pipeline:
    return Pipeline(SMALL_MODEL, device="cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, small_model: Pipeline) -> list[str]:
    """The true drawings in the place of the model's, but of every tenth of those samplers that are put into the list."""
    spoilt: list[str] = []

    def draw_true(pipe: Pipeline, prompts: Sequence[Prompt], way: semantic.Way) -> Iterator[Image.Image]:
        for index, picture in enumerate(true_pictures(prompts)):
            if "not finite" in spoilt:
                raise NumericsError("unet: not finite")
            blank = Image.new("RGB", picture.size, "magenta")
            yield blank if index % 10 == 0 and way.sampler in spoilt else picture

    monkeypatch.setattr(semantic, "draw", draw_true)
    monkeypatch.setattr(semantic, "Pipeline", lambda *model, **options: small_model)
    return spoilt


def bench(out: Path, *more: str) -> int:
    return semantic.main(["--prompts", "20", "--device", "cpu", "--out", str(out), *more])


def test_a_worse_result_fails_by_gate_and_by_baseline(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert bench(first, "--gate") == 0, capsys.readouterr().out
    assert bench(second, "--gate", "--baseline", str(first)) == 0, capsys.readouterr().out
    drawn.append("ddim")
    capsys.readouterr()
    assert bench(second, "--baseline", str(first)) == 1
    assert "ddim: all lost 10.0 points, from 100.0%; 1 are allowed" in capsys.readouterr().out
    assert bench(second, "--baseline", str(first), "--allowed", "50") == 0
    assert bench(second, "--gate") == 1
    assert "ddim: all is right in 90.0%, not 95%" in capsys.readouterr().out
    (run,) = json.loads(second.read_text())["runs"]
    assert [failure["seed"] for failure in run["failures"]] == [0, 10]
    assert run["failures"][0]["read"] == "nothing on unclear"


def test_a_baseline_of_other_prompts_is_refused(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert bench(first) == 0
    for more, why in {
        ("--seed", "1"): "is of other prompts",
        ("--steps", "7"): "has no scores of ddim at 7 steps",
        ("--sampler", "euler"): "has no scores of euler at 20 steps",
    }.items():
        assert bench(second, "--baseline", str(first), *more) == 2
        assert why in capsys.readouterr().out
    first.write_text("{}")
    assert bench(second, "--baseline", str(first)) == 2
    assert "is no result of bench.semantic" in capsys.readouterr().out
    assert not second.exists(), "refused before anything was drawn"


def test_a_net_that_is_not_finite_fails(drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn.append("not finite")
    assert bench(tmp_path / "out.json") == 1
    assert "ddim: no pictures: unet: not finite" in capsys.readouterr().out


def test_several_samplers_are_compared_with_ddim_at_50_steps(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn.append("DPM++ 2M Karras")
    assert bench(tmp_path / "out.json", "--sampler", "euler,DPM++ 2M Karras") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [run["sampler"] for run in result["runs"]] == ["euler", "dpmpp_2m karras"]
    assert (result["reference"]["sampler"], result["reference"]["steps"]) == ("ddim", 50)
    table = capsys.readouterr().out.split("to ddim at 50")[1]
    cells = [line.split() for line in table.splitlines() if line]
    assert (cells[0][0], cells[0][-1]) == ("euler", "+0.0")
    assert (cells[1][0], cells[1][-1]) == ("dpmpp_2m", "-10.0")


def test_all_samplers_are_all_but_those_of_distilled_models() -> None:
    ways = semantic.ways_of(semantic.arguments(["--sampler", "all"]))
    names = {way.name for way in ways}
    assert {"ddim", "plms", "euler_ancestral", "unipc"} <= names
    assert not names & {"lcm", "tcd"}


def test_an_unknown_sampler_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench(tmp_path / "out.json", "--sampler", "dimm") == 2
    assert "'dimm' is unknown" in capsys.readouterr().out


def test_the_whole_way_on_the_small_model(
    tmp_path: Path, small_model: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "out.json", tmp_path / "grid.png"
    arguments = ["--prompts", "5", "--steps", "4", "--batch", "3", "--device", "cpu"]
    assert semantic.main([*arguments, "--out", str(out), "--grid", str(sheet)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    told = {"date", "commit", "cpu", "gpus", "versions", "model", "device", "dtype", "threads", "guidance"}
    assert told <= result.keys()
    (run,) = result["runs"]
    assert run["attributes"][ALL]["number"] == run["attributes"]["count"]["number"] == 5
    assert len(run["failures"]) == 5 - run["attributes"][ALL]["right"]
    assert "95% interval" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    one = next(iter(semantic.draw(small_model, make_prompts(1), semantic.Way("ddim", 4, 4.0, 1))))
    two = list(semantic.draw(small_model, make_prompts(2), semantic.Way("ddim", 4, 4.0, 2)))
    assert np.abs(np.asarray(one, int) - np.asarray(two[0], int)).max() <= 1, "a picture depends on its batch"
    assert np.abs(np.asarray(one, int) - np.asarray(two[1], int)).max() > 10, "two prompts gave one picture"


def test_a_verdict_counts_only_what_is_stated() -> None:
    prompt = Prompt("short", "red circle", {"count": "1", "colour": "red", "shape": "circle"}, 0)
    verdict = Verdict(prompt, reading(CIRCLE), judge(reading(CIRCLE), prompt.stated))
    scores = tally([verdict])
    assert scores["attributes"].keys() == {"colour", "shape", "count", ALL}
    assert scores["suites"].keys() == {"short"}
