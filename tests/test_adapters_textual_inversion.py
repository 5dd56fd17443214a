"""Textual inversion against diffusers' load_textual_inversion: the same ids, the same embedding, the same context."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.adapters import SwapLock, TextualInversions
from fastsd.errors import CheckpointError, ParameterError, PromptError
from fastsd.tokenizer import Tokenizer
from tests import oracle
from tests.adapter_builders import save, save_small_model
from tests.tolerances import NET

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WIDTH = {"sd1": 48, "sd2": 64}

PROMPTS = [
    "a photo of <cat>",
    "<cat>",
    "<cat> <cat>, <dog> and a red circle",
    "<cat><dog>s, my<cat>!",
    "<cat>_1 and <cat>_2, <cat >, < cat>",
    "the <cat> " * 40,  # cut in the middle of a word of three vectors
    "no such word, a red circle",
    "",
]


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture
def ours(sd1: Path) -> fastsd.Pipeline:
    return fastsd.Pipeline(sd1, device="cpu", backend="reference")


def words_of(pipe: fastsd.Pipeline) -> TextualInversions:
    return TextualInversions(pipe, SwapLock())


def embedding(pipe: fastsd.Pipeline) -> Tensor:
    return pipe.text_encoder.embeddings.token_embedding.weight


def their_ids(theirs: diffusers.StableDiffusionPipeline, prompts: list[str]) -> list[list[int]]:
    converted = theirs.maybe_convert_prompt(prompts, theirs.tokenizer)
    return theirs.tokenizer(converted, padding="max_length", max_length=77, truncation=True).input_ids


def test_words_as_diffusers_learns_them(model: Path, tmp_path: Path) -> None:
    """A word of three vectors and one of one: the tokens, the rows of the embedding, the context that the UNet reads."""
    ours, theirs = fastsd.Pipeline(model, device="cpu", backend="reference"), oracle.load_pipeline(model)
    width = embedding(ours).shape[1]
    cat = save({"<cat>": vectors(3, width)}, tmp_path / "learned_embeds.safetensors")
    dog = tmp_path / "dog.pt"
    torch.save({"string_to_param": {"*": vectors(1, width, 1)}, "name": "<dog>", "string_to_token": {"*": 265}}, dog)
    plain = ours.tokenizer.encode(PROMPTS[-2:]).ids
    theirs.load_textual_inversion(str(tmp_path), weight_name=cat.name)
    theirs.load_textual_inversion(str(dog))
    words = words_of(ours)
    assert words.load_textual_inversion(tmp_path) == "<cat>"
    assert words.load_textual_inversion(dog, allow_pickle=True) == "<dog>"

    found = ours.tokenizer.encode(PROMPTS).ids
    for prompt, ids, wanted in zip(PROMPTS, found, their_ids(theirs, PROMPTS), strict=True):
        oracle.assert_equal(ids, wanted, f"{prompt!r}: {ids} instead of {wanted}")
    assert found[-2:] == plain, "prompts without the words are encoded otherwise than before"
    assert torch.equal(embedding(ours), theirs.text_encoder.get_input_embeddings().weight), "another embedding"
    assert ours.tokenizer.vocab_size == len(embedding(ours)) == len(theirs.tokenizer)
    ids = torch.tensor(found)
    context = theirs.text_encoder(ids)[0]
    oracle.assert_close(ours.text_encoder(ids), context, NET, "context")
    assert not embedding(ours).requires_grad
    assert not embedding(ours).is_inference()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unloading_gives_back_the_first_model(sd1: Path, tmp_path: Path, dtype: str) -> None:
    pipe = fastsd.Pipeline(sd1, device="cpu", backend="reference", dtype=dtype)
    tokenizer, weight = pipe.tokenizer, embedding(pipe)
    first, address = weight.clone(), weight.data_ptr()
    words = words_of(pipe)
    files = {
        name: save({name: vectors(count, 48, count)}, tmp_path / f"{count}.safetensors")
        for name, count in {"<a>": 1, "<b>": 4, "<c>": 2}.items()
    }
    with torch.inference_mode():
        for path in files.values():
            words.load_textual_inversion(path)
    rows = {name: embedding(pipe)[list(pipe.tokenizer.placeholders[name])] for name in files}
    assert all(len(set(ids)) == len(ids) for ids in pipe.tokenizer.placeholders.values())
    words.unload_textual_inversion("<b>")
    assert pipe.tokenizer.placeholders.keys() == {"<a>", "<c>"}
    for name, ids in pipe.tokenizer.placeholders.items():
        assert torch.equal(embedding(pipe)[list(ids)], rows[name]), f"{name} has other vectors now"
    assert len(embedding(pipe)) == len(first) + 3
    assert torch.equal(embedding(pipe)[: len(first)], first)
    words.load_textual_inversion(files["<b>"])
    words.unload_textual_inversion()
    assert pipe.tokenizer is tokenizer
    assert embedding(pipe) is weight
    assert embedding(pipe).data_ptr() == address
    assert torch.equal(embedding(pipe), first)
    assert pipe.text_encoder.embeddings.token_embedding.num_embeddings == len(first)
    words.unload_textual_inversion()  # of nothing: nothing


def test_a_word_is_seen_in_the_picture(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """Through generate, cut prompts and all; without the word the picture is the same, bit by bit, while it is loaded."""
    call: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    plain, spelled = (ours.generate(text, **call).images for text in ("a red circle", "a <cat>"))
    words = words_of(ours)
    words.load_textual_inversion(save({"<cat>": 3 * vectors(2, 48)}, tmp_path / "cat.safetensors"))
    assert (ours.generate("a red circle", **call).images == plain).all()
    assert (ours.generate("a <cat>", **call).images != spelled).any()
    words.unload_textual_inversion()
    assert (ours.generate("a <cat>", **call).images == spelled).all()


def test_case_and_place(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """As diffusers' tokenizer, a word is matched in any case and inside of others; all its vectors are put there."""
    words = words_of(ours)
    path = save({"emb_params": vectors(2, 48)}, tmp_path / "Bad-Hands-5.safetensors")
    assert words.load_textual_inversion(path) == "Bad-Hands-5", "A1111 takes the file's name"
    pieces = list(ours.tokenizer.placeholders["Bad-Hands-5"])
    for prompt in ("Bad-Hands-5", "bad-hands-5", "xbad-HANDS-5y"):
        (ids,) = ours.tokenizer.encode([prompt]).ids
        assert [index for index in ids if index >= pieces[0]] == pieces, f"{prompt!r} is encoded as {ids[:8]}"


def test_what_is_cut_is_told(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    words_of(ours).load_textual_inversion(save({"<cat>": vectors(10, 48)}, tmp_path / "cat.safetensors"))
    tokens = ours.tokenizer.encode(["<cat> " * 7 + "<cat> END", "<cat>"])
    assert tokens.dropped == ["<cat> END", ""], "the word whose vectors were cut in two is not told"
    assert all(len(ids) == 77 for ids in tokens.ids)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("<|endoftext|>", "in the vocabulary already"),
        ("a</w>", "in the vocabulary already"),
        ("<OLD>", "in the vocabulary already"),  # lower-cased it is one that is there
        ("<old>", "is loaded already|in the vocabulary already"),
        ("<old>_1", "in the vocabulary already"),
        ("", "1 to 200 characters"),
        (" \n ", "1 to 200 characters"),
        ("x" * 300, "1 to 200 characters"),
        (7, "must be a string"),
    ],
)
def test_words_that_are_refused(ours: fastsd.Pipeline, tmp_path: Path, token: Any, reason: str) -> None:
    words = words_of(ours)
    words.load_textual_inversion(save({"<old>": vectors(2, 48)}, tmp_path / "old.safetensors"))
    tokenizer, weight = ours.tokenizer, embedding(ours)
    path = save({"<new>": vectors(2, 48)}, tmp_path / "new.safetensors")
    with pytest.raises(ParameterError, match=reason) as caught:
        words.load_textual_inversion(path, token=token)
    assert "\n" not in str(caught.value)
    assert ours.tokenizer is tokenizer
    assert embedding(ours) is weight
    assert words.load_textual_inversion(path) == "<new>"


def test_a_piece_of_a_word_that_is_taken(ours: fastsd.Pipeline, tmp_path: Path) -> None:
    """`<a>_1` was loaded as a word of its own: `<a>` of two vectors would be encoded with it."""
    words = words_of(ours)
    words.load_textual_inversion(save({"<a>_1": vectors(1, 48)}, tmp_path / "one.safetensors"))
    with pytest.raises(ParameterError, match="'<a>_1' is in the vocabulary already"):
        words.load_textual_inversion(save({"<a>": vectors(2, 48)}, tmp_path / "two.safetensors"))


def test_files_that_are_refused(ours: fastsd.Pipeline, sd1: Path, tmp_path: Path) -> None:
    words = words_of(ours)
    tokenizer, weight = ours.tokenizer, embedding(ours)
    for state, reason in (
        ({"<a>": vectors(1, 64)}, "vectors of width 64, but the model's have 48: made for another model"),
        ({"<a>": vectors(76, 48)}, "76 vectors; a prompt has room for 75"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            words.load_textual_inversion(save(state, tmp_path / "bad.safetensors"))
    lone = save({"emb_params": vectors(1, 48)}, tmp_path / "lone.safetensors")
    with pytest.raises(PromptError, match="lone surrogate"):
        words.load_textual_inversion(lone, token="\ud800")
    with pytest.raises(ParameterError, match="'<a>' is not loaded; loaded: none"):
        words.unload_textual_inversion("<a>")
    half = fastsd.Pipeline(sd1, device="cpu", backend="reference", dtype="float16")
    with pytest.raises(CheckpointError, match="beyond the range of torch"):
        words_of(half).load_textual_inversion(save({"<a>": 1e6 * vectors(1, 48)}, tmp_path / "large.safetensors"))
    assert ours.tokenizer is tokenizer
    assert embedding(ours) is weight


def test_placeholders_leave_all_other_text_as_it_was(ours: fastsd.Pipeline) -> None:
    """The vocabulary is copied to add to it: hard cases, special tokens among them, are encoded as before."""
    texts = ["a Photo OF, it's 4k!!", "<|endoftext|>x<|startoftext|>", "😀 日本語 e\u0301 \x00", "a" * 300, "  \t\n "]
    more: Tokenizer = ours.tokenizer.with_placeholders({"<cat>": 3})
    assert more.encode(texts) == ours.tokenizer.encode(texts)
    assert ours.tokenizer.placeholders == {}
    assert more.placeholders == {"<cat>": tuple(range(ours.tokenizer.vocab_size, ours.tokenizer.vocab_size + 3))}
