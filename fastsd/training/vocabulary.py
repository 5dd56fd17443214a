"""A small CLIP vocabulary from the captions of a data set: byte-level BPE in which every word of theirs is one token.

Sennrich et al. 2016, arXiv 1508.07909. Any other text is still encoded, in smaller pieces.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def write_vocabulary(captions: Iterable[str], folder: Path, max_length: int = 77) -> int:
    """Write the files of transformers' CLIPTokenizer to `folder`; returns the number of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    words = BpeTrainer(
        vocab_size=20_000,
        min_frequency=2,
        special_tokens=tokens,  # gives them fixed ids, by which ties are decided; the trainer's own follow a random hash
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, words)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens += [left + right for left, right in merges if left + right not in tokens] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {name: _token(text) for name, text in (("bos_token", START), ("eos_token", END), ("unk_token", END))}
    special_map = special | {"pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map, indent=1) + "\n", encoding="utf-8")
    config = special_map | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return len(tokens)


def _token(text: str) -> dict[str, object]:
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
