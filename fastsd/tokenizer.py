"""CLIP's byte-level BPE: prompts to rows of token ids, through the `tokenizers` package.

The standard is transformers' CLIPTokenizer, version 5: NFC, runs of white space to one blank, lower case, no ftfy.
Algorithm: Sennrich et al. 2016 (arXiv 1508.07909) over bytes, as in Radford et al. 2021.

A folder says which strings are special in one of three ways, depending on what wrote it, and all three are read here:
`special_tokens_map.json` beside `tokenizer_config.json` (the SD 1 and SD 2 releases), `added_tokens_decoder` inside
`tokenizer_config.json` (transformers 4.34 and later), `added_tokens` inside `tokenizer.json` (transformers 5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fastsd.checkpoints.file_bytes import read_capped
from fastsd.checkpoints.strict_json import read_json
from fastsd.errors import CheckpointError, ParameterError, PromptError
from fastsd.wording import quoted, shown

MAX_PROMPT_BYTES = 1_000_000
"""The largest prompt encoded, in bytes of UTF-8."""

MAX_WORD = 200
"""The longest placeholder that can be added, in characters."""

_MAX_FILE_BYTES = 16 << 20  # CLIP's own vocabulary takes 1 MB, its tokenizer.json up to 4
_CLIP_MAX_LENGTH = 77

# CLIP's words, which BPE does not cross. The byte-level step after it splits once more, by GPT-2's pattern.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# In the order transformers adds them: of two entries with the same text the later one decides how it is matched.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_NAMES: dict[str, str | AddedToken] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


@dataclass(frozen=True)
class Tokens:
    """Encoded prompts, ready for the text encoder."""

    ids: list[list[int]]
    """One row a prompt, each `max_length` long: start, words, end, padding."""
    dropped: list[str]
    """Per prompt, the text past the limit that the ids do not hold; "" where all of it fitted."""


@dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer. Immutable, so any number of threads may share one."""

    max_length: int
    start_id: int
    end_id: int
    pad_id: int
    vocab_size: int
    """One more than the largest id: the rows that the text encoder's embedding must at least have."""
    _bpe: tokenizers.Tokenizer = field(repr=False, compare=False)
    placeholders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The words of textual inversions, with the ids that each is encoded as."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read a diffusers `tokenizer/` folder. CheckpointError, naming the file, where one is missing or damaged."""
        folder = Path(folder)
        config = _read_optional(folder / "tokenizer_config.json")
        _check_sides(config, folder / "tokenizer_config.json")
        fast = _read_optional(folder / "tokenizer.json")  # transformers prefers it where a folder has both
        vocab_file, merges_file = _vocabulary_files(folder, fast)
        vocab, merges = _vocabulary(vocab_file, merges_file, fast)
        named, added = _special_tokens(folder, config, fast)
        for key in ("bos_token", "eos_token", "unk_token"):
            if str(named[key]) not in vocab:
                raise CheckpointError(
                    f"{vocab_file}: does not hold {key} {quoted(str(named[key]))}, so this is not CLIP's"
                )
        bpe = _build(vocab, merges, str(named["unk_token"]), merges_file)
        bpe.add_tokens(added)
        return cls(
            max_length=_max_length(config, folder / "tokenizer_config.json"),
            start_id=_token_id(bpe, named, "bos_token", vocab_file),
            end_id=_token_id(bpe, named, "eos_token", vocab_file),
            pad_id=_token_id(bpe, named, "pad_token", vocab_file),
            vocab_size=max(bpe.get_vocab(with_added_tokens=True).values()) + 1,
            _bpe=bpe,
        )

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Encode prompts as diffusers does: cut to `max_length`, the end token kept, padded on the right.

        What fell off is given from the first character of the first lost token, in the prompt's own spelling.
        PromptError for anything but strings, for lone surrogates, and beyond MAX_PROMPT_BYTES.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise PromptError(f"prompts must be a list of strings, not {type(prompts).__name__}")
        rows = [self._encode(prompt, index) for index, prompt in enumerate(prompts)]
        return Tokens(ids=[ids for ids, _ in rows], dropped=[dropped for _, dropped in rows])

    def _encode(self, prompt: str, index: int) -> tuple[list[int], str]:
        check_prompt(f"prompts[{index}]", prompt)
        words, starts = self.pieces(prompt)
        room = self.max_length - 2
        dropped = prompt[starts[room] :].strip() if len(words) > room else ""
        return self.framed(words[:room]), dropped

    def pieces(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text of any length, without start and end, and the character at which each begins."""
        encoding = self._bpe.encode(text, add_special_tokens=False)
        wide = {pieces[0]: pieces for pieces in self.placeholders.values()}
        ids: list[int] = []
        starts: list[int] = []
        for index, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            pieces = wide.get(index, (index,))
            ids += pieces
            starts += [start] * len(pieces)
        return ids, starts

    def with_placeholders(self, counts: Mapping[str, int]) -> "Tokenizer":
        """A tokenizer that also knows these words, each encoded as so many tokens of its own (textual inversion).

        A word is matched wherever it stands in a text, in any case of its letters, and is encoded as `word`, `word_1`, `word_2`,
        …, which are matched alone too; ids go on after the largest there is. As in diffusers.
        ParameterError for a word that is empty, too long, or has a meaning already.
        """
        bpe = tokenizers.Tokenizer.from_str(self._bpe.to_str())
        placeholders = dict(self.placeholders)
        for word, count in counts.items():
            check_prompt("token", word)
            pieces = [word, *(f"{word}_{index}" for index in range(1, count))]
            for piece in pieces:
                _check_new(bpe, piece)
                bpe.add_tokens([AddedToken(piece, normalized=True, special=False)])
            vocabulary = bpe.get_vocab(with_added_tokens=True)
            placeholders[word] = tuple(vocabulary[piece] for piece in pieces)
        rows = [index + 1 for pieces in placeholders.values() for index in pieces]
        return replace(self, vocab_size=max([self.vocab_size, *rows]), placeholders=placeholders, _bpe=bpe)

    def framed(self, words: list[int]) -> list[int]:
        """At most max_length − 2 ids as a row of max_length: start, words, end, padding."""
        # Put on here: the library's own way of doing it is state of the shared object.
        ids = [self.start_id, *words, self.end_id]
        return ids + [self.pad_id] * (self.max_length - len(ids))

    @property
    def comma_id(self) -> int | None:
        """The comma as a word; None where the vocabulary has none."""
        index = self._bpe.token_to_id(",</w>")
        return None if index is None else int(index)


def check_prompt(name: str, prompt: object) -> str:
    """The prompt, if it can be encoded; else PromptError. name: what the message calls it, e.g. `negative_prompt`."""
    if not isinstance(prompt, str):
        raise PromptError(f"{name}: must be a string, not {type(prompt).__name__}")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name}: holds a lone surrogate (U+{ord(prompt[error.start]):04X}) at character {error.start}; "
            "decode the text as UTF-8"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise PromptError(f"{name}: has {size:,} bytes; at most {MAX_PROMPT_BYTES:,} are encoded, so shorten it")
    return prompt


def _check_new(bpe: tokenizers.Tokenizer, word: str) -> None:
    """ParameterError unless a placeholder is a word that has no meaning yet."""
    matched = bpe.normalizer.normalize_str(word)
    if not matched.strip() or len(word) > MAX_WORD:
        raise ParameterError(f"token: {quoted(word)} must have 1 to {MAX_WORD} characters, and not only blanks")
    added = {bpe.normalizer.normalize_str(str(token)) for token in bpe.get_added_tokens_decoder().values()}
    if bpe.token_to_id(word) is not None or matched in added:
        raise ParameterError(
            f"token: {quoted(word)} is in the vocabulary already; give the embedding another with token="
        )


def _build(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str, source: Path) -> tokenizers.Tokenizer:
    try:
        model = BPE(
            vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:  # the library raises a bare Exception for merges that the vocabulary does not hold
        raise CheckpointError(
            f"{source}: the merges do not fit the vocabulary ({shown(str(error))}); fetch the folder again"
        ) from error
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return bpe


def _token_id(bpe: tokenizers.Tokenizer, named: Mapping[str, str | AddedToken], key: str, source: Path) -> int:
    index = bpe.token_to_id(str(named[key]))
    if index is None:
        raise CheckpointError(f"{source}: there is no {key} {quoted(str(named[key]))}; fetch the folder again")
    return int(index)


def _special_tokens(
    folder: Path, config: Mapping[str, Any], fast: Mapping[str, Any]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """The named tokens (bos_token, …) and everything to be matched as one token, in the order in which to add it."""
    # A name that is null in the file means the same as one left out: CLIP's default.
    given = {key: config[key] for key in _NAMED_TOKENS if config.get(key) is not None}
    source = folder / "tokenizer_config.json"
    extra = _extra_tokens(config, source)
    if "added_tokens_decoder" in config:
        listed = _numbered_tokens(config["added_tokens_decoder"], source)
    else:
        legacy_map = _read_optional(folder / "special_tokens_map.json")
        given |= {key: legacy_map[key] for key in _NAMED_TOKENS if legacy_map.get(key) is not None}
        extra = _extra_tokens(legacy_map, folder / "special_tokens_map.json") or extra
        names = {_text(token) for token in given.values()}
        listed = _legacy_added_tokens(folder / "added_tokens.json", names) | _listed_tokens(
            fast, folder / "tokenizer.json"
        )

    by_text = {str(token): token for token in listed.values()}
    named = _DEFAULT_NAMES | {key: _added_token(token, f"{source}: {key}") for key, token in given.items()}
    named = {key: by_text.get(str(token), token) for key, token in named.items()}

    added: list[str | AddedToken] = [listed[index] for index in sorted(listed)]
    for token in [*(named[key] for key in _NAMED_TOKENS if key in named), *extra]:
        # A plain string and an entry with flags are two entries even when their text is the same, as in transformers:
        # "pad_token": "<|endoftext|>" overrides how the "eos_token" entry of that text is matched.
        if str(token) not in by_text and token not in added:
            added.append(token)
    return named, [AddedToken(token, special=True) if isinstance(token, str) else token for token in added]


def _extra_tokens(config: Mapping[str, Any], source: Path) -> list[str | AddedToken]:
    """Special tokens without a role, under either name that transformers has had for them: a list, or named ones."""
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key)
        if not isinstance(value, list | dict | None):
            raise CheckpointError(
                f"{source}: {key} must be a list of tokens, not {quoted(value)}; fetch the file again"
            )
        if value:
            tokens = value.values() if isinstance(value, dict) else value
            return [_added_token(token, f"{source}: {key}") for token in tokens if token is not None]
    return []


def _added_token(value: Any, where: str) -> str | AddedToken:
    if isinstance(value, str):
        return value
    try:
        flags = {key: bool(value.get(key, default)) for key, default in _TOKEN_FLAGS.items()}
        return AddedToken(value["content"], **flags)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} must be a string or an object with `content`; fetch the file again") from error


_TOKEN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}


def _numbered_tokens(entries: Any, source: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: {"49407": {"content": …}, …}."""
    try:
        return {int(index): AddedToken(**_without_type(token)) for index, token in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: added_tokens_decoder is damaged ({shown(str(error))}); fetch the file again"
        ) from error


def _listed_tokens(fast: Mapping[str, Any], source: Path) -> dict[int, AddedToken]:
    """`added_tokens` of tokenizer.json: [{"id": 49407, "content": …}, …]."""
    try:
        entries = [dict(token) for token in fast.get("added_tokens") or ()]
        return {int(token.pop("id")): AddedToken(**_without_type(token)) for token in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: added_tokens is damaged ({shown(str(error))}); fetch the file again"
        ) from error


def _legacy_added_tokens(source: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json, {"<cat>": 49408}: words that a textual inversion added."""
    entries = _read_optional(source)
    if not all(_is_id(index) for index in entries.values()):
        raise CheckpointError(f"{source}: every value must be a token id; fetch the file again")
    return {
        index: AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in entries.items()
    }


def _without_type(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "__type"}


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _vocabulary_files(folder: Path, fast: Mapping[str, Any]) -> tuple[Path, Path]:
    return (folder / "tokenizer.json",) * 2 if fast else (folder / "vocab.json", folder / "merges.txt")


def _vocabulary(
    vocab_file: Path, merges_file: Path, fast: Mapping[str, Any]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """token → id, and the merges in order of rank."""
    if fast:
        model = fast.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise CheckpointError(
                f"{vocab_file}: `model` must be BPE, as CLIP's is; this folder is of another tokenizer"
            )
        return _checked_vocab(model.get("vocab"), vocab_file), _checked_merges(model.get("merges"), merges_file)
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; a tokenizer needs vocab.json and merges.txt, or tokenizer.json")
    vocab = _checked_vocab(read_json(vocab_file, str(vocab_file), _MAX_FILE_BYTES), vocab_file)
    # Not splitlines(): it also splits where byte-level BPE has ordinary symbols.
    lines = [line.removesuffix("\r") for line in _read_text(merges_file).removesuffix("\n").split("\n")]
    return vocab, _checked_merges([line for line in lines if not line.startswith("#version")], merges_file)


def _checked_vocab(vocab: Any, source: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab or not all(_is_id(index) for index in vocab.values()):
        raise CheckpointError(f"{source}: the vocabulary must map tokens to ids of 0 and above; fetch the file again")
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{source}: two tokens share an id; fetch the file again")
    return vocab


def _checked_merges(merges: Any, source: Path) -> list[tuple[str, str]]:
    """Merges come as "a b" or, in newer tokenizer.json files, as ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: no list of merges; fetch the file again")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    for line, pair in enumerate(pairs, start=1):
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part for part in pair)
        ):
            raise CheckpointError(
                f"{source}: merge {line} is not two symbols with a blank between; fetch the file again"
            )
    return [(left, right) for left, right in pairs]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _max_length(config: Mapping[str, Any], source: Path) -> int:
    length = config.get("model_max_length")
    if length is None or (isinstance(length, int | float) and length > 1e9):  # transformers' "unlimited" is 1e30
        return _CLIP_MAX_LENGTH
    if not _is_id(length) or not 3 <= length <= 4096:
        raise CheckpointError(
            f"{source}: model_max_length is {quoted(length)}; it must be a whole number from 3 to 4096"
        )
    return int(length)


def _check_sides(config: Mapping[str, Any], source: Path) -> None:
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "right") != "right":
            raise CheckpointError(
                f"{source}: {key} is {quoted(config[key])}; fastsd pads and cuts on the right, as CLIP was trained"
            )


def _read_optional(path: Path) -> dict[str, Any]:
    """A file's JSON object; {} if there is no such file."""
    return read_json(path, str(path), _MAX_FILE_BYTES) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return read_capped(path, str(path), _MAX_FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); fetch the file again"
        ) from error
