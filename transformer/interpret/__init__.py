"""Inspecting a model: attention weights captured, measured, drawn, and shown on a page.

In a notebook, `attention_maps(model, tokens, labels)` as the last line of a cell shows the page.
"""

from transformer.interpret.capture import AttentionMaps, attention_maps

__all__ = ["AttentionMaps", "attention_maps"]
