"""The vocabulary's files against transformers' CLIPTokenizer: it reads the same folder, and gives the same ids."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from fastsd.config import ModelConfig
from fastsd.tokenizer import Tokenizer
from fastsd.training.vocabulary import END, START, write_vocabulary
from tests.measured import measured
from tests.training.builders import CLIP, UNET, VAE, drawings

FOREIGN_CAPTIONS = [
    "Ein grünes Café",
    "ein grünes café, 北京 und 東京",
    "北京 café",
    "日本 東京",
    "it's Anna's café!!",
    "naïve 🙂 🙂",
]


def shape_captions(count: int = 300) -> list[str]:
    data, rng = drawings(count), np.random.default_rng(0)
    return [data.caption(index, rng).text for index in range(count)]


@pytest.fixture(scope="module", params=["shapes", "foreign"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer"
    write_vocabulary({"shapes": shape_captions(), "foreign": FOREIGN_CAPTIONS}[request.param], path, 40)
    return path


TEXTS = [
    "",
    " ",
    "A LARGE Red Circle",
    "a  red\tcircle\n on   white",
    "a photograph of an astronaut riding a horse",
    "a dog's ball, they're 42; it isn't_so!?",
    "<|endoftext|> and <|startoftext|>",
    "Straße ÜBER ça café naïve",
    "cafe\u0301",  # the accent on its own: NFC makes one letter of it
    "красный круг",
    "赤い円 と 青い星",
    "🙂🙃 👩‍👩‍👧 ½ ٣",
    "\u2028 \u00a0 \ufeff",
    "red " * 60,  # more than the length
]


@pytest.mark.parametrize("text", [*TEXTS, *FOREIGN_CAPTIONS])
def test_transformers_gives_the_same_ids(text: str, folder: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    wanted = theirs(text, padding="max_length", truncation=True, max_length=40)["input_ids"]
    assert Tokenizer.from_folder(folder).encode([text]).ids[0] == wanted


def test_transformers_gives_the_same_ids_for_every_caption(tmp_path: Path) -> None:
    write_vocabulary(shape_captions(), tmp_path, 40)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    captions = shape_captions()
    wanted = theirs(captions, padding="max_length", truncation=True, max_length=40)["input_ids"]
    found = Tokenizer.from_folder(tmp_path).encode(captions).ids
    measured("values differ", sum(a != b for a, b in zip(found, wanted, strict=True)), 0)
    assert found == wanted


def test_every_word_of_the_captions_is_one_token(folder: Path) -> None:
    """Of those that occur twice at least; foreign letters too, which are several bytes each."""
    tokenizer = Tokenizer.from_folder(folder)
    words = (
        ["café", "grünes", "東京", "北京"]
        if "foreign" in str(folder)
        else ["red", "green", "circle", "background", "stars", "grey"]
    )
    pieces = {word: len(tokenizer.pieces(word)[0]) for word in words}
    assert pieces == dict.fromkeys(words, 1)
    assert len(tokenizer.pieces("zebra")[0]) > 1, "a word that is in no caption"


def test_ids_are_whole_and_the_ends_are_last(folder: Path) -> None:
    """The configs of `new_model` say so, and a hole would be a row of the embedding that nothing trains."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_folder(folder)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert (vocabulary[START], vocabulary[END]) == (len(vocabulary) - 2, len(vocabulary) - 1)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (
        vocabulary[START],
        vocabulary[END],
        vocabulary[END],
    )
    assert (tokenizer.max_length, tokenizer.vocab_size) == (40, len(vocabulary))


def test_any_byte_can_be_written(folder: Path) -> None:
    """All 256, inside a word and at its end: no text becomes the unknown token, which is the end."""
    tokenizer = Tokenizer.from_folder(folder)
    letters = [chr(c) for c in (*range(0x21, 0x250), 0x416, 0x4E2D, 0x1F642, 0x10FFFF)]
    for letter in letters:
        ids = tokenizer.pieces(letter)[0] + tokenizer.pieces(f"x{letter}y")[0]
        assert tokenizer.end_id not in ids, f"{letter!r} is unknown"


def test_the_same_captions_always_give_the_same_files(tmp_path: Path) -> None:
    """Among so few captions many pairs of pieces are as frequent as others; the trainer's hash differs each time."""
    captions = shape_captions(60)
    for name in "abcdef":
        write_vocabulary(iter(captions), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert len({(tmp_path / name / file.name).read_bytes() for name in "abcdef"}) == 1, file.name


def test_a_text_encoder_of_that_size_is_what_the_vocabulary_needs(tmp_path: Path) -> None:
    size = write_vocabulary(shape_captions(), tmp_path)
    config = ModelConfig.from_json(CLIP | {"vocab_size": size}, UNET, VAE)
    assert Tokenizer.from_folder(tmp_path).vocab_size == config.text_encoder.vocab_size
