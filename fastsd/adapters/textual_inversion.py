"""Textual inversion: new words for a prompt, as vectors that were learned in place of a token's embedding.

Gal et al. 2022, arXiv 2208.01618. A word of n vectors is encoded as n tokens.
"""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsd.adapters.swap_lock import SwapLock
from fastsd.checkpoints.lora import read_embedding
from fastsd.device import computing
from fastsd.errors import CheckpointError, ParameterError
from fastsd.models.clip import CLIPText
from fastsd.tokenizer import Tokenizer
from fastsd.wording import listed, quoted


class TextModel(Protocol):
    """What turns a prompt into a context."""

    tokenizer: Tokenizer
    text_encoder: CLIPText


class TextualInversions:
    """The words that were added to a model. Methods bear diffusers' names."""

    def __init__(self, model: TextModel, lock: SwapLock) -> None:
        """lock: what those who use the tokenizer and the text encoder hold as well, by `SwapLock.using`."""
        self._model = weakref.proxy(model)  # which holds this: else its memory would wait for the garbage collector
        self._lock = lock
        self._vectors: dict[str, Tensor] = {}
        self._hashes: dict[str, str] = {}
        """A word's file: its SHA-256."""
        self._originals: tuple[Tokenizer, Tensor] | None = None

    def load_textual_inversion(
        self,
        path: str | Path,
        token: str | None = None,
        weight_name: str | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> str:
        """Teach the model a word, from a file of A1111's kind or diffusers'. → the word to write in prompts.

        path: the file, or a folder or a repository of the Hugging Face Hub (`owner/name`) with `weight_name` in it. token: the
        word, instead of the file's own (A1111's safetensors have none: the file's name without its suffix). allow_pickle: also
        read `.pt` and `.bin` (never code). hub: revision, cache_dir, local_files_only, as huggingface_hub takes them.
        Raises CheckpointError (HubError for the Hub) for the file and for vectors of another width than the model's, and
        ParameterError for a word that is in the vocabulary already; nothing has changed then.
        """
        if token is not None and not isinstance(token, str):
            raise ParameterError(f"token: must be a string, not {quoted(token)}")
        label, word, vectors, sha256 = read_embedding(path, weight_name, allow_pickle, **hub)
        word = word if token is None else token
        weight = self._model.text_encoder.embeddings.token_embedding.weight
        room = self._model.tokenizer.max_length - 2
        if vectors.shape[1] != weight.shape[1]:
            raise CheckpointError(
                f"{label}: vectors of width {vectors.shape[1]}, but the model's have {weight.shape[1]}: made for another model"
            )
        if len(vectors) > room:
            raise CheckpointError(f"{label}: {len(vectors)} vectors; a prompt has room for {room}")
        if not vectors.to(weight.dtype).isfinite().all():
            raise CheckpointError(f"{label}: values beyond the range of {weight.dtype}; use bfloat16 or float32")
        with self._lock.swapping():
            if word in self._vectors:
                raise ParameterError(f"token: {quoted(word)} is loaded already; unload it first, or choose another")
            self._hashes[word] = sha256
            self._set(self._vectors | {word: vectors})
        return word

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget words, or all of them: tokenizer and embedding are then the first ones again. Later words move up.

        ParameterError for a word that is not loaded.
        """
        words = list(self._vectors) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        with self._lock.swapping():
            for word in words:
                if word not in self._vectors:
                    loaded = listed(self._vectors) or "none"
                    raise ParameterError(f"tokens: {quoted(word)} is not loaded; loaded: {loaded}")
            self._set({word: vectors for word, vectors in self._vectors.items() if word not in words})

    def hashes(self) -> dict[str, str]:
        """The words that are loaded → the SHA-256 of their files, in hex."""
        return {word: self._hashes[word] for word in self._vectors}

    def _set(self, vectors: dict[str, Tensor]) -> None:
        """Have exactly these words, beside the original vocabulary. Within `swapping`."""
        embedding = self._model.text_encoder.embeddings.token_embedding
        originals = self._originals or (self._model.tokenizer, embedding.weight)
        tokenizer, weight = originals
        if vectors:
            tokenizer = tokenizer.with_placeholders({word: len(rows) for word, rows in vectors.items()})
            with torch.inference_mode(False), computing(weight.device, "the words of textual inversion"):
                weight = _grown(weight, tokenizer, vectors)
        self._originals = originals if vectors else None
        embedding.weight = weight
        embedding.num_embeddings = len(weight)
        self._model.tokenizer = tokenizer
        self._vectors = vectors


def _grown(weight: Tensor, tokenizer: Tokenizer, vectors: Mapping[str, Tensor]) -> nn.Parameter:
    """The embedding with a row for every token; those of the words hold their vectors."""
    rows = max(len(weight), tokenizer.vocab_size)
    grown = weight.new_zeros(rows, weight.shape[1])
    grown[: len(weight)] = weight
    for word, values in vectors.items():
        grown[list(tokenizer.placeholders[word])] = values.to(grown)
    return nn.Parameter(grown, requires_grad=False)
