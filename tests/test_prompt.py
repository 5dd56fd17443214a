"""Prompts → context: against transformers' CLIPTextModel on the chunks, and what the cache and `generate` make of it."""

import json
import logging
import shutil
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import fastsd
from fastsd import prompt_cache
from fastsd.errors import FastSDError, ParameterError, PromptError
from tests import oracle, prompt_reference
from tests.small_model import SMALL_MODEL
from tests.tolerances import NET

PROMPT = "a large red circle in the center on a white background"
LONG = ", ".join(["a small blue square above a large green triangle", "a yellow star"] * 7)  # 2 chunks
FAST: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}


@cache
def theirs(folder: Path) -> tuple[transformers.CLIPTokenizer, transformers.CLIPTextModel]:
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"), encoder.eval()


def direct(folder: Path, prompt: str, clip_skip: int = 0, chunks: int = 1) -> Tensor:
    """What the web UI computes, with transformers' tokenizer and text encoder: [1, L, C], at least so many chunks long."""
    tokenizer, encoder = theirs(folder)
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    sections = [
        [
            (index, weight)
            for text, weight in section
            for index in tokenizer(text, truncation=False, add_special_tokens=False).input_ids
        ]
        for section in prompt_reference.phrases(prompt)
    ]
    found = prompt_reference.chunks(sections, lambda token: token[0] == comma)
    parts = []
    for chunk in found + [[]] * (chunks - len(found)):
        ids = [tokenizer.bos_token_id, *(index for index, _ in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        weights = np.ones((77, 1))
        weights[1 : len(chunk) + 1, 0] = [weight for _, weight in chunk]
        with torch.inference_mode():
            states = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1 - clip_skip]
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            z = norm(states)[0].double().numpy()
        parts.append(z * weights * (z.mean() / (z * weights).mean()))
    return torch.from_numpy(np.concatenate(parts))[None]


PROMPTS = {
    "empty": "",
    "weights": "(a (circle:1.3)) [on] a (square:0.5), red, (((star)))",
    "lone brackets": r"(a circle, \(red\) [star",
    "long": LONG,
    "long, with weights": f"(a purple ring:1.4), {LONG}, [{LONG}]",
    "no comma": "red " * 100,
    "break": f"a circle BREAK (a star BREAK red:1.2), {LONG} BREAK",
    "a weight of 0": "a circle (red:0) star",
    "odd letters": "(🦊:1.2) [مربع أزرق] \0 日本",
}


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("case", PROMPTS)
def test_contexts_equal_transformers_on_the_chunks(
    random_pipe: fastsd.Pipeline, random_model: Path, case: str, clip_skip: int
) -> None:
    ours = random_pipe.encode_prompt(PROMPTS[case], prompt_style="a1111", clip_skip=clip_skip)
    expected = direct(random_model, PROMPTS[case], clip_skip)
    oracle.assert_close(ours, expected.float(), NET, case)


@pytest.fixture(scope="module")
def random_pipe(random_model: Path) -> fastsd.Pipeline:
    return fastsd.Pipeline(random_model, device="cpu", backend="reference")


def test_the_trained_models_too(pipe: fastsd.Pipeline, small_model: Path) -> None:
    for prompt in (PROMPTS["weights"], PROMPTS["break"]):
        ours = pipe.encode_prompt(prompt, prompt_style="a1111")
        oracle.assert_close(ours, direct(small_model, prompt).float(), NET, prompt)


def test_padding_with_another_token(small_model: Path, tmp_path: Path) -> None:
    """SD 2 ends a prompt with one token and pads with another, 0."""
    shutil.copytree(small_model, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    names = config.with_name("special_tokens_map.json")
    for path in (config, names):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    pipe = fastsd.Pipeline(tmp_path / "model", device="cpu", backend="reference")
    assert pipe.tokenizer.pad_id == 0 != pipe.tokenizer.end_id
    for prompt in (PROMPTS["weights"], PROMPTS["break"]):
        ours = pipe.encode_prompt(prompt, prompt_style="a1111")
        oracle.assert_close(ours, direct(tmp_path / "model", prompt).float(), NET, prompt)


def test_plain_prompts_equal_transformers_and_have_no_syntax(random_pipe: fastsd.Pipeline, random_model: Path) -> None:
    tokenizer, encoder = theirs(random_model)
    prompts = [*PROMPTS.values(), PROMPT]
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = encoder(ids).last_hidden_state
    oracle.assert_close(random_pipe.encode_prompt(prompts), expected, NET, "plain prompts")


@pytest.mark.parametrize("prompt", ["", PROMPT, "red " * 75, "a, b, c: 1", "🦊 مربع", "a \\ b"])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_short_prompts_without_syntax_are_the_same_bits_in_both_styles(
    pipe: fastsd.Pipeline, prompt: str, clip_skip: int
) -> None:
    plain, other = (pipe.encode_prompt(prompt, prompt_style=style, clip_skip=clip_skip) for style in ("plain", "a1111"))
    assert plain.shape == (1, 77, 128)
    assert torch.equal(plain, other)


def test_prompts_of_a_call_are_as_long_as_the_longest(pipe: fastsd.Pipeline, small_model: Path) -> None:
    together = pipe.encode_prompt([PROMPT, LONG, PROMPT], prompt_style="a1111")
    assert together.shape == (3, 154, 128)
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], pipe.encode_prompt(LONG, prompt_style="a1111"))
    assert torch.equal(together[0], pipe.encode_prompt([PROMPT, ""]).flatten(0, 1)), "filled up with empty prompts"
    oracle.assert_close(together[:1], direct(small_model, PROMPT, chunks=2).float(), NET, "a prompt and an empty chunk")


# In generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "a moon"), (PROMPT, LONG), (LONG, LONG)])
def test_both_sides_of_guidance_have_one_length(pipe: fastsd.Pipeline, prompt: str, negative: str) -> None:
    embeds, negative_embeds = pipe.encode_prompt([prompt, negative], prompt_style="a1111").split(1)
    assert embeds.shape == negative_embeds.shape == (1, 154, 128)
    text = pipe.generate(prompt, negative, prompt_style="a1111", **FAST).images
    given = pipe.generate(prompt_embeds=embeds, negative_prompt_embeds=negative_embeds, **FAST).images
    mixed = pipe.generate(prompt_embeds=embeds, negative_prompt=negative, prompt_style="a1111", **FAST).images
    assert torch.equal(text, given)
    assert torch.equal(text, mixed), "a text beside embeddings is filled up to their length"


def test_pictures_of_long_and_weighted_prompts_equal_diffusers(
    pipe: fastsd.Pipeline, diffusers_pipe: Any, small_model: Path
) -> None:
    """diffusers has no such syntax; it is given the direct computation's embeddings."""
    prompt, negative = f"(a red circle:1.3) BREAK {LONG}", "[a moon]"
    expected = diffusers_pipe(
        prompt_embeds=direct(small_model, prompt).float(),
        negative_prompt_embeds=direct(small_model, negative, chunks=3).float(),
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(5)],
        output_type="np",
    ).images
    ours = pipe.generate(prompt, negative, prompt_style="a1111", num_inference_steps=4, seed=5, output_type="np").images
    assert pipe.encode_prompt(prompt, prompt_style="a1111").shape[1] == 3 * 77
    oracle.assert_same_picture(ours, expected, prompt)


def test_a_weight_changes_the_picture_and_the_text_stays_as_written(pipe: fastsd.Pipeline) -> None:
    prompt, negative = "a (red:1.4) circle\nBREAK \\(x\\) <b>", "[moon] (ring:1.2"
    result = pipe.generate(prompt, negative, prompt_style="a1111", **FAST)
    plain = pipe.generate("a red circle", negative, prompt_style="a1111", **FAST)
    assert not torch.equal(result.images, plain.images)
    assert result.parameters[0].startswith(f"{prompt}\nNegative prompt: {negative}\nSteps: 1")
    assert result.warnings == []


def test_each_prompt_of_a_call_has_its_own_negative_one(pipe: fastsd.Pipeline) -> None:
    prompts, negatives = [PROMPT, LONG], ["a (moon:1.2)", ""]
    together = pipe.generate(prompts, negatives, prompt_style="a1111", **FAST | {"seed": [1, 1]}).images
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        embeds = pipe.encode_prompt([prompt, negative, LONG], prompt_style="a1111")
        alone = pipe.generate(prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:2], **FAST).images
        oracle.assert_close(together[index : index + 1], alone, NET, f"prompt {index}")


def test_a_long_negative_prompt_without_guidance_is_warned_of_and_has_no_effect(pipe: fastsd.Pipeline) -> None:
    without = pipe.generate(PROMPT, guidance_scale=1.0, **FAST).images
    result = pipe.generate(PROMPT, LONG, prompt_style="a1111", guidance_scale=1.0, **FAST)
    assert "negative_prompt has no effect" in result.warnings[0]
    assert torch.equal(result.images, without)


def test_what_does_not_fit_is_told(pipe: fastsd.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe.generate(LONG, prompt_style="a1111", **FAST).warnings == []
    with caplog.at_level(logging.WARNING, "fastsd"):
        assert pipe.encode_prompt("red " * 75 + "Moon").shape == (1, 77, 128)
        assert pipe.encode_prompt("red " * 2400 + "(Star)", prompt_style="a1111").shape == (1, 32 * 77, 128)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("is longer than 77 tokens, so this was left out: 'Moon'")
    assert second.endswith("is longer than 32 chunks of 75 tokens, so this was left out: 'Star'")


BAD_CALLS: dict[str, tuple[dict[str, Any], type[FastSDError], str]] = {
    "unknown style": (
        {"prompt_style": "compel"},
        ParameterError,
        "prompt_style: 'compel' is unknown; choose one of plain",
    ),
    "style no text": ({"prompt_style": None}, ParameterError, "prompt_style: None is unknown"),
    "a weight too large": ({"prompt": "(a:1000)"}, PromptError, "prompt: 'a' weighs 1000; weights go from -100 to 100"),
    "a list's weight": ({"prompt": ["a", "(b:-999)"]}, PromptError, r"prompt\[1\]: 'b' weighs -999"),
    "a negative's weight": ({"negative_prompt": "(a:1000)"}, PromptError, "negative_prompt: 'a' weighs 1000"),
    "10,000 brackets": ({"prompt": "(" * 10_000 + "a" + ")" * 10_000}, PromptError, "'a' weighs inf"),
    "a megabyte": ({"prompt": "(a) " * 250_001}, PromptError, "prompt: has 1,000,004 bytes"),
    "a lone surrogate": ({"prompt": "(\ud800)"}, PromptError, "prompt: holds a lone surrogate"),
    "no prompts": ({"prompt": []}, PromptError, "prompt: must be a string or a non-empty list"),
    "prompts of numbers": ({"prompt": [3]}, PromptError, r"prompt\[0\]: must be a string"),
    "negatives that do not match": ({"negative_prompt": ["a", "b"]}, PromptError, "2 given for 1 prompts"),
    "longer than the embeddings": (
        {"prompt": None, "prompt_embeds": torch.ones(1, 77, 128), "negative_prompt": LONG},
        PromptError,
        r"differ in tokens \((154, 77|77, 154)\); give both as embeddings of one length",
    ),
    "embeddings of no whole chunks": (
        {"prompt": None, "prompt_embeds": torch.ones(1, 100, 128)},
        PromptError,
        r"differ in tokens \((100, 77|77, 100)\)",
    ),
    "plain beside long embeddings": (
        {"prompt": None, "prompt_embeds": torch.ones(1, 154, 128), "prompt_style": "plain"},
        PromptError,
        r"differ in tokens \((154, 77|77, 154)\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(pipe: fastsd.Pipeline, case: str) -> None:
    arguments, error, says = BAD_CALLS[case]
    with pytest.raises(error, match=says) as caught:
        pipe.generate(**{"prompt": PROMPT, "prompt_style": "a1111", **FAST} | arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt_style": "a1112"}, "prompt_style"),
        ({"clip_skip": 99}, "clip_skip"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "(a:1000)", "prompt_style": "a1111"}, "weighs 1000"),
    ],
)
def test_encode_prompt_checks_its_arguments(pipe: fastsd.Pipeline, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        pipe.encode_prompt(**{"prompt": PROMPT} | arguments)
    assert isinstance(caught.value, FastSDError)


@pytest.mark.parametrize(
    "prompt",
    ["", "\0", "🦊👩‍👩‍👧‍👦", "(مربع:1.2) أزرق", "((((" * 50, "]" * 99, "<|endoftext|> (a)", "BREAK", "(:1.2)", ":"],
)
def test_odd_prompts_are_valid(pipe: fastsd.Pipeline, prompt: str) -> None:
    assert pipe.generate(prompt, prompt_style="a1111", **FAST).images.isfinite().all()


# The cache ------------------------------------------------------------------------------------------------------------


class Counted:
    """A pipeline with nothing kept, and how often its text encoder ran."""

    def __init__(self, pipe: fastsd.Pipeline) -> None:
        self.pipe = pipe
        self.calls = 0
        self.forget()
        pipe.text_encoder.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def forget(self) -> None:
        self.pipe._contexts = prompt_cache.ContextCache(self.pipe.text_encoder, self.pipe._encode_tokens)

    def encode(self, prompt: str | list[str], **options: Any) -> tuple[Tensor, int]:
        """Contexts, and how many chunks were encoded for them."""
        before = self.calls
        return self.pipe.encode_prompt(prompt, **options), self.calls - before


@pytest.fixture(scope="module")
def own_pipe() -> fastsd.Pipeline:
    return fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")


@pytest.fixture
def counted(own_pipe: fastsd.Pipeline) -> Counted:
    return Counted(own_pipe)


def test_equal_prompts_are_encoded_once_and_the_bits_stay(counted: Counted) -> None:
    first, calls = counted.encode([PROMPT, "a moon", PROMPT])
    assert calls == 2
    kept = {}
    for prompt, encoded in {PROMPT: 0, "a moon": 0, "a star": 1}.items():
        kept[prompt], calls = counted.encode(prompt)
        assert calls == encoded, prompt
    again, calls = counted.encode([PROMPT, "a moon", PROMPT])
    assert calls == 0
    assert torch.equal(first, again)
    for prompt, context in kept.items():
        counted.forget()
        afresh, calls = counted.encode(["another", prompt])
        assert calls == 2
        assert torch.equal(context[0], afresh[1]), f"{prompt}: other bits than kept ones"


def test_a_picture_with_kept_contexts_is_the_same_to_the_last_bit(counted: Counted) -> None:
    first = counted.pipe.generate(f"(red:1.2) {LONG}", "a moon", prompt_style="a1111", **FAST).images
    before = counted.calls
    again = counted.pipe.generate(f"(red:1.2) {LONG}", "a moon", prompt_style="a1111", **FAST).images
    other = counted.pipe.generate(f"(red:1.3) {LONG}", "a moon", prompt_style="a1111", **FAST).images
    assert counted.calls == before, "another weight of the same words needs no new encoding"
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clip_skip_is_told_apart(counted: Counted) -> None:
    contexts = [counted.encode(PROMPT, clip_skip=skip)[0] for skip in (0, 1, 0, 1)]
    assert counted.calls == 2
    assert torch.equal(contexts[0], contexts[2])
    assert torch.equal(contexts[1], contexts[3])
    assert not torch.equal(contexts[0], contexts[1])


def test_what_is_given_away_may_be_written_to(counted: Counted) -> None:
    first, _ = counted.encode(PROMPT)
    kept = first.clone()
    first.zero_()
    assert torch.equal(counted.encode(PROMPT)[0], kept)


def test_the_least_recently_used_is_forgotten(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "SIZE", 2)
    for prompt, encoded in [("a", 1), ("b", 1), ("a", 0), ("c", 1), ("a", 0), ("b", 1), ("c", 1)]:
        assert counted.encode(prompt)[1] == encoded, prompt
    assert counted.encode(["a", "b", "c", "d"])[0].shape[0] == 4, "more prompts at once than are kept"


def test_a_weight_changed_in_place_is_noticed(counted: Counted) -> None:
    first, _ = counted.encode(PROMPT)
    weight = counted.pipe.text_encoder.encoder.layers[0].mlp.fc1.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        assert not torch.equal(counted.encode(PROMPT)[0], first)
        weight.copy_(kept)
    assert torch.equal(counted.encode(PROMPT)[0], first)
    assert counted.encode(PROMPT)[1] == 0


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_a_weight_replaced_twice_is_noticed_even_at_the_same_address(counted: Counted, how: str) -> None:
    """Freed memory is given out again: an address and a version alone may be those of other weights."""
    norm = counted.pipe.text_encoder.final_layer_norm

    def replace(value: Tensor) -> None:
        if how == "data":
            norm.weight.data = value
        else:
            norm.weight = torch.nn.Parameter(value, requires_grad=False)

    replace(torch.full((128,), 1.0))
    first, _ = counted.encode(PROMPT)
    address = norm.weight.data_ptr()
    kept = []
    for _ in range(100):
        replace(torch.ones(1))
        replace(torch.full((128,), 2.0))
        if norm.weight.data_ptr() == address:
            break
        kept.append(torch.empty(128))
    assert not torch.equal(counted.encode(PROMPT)[0], first)


def test_threads_share_it(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "SIZE", 3)
    prompts = [f"a {colour} circle" for colour in ("red", "green", "blue", "yellow", "purple")]
    expected = {prompt: counted.encode(prompt)[0] for prompt in prompts}
    wrong: list[str] = []

    def work(offset: int) -> None:
        for turn in range(20):
            prompt = prompts[(turn * offset) % len(prompts)]
            if not torch.equal(counted.encode(prompt)[0], expected[prompt]):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
