"""The kinds of mutants, and what becomes of one: refused, accepted, or a finding."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any, Literal

from tests.mutations import arguments, configs, data_files, stored_runs, vocabularies, weights
from tests.mutations.guard import Guard, Late, tree
from tests.mutations.mutant import Make, Mutant, Setting
from transformer.errors import UserError

KINDS: dict[str, Make] = {
    "config": configs.config,
    "data": data_files.data,
    "tokenizer": vocabularies.tokenizer,
    "run": stored_runs.run,
    "weights": weights.weights,
    "arguments": arguments.arguments,
}
_ROOT = Path(__file__).parents[2]
_UNCLEAR = re.compile(
    r"NoneType|has no attribute|object is not|unsupported operand|Traceback|not subscriptable|positional argument|PanicException|"
    r"KeyError|TypeError|AttributeError|IndexError|AssertionError|unhashable|index out of range|unexpected keyword|"
    r"invalid literal|'<' not supported|expected str, bytes|must be real number|cannot unpack|not enough values|string indices"
)
"""Words of Python's own errors, which tell a user nothing."""
_LONGEST = 6_000
"""Characters of the longest message that a person would read."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        message: what the user was told.
        where: of a finding: the place in the code, or "" for one that has none.
    """

    kind: str
    seed: int
    about: str
    what: Literal["refused", "accepted", "finding"]
    message: str = ""
    where: str = ""


def mutant(kind: str, seed: int, setting: Setting) -> Mutant:
    """The mutant of a kind and a seed: its files are written into the setting's place."""
    return KINDS[kind](Random(f"{kind} {seed}"), setting)


class Runner:
    """Runs mutants in this process, which nothing else should use.

    Args:
        work: a folder with the material; mutants have a folder of their own in it while they run.
        seconds: the time that a call may take.
    """

    def __init__(self, work: Path, seconds: float) -> None:
        self._work, self._seconds = work, seconds
        self._guard = Guard((work / "cache", work / "jax"))
        self._before = tree(work / "material")

    def run(self, kind: str, seed: int) -> Outcome:
        """Make a mutant, call it, and judge."""
        own = Path(tempfile.mkdtemp(prefix="mutant-", dir=self._work))
        place = own / "place"
        for folder in (place, own / "tmp"):
            folder.mkdir()
        (own / "outside.txt").write_text("not to be touched")
        here, before = Path.cwd(), tempfile.tempdir
        try:
            os.chdir(place)
            made = mutant(kind, seed, Setting(place, self._work / "material"))
            tempfile.tempdir = str(own / "tmp")
            return self._judged(kind, seed, made, own)
        finally:
            tempfile.tempdir = before
            os.chdir(here)
            shutil.rmtree(own, ignore_errors=True)

    def _judged(self, kind: str, seed: int, made: Mutant, own: Path) -> Outcome:
        def outcome(what: Any, message: str = "", where: str = "") -> Outcome:
            return Outcome(kind, seed, made.about, what, message, where)

        said, status, error = self._called(made, own, Random(seed))
        if isinstance(error, Late):
            return outcome("finding", f"not done after {self._seconds:g} s", _place_of(error))
        if error is not None:
            return outcome("finding", f"{type(error).__name__}: {str(error)[:500]}", _place_of(error))
        outside = [*self._guard.outside, *self._strangers(own)]
        if outside:
            return outcome("finding", f"written outside: {'; '.join(outside[:3])}", "outside")
        if status != 2:
            return outcome("accepted", said)
        if (fault := _unclear(said)) is not None:
            return outcome("finding", f"{fault}: {said[:500]}", f"message: {fault}")
        return outcome("refused", said)

    def _called(self, made: Mutant, own: Path, random: Random) -> tuple[str, Any, BaseException | None]:
        """What was said last, the exit status, and an error that no user should see."""
        # A terminal's streams cannot hold every text.
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        said = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(arguments.stdin(random)), "utf-8")
        status: Any = 0
        error: BaseException | None = None
        try:
            with (
                self._guard.watching(own, self._seconds),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(said),
            ):
                status = made.call()
                out.flush()
        except UserError as mistake:
            from train.commands.cli import message_of

            said.write(f"manyheads: {message_of(mistake)}\n")
            status = 2
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            raise
        except BaseException as other:
            error = other
        finally:
            sys.stdin = given
        said.flush()
        text = said.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
        return text[text.rfind("manyheads: ") :] if "manyheads: " in text else text[-_LONGEST:], status, error

    def _strangers(self, own: Path) -> list[str]:
        """Files that are not where they were before, or not as they were."""
        now = tree(self._work / "material")
        changed = [path for path in now.keys() | self._before.keys() if now.get(path) != self._before.get(path)]
        known = {"place", "tmp", "outside.txt"}
        changed += [str(path) for path in own.iterdir() if path.name not in known]
        self._before = now
        return changed


def _unclear(message: str) -> str | None:
    """What is wrong with a message for a user; None for a good one."""
    if not message.strip():
        return "no message"
    if len(message) > _LONGEST:
        return "a message of thousands of characters"
    if found := _UNCLEAR.search(message):
        return f"a message with {found[0]!r}"
    if any(not letter.isprintable() and letter != "\n" for letter in message):
        return "a message with control characters"
    return None


def _place_of(error: BaseException) -> str:
    """The innermost lines of ours in a traceback, and the type of the error."""
    frames = [
        f"{Path(frame.filename).relative_to(_ROOT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(f"{_ROOT}/")
        and "/.venv/" not in frame.filename
        and "/tests/" not in frame.filename
    ]
    return f"{type(error).__name__} at {' > '.join(frames[-3:]) or 'no line of ours'}"
