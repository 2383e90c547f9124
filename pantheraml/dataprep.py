"""Preparation of raw data, at the path that Unsloth scripts import it from."""

from __future__ import annotations

from .data.qa_generation import SyntheticDataKit
from .data.raw_text import RawTextDataLoader
from .data.text_preprocessing import TextPreprocessor

__all__ = ["RawTextDataLoader", "SyntheticDataKit", "TextPreprocessor"]
