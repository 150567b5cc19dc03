"""How many of the virtual devices a run takes."""

from __future__ import annotations

import contextlib

import jax
import pytest


@contextlib.contextmanager
def on_one_device():
    """As on a machine with one device: where a test is not about many, its programs compile in half of the time."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "device_count", lambda *_: 1)
        yield


def placed(values, described):
    """Arrays with the layout of a described tree: cheaper than a program that makes them there."""
    leaves, structure = jax.tree.flatten(described)
    values = jax.tree.leaves(jax.device_get(values))
    arrays = [jax.device_put(value, leaf.sharding) for value, leaf in zip(values, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)
