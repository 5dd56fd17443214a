"""Adapters: small files that change a loaded model, and take their change back: LoRA and its kin, textual inversion."""

from fastsd.adapters.lora import LoraAdapters, UsedLora
from fastsd.adapters.swap_lock import SwapLock
from fastsd.adapters.textual_inversion import TextualInversions

__all__ = ["LoraAdapters", "SwapLock", "TextualInversions", "UsedLora"]
