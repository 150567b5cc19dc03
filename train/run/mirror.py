"""Keeps a run's folder at a remote address: fetched before the run, copied there during it and at its end."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import jax

from train.config import RunConfig
from train.files import locked
from train.remote import FETCH_LOCK, MirroredFolder, is_remote
from transformer.errors import UserError

_SECONDS = 20.0
"""Between two copies."""


@contextlib.contextmanager
def mirrored(config: RunConfig) -> Iterator[None]:
    """Inside, the run's local folder is what its remote one was, and changes are copied there. For a local run, nothing.

    What cannot be copied is tried again; the run does not end for it, but an error at the very end is raised.

    Raises:
        UserError: the address cannot be reached, or there are several processes.
    """
    if config.run_dir is None or not is_remote(config.run_dir):
        yield
        return
    if jax.process_count() > 1:
        raise UserError(
            f"run_dir: got {config.run_dir!r}; with several processes, name a folder that all of them share, such as one on NFS"
        )
    folder = MirroredFolder(config.run_dir)
    with locked(
        folder.local / FETCH_LOCK, waiting=lambda: print(f"waiting for a command that fetches {folder.address}")
    ):
        fetched = folder.fetch()
    if fetched:
        print(f"{config.name}: fetched from {folder.address} to {folder.local}")
    folder.claim()
    over, said = threading.Event(), [""]

    def copy() -> None:
        while not over.wait(_SECONDS):
            try:
                folder.push()
                said[0] = ""
            except Exception as error:  # a thread that ends would copy nothing more
                if str(error) != said[0]:
                    said[0] = str(error)
                    print(f"{error}; training continues, and it is tried again", file=sys.stderr)

    thread = threading.Thread(target=copy, name="mirror", daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        over.set()
        thread.join()
        if config.directory.exists():
            _copy_at_the_end(folder, quiet=failed)


def _copy_at_the_end(folder: MirroredFolder, *, quiet: bool) -> None:
    try:
        folder.push()
        print(f"copied to {folder.address}")
    except UserError as error:
        if quiet:  # another error is on its way
            print(f"{error}; the run is in {folder.local}", file=sys.stderr)
            return
        raise UserError(f"{error}; the run is in {folder.local}: run the same command again to copy it") from None
