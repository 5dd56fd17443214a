"""Prompts as chunks, what the text encoder takes at once: start, 75 words and pieces of words, end, padding.

A style is how a prompt becomes chunks. "plain" is diffusers': no syntax, one chunk, the rest cut off. "a1111" is the web UI's:
`fastsd.prompt_syntax`, and as many chunks as it takes.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from fastsd.prompt_syntax import Phrase, parse
from fastsd.tokenizer import Tokenizer
from fastsd.wording import quoted

MAX_CHUNKS = 32
"""The most chunks of a prompt: 2,400 words and pieces of words."""
BACKTRACK = 20
"""How many tokens a chunk may end early so that it ends in a comma, as the web UI does by default."""


class Chunk(NamedTuple):
    ids: tuple[int, ...]
    """max_length of them."""
    weights: tuple[float, ...] | None = None
    """As many; None where all are 1."""


class Token(NamedTuple):
    id: int
    weight: float
    start: int
    """The character of the prompt's phrases, side by side, that it begins with."""


def plain_chunks(tokenizer: Tokenizer, prompt: str) -> tuple[list[Chunk], str]:
    """A prompt's one chunk, and a warning that says what did not fit it, or ""."""
    tokens = tokenizer.encode([prompt])
    return [Chunk(tuple(tokens.ids[0]))], _cut(prompt, f"{tokenizer.max_length} tokens", tokens.dropped[0])


def a1111_chunks(tokenizer: Tokenizer, prompt: str) -> tuple[list[Chunk], str]:
    """A prompt's chunks, one at least, and a warning that says what did not fit MAX_CHUNKS, or ""."""
    sections = parse(prompt)
    room = tokenizer.max_length - 2
    found = split(_tokens(tokenizer, sections), room, tokenizer.comma_id)
    chunks = [_chunk(tokenizer, tokens) for tokens in islice(found, MAX_CHUNKS)]
    dropped = ""
    if lost := next(filter(None, found), None):
        text = "".join(phrase.text for section in sections for phrase in section)
        dropped = text[lost[0].start :].strip()
    return chunks, _cut(prompt, f"{MAX_CHUNKS} chunks of {room} tokens", dropped)


STYLES: dict[str, Callable[[Tokenizer, str], tuple[list[Chunk], str]]] = {"plain": plain_chunks, "a1111": a1111_chunks}


def split(sections: Iterable[Iterable[Token]], room: int, comma: int | None) -> Iterator[list[Token]]:
    """Sections → chunks of at most `room` tokens, each section beginning a new one.

    A chunk that is full ends after its last comma where that is among its last BACKTRACK tokens, so that what stands between
    commas stays together; unless a comma is what comes next. One chunk at least; an empty section leaves an empty one, but not
    the last.
    """
    chunk: list[Token] = []
    empty = True
    for index, section in enumerate(sections):
        if index:
            yield chunk
            chunk, empty = [], False
        for token in section:
            if len(chunk) == room:
                end = room if token.id == comma else _end(chunk, comma)
                yield chunk[:end]
                chunk, empty = chunk[end:], False
            chunk.append(token)
    if chunk or empty:
        yield chunk


def _end(chunk: list[Token], comma: int | None) -> int:
    for end in range(len(chunk), max(0, len(chunk) - BACKTRACK), -1):
        if chunk[end - 1].id == comma:
            return end
    return len(chunk)


def _tokens(tokenizer: Tokenizer, sections: Iterable[Iterable[Phrase]]) -> Iterator[Iterator[Token]]:
    """Each phrase is tokenized by itself: a word does not reach over a bracket."""
    start = 0

    def of(section: Iterable[Phrase]) -> Iterator[Token]:
        nonlocal start
        for text, weight in section:
            for index, offset in zip(*tokenizer.pieces(text), strict=True):
                yield Token(index, weight, start + offset)
            start += len(text)

    return map(of, sections)


def _chunk(tokenizer: Tokenizer, tokens: list[Token]) -> Chunk:
    ids = tokenizer.framed([token.id for token in tokens])
    if all(token.weight == 1.0 for token in tokens):
        return Chunk(tuple(ids))
    weights = [1.0, *(token.weight for token in tokens)]
    return Chunk(tuple(ids), tuple(weights + [1.0] * (len(ids) - len(weights))))


def _cut(prompt: str, limit: str, dropped: str) -> str:
    return (
        f"a prompt ({quoted(prompt)}) is longer than {limit}, so this was left out: {quoted(dropped)}"
        if dropped
        else ""
    )
