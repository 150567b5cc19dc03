"""Runs that are asked to stop while they go on."""

from __future__ import annotations

import contextlib

import pytest

from train.run import loop


@contextlib.contextmanager
def asked_to_stop(*, looks):
    """A run inside is asked to stop once it has looked so many times whether it is; each step but the last looks once."""

    class Asked(loop.GracefulStop):
        looked = 0
        requested = property(lambda self: self.look() > looks, lambda self, value: None)

        def look(self):
            self.looked += 1
            return self.looked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "GracefulStop", Asked)
        yield
