"""Progress of a long preparation: a live bar in a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def report(title: str, total_bytes: int | None, *, shown: bool) -> Iterator[Advance]:
    """Yield `advance(bytes)`, to be called as text is processed. `total_bytes` is None if it is not known in advance."""
    if not shown:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _live_bar(title, total_bytes) as advance:
            yield advance
    else:
        with _plain_lines(title, total_bytes) as advance:
            yield advance


def say(message: str, *, shown: bool) -> None:
    """Print one line."""
    if shown:
        print(message, file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
    """Print one line, unless it was printed before: the batches of a run are made again for each evaluation."""
    say(message, shown=True)


@contextlib.contextmanager
def _live_bar(title: str, total_bytes: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.table import Column

    # A path may be long, and have brackets that rich would parse as markup.
    name = TextColumn("{task.description}", markup=False, table_column=Column(max_width=32, no_wrap=True))
    columns = (name, BarColumn(16), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.update(task, advance=count)


@contextlib.contextmanager
def _plain_lines(title: str, total_bytes: int | None) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def line() -> str:
        of = f" of {total_bytes / 1e6:.1f}" if total_bytes else ""
        return f"{title}: {done / 1e6:.1f}{of} MB in {time.monotonic() - start:.1f} s"

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(line(), shown=True)

    yield advance
    say(line(), shown=True)
