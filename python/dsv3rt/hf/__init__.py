"""Hugging Face checkpoints of DeepSeek-V3: read them, write them, convert them between BF16 and FP8."""

from dsv3rt.hf.conversion import convert
from dsv3rt.hf.loading import load, weights
from dsv3rt.hf.saving import save

__all__ = ["convert", "load", "save", "weights"]
