"""`manyheads chat`: a dialogue with the model of a run."""

from __future__ import annotations

import datetime
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.data.sources.dialogues import ASSISTANT, USER
from train.data.sources.records import MARKED, Message
from train.data.tokenization.chat import Chat
from train.data.tokenization.stream import StreamDecoder
from train.data.tokenization.template_limits import Unusable
from train.inference.generate import DEFAULT_TOKENS, STREAM_CHUNK, USUAL_SAMPLING, sampling_of
from train.parallel.mesh import use_mesh
from train.run.run_files import LoadedRun, load_run
from transformer.errors import UserError, check_text
from transformer.generation.ends import before_end
from transformer.generation.generate import Generator
from transformer.generation.inputs import check_count, check_seed
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

RESET, QUIT = "/reset", "/quit"


def chat(run: Path, step: str, system: str, max_tokens: int | None, how: Mapping[str, Any], seed: int) -> None:
    """Answer each line of standard input until its end, or `/quit`; `/reset` begins anew.

    Args:
        system: what the dialogue begins with, as the system's message; empty: nothing.
        max_tokens: of an answer; by default an import's own, or 256, or what the context leaves.
        how: fields of `Sampling`; the others are an import's own.

    Raises:
        UserError: no such run, a model that is not a language model, or a question that does not fit.
    """
    check_text("--system", system)
    check_seed(seed)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    loaded = load_run(run, step)
    if not isinstance(loaded.config.model, GPTConfig):
        raise UserError(
            f"{run}: cannot chat: family {loaded.config.model.family!r} is not a language model; use predict or embed"
        )
    dialogue = Dialogue(loaded, loaded.config.model, system=system, max_tokens=max_tokens, how=how, seed=seed)
    if dialogue.chat.is_built_in and loaded.config.objective.label_kind not in MARKED:
        _say("this vocabulary has no chat template: the dialogue is written in the built-in one (ChatML)")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _say(f"{RESET} begins anew, {QUIT} or the end of the input ends it")
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        for line in _lines(is_terminal):
            question = line.strip()
            if question == QUIT:
                break
            if question == RESET:
                dialogue.reset()
            elif question:
                try:
                    for text in dialogue.answers(question):
                        print(text, end="", flush=True)
                    print(flush=True)
                except UserError as error:
                    # At a terminal the next message may be a shorter one.
                    if not is_terminal:
                        raise
                    _say(str(error))


class Dialogue:
    """What was said so far, and the model that answers."""

    def __init__(
        self,
        loaded: LoadedRun,
        model: GPTConfig,
        *,
        system: str,
        max_tokens: int | None,
        how: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.chat = Chat(loaded.tokenizer, datetime.datetime.now())
        self._params, self._tokenizer, self._model = loaded.params, loaded.tokenizer, model
        self._sampling: Sampling = sampling_of(loaded.tokenizer, how, USUAL_SAMPLING)
        self._generator = Generator(model, end_of_text=self.chat.ends, num_tokens=loaded.tokenizer.vocab_size)
        wanted = max_tokens or loaded.tokenizer.conventions.max_new_tokens or DEFAULT_TOKENS
        self._most = wanted
        # An answer that nobody asked a length for leaves most of the context to what was said.
        self._room = wanted if max_tokens is not None else min(wanted, max(1, model.max_length // 4))
        self._seed = seed
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    def reset(self) -> None:
        """Forget all turns, and not the system's message."""
        self._turns = []

    def answers(self, question: str) -> Iterator[str]:
        """The answer to the user's next message, in pieces of text; both become part of the dialogue.

        Raises:
            UserError: the message is longer than the context, or the chat template refuses the dialogue.
        """
        self._turns.append({"role": USER, "content": question})
        try:
            check_text("standard input", question)
            prompt = self._prompt()
        except UserError:
            self._turns.pop()
            raise
        decoder, said = StreamDecoder(self._tokenizer, prompt), []
        chunks = self._generator.generate(
            self._params, [prompt], max_tokens=min(self._most, self._model.max_length - len(prompt)),
            sampling=self._sampling, seed=self._seed, chunk=STREAM_CHUNK,
        )  # fmt: skip
        for (row,) in chunks:
            said.append(decoder.push(before_end(row.tolist(), self.chat.ends)))
            yield said[-1]
        said.append(decoder.flush())
        yield said[-1]
        self._turns.append({"role": ASSISTANT, "content": "".join(said)})
        # Each answer draws its own numbers.
        self._seed = (self._seed + 1) % 2**32

    def _prompt(self) -> list[int]:
        """The ids of the dialogue, without its oldest turns if it is too long."""
        limit, left_out = self._model.max_length - self._room, 0
        while len(ids := self._rendered(self._turns[left_out:])) > limit:
            following = _next_question(self._turns, left_out)
            if following is None:
                raise UserError(
                    f"the message takes {len(ids)} tokens with the chat template{' and --system' if self._system else ''}; "
                    f"together with {self._room} tokens kept for the answer that is more than the model's context of "
                    f"{self._model.max_length}; shorten it, or set --max-tokens lower"
                )
            left_out = following
        if left_out:
            _say(f"the context of {self._model.max_length} tokens is full: the oldest {left_out} messages are left out")
            self._turns = self._turns[left_out:]
        return ids

    def _rendered(self, turns: list[Message]) -> list[int]:
        try:
            return self.chat.prompt([*self._system, *turns])
        except Unusable as error:
            raise UserError(f"the chat template: {error}") from None


def _next_question(turns: list[Message], after: int) -> int | None:
    """The place of the user's next message after one; None if there is none."""
    places: Iterable[int] = range(after + 1, len(turns))
    return next((place for place in places if turns[place]["role"] == USER), None)


def _lines(is_terminal: bool) -> Iterator[str]:
    """The lines of standard input; a terminal is asked for each."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is not UTF-8 is refused with the message that holds it.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not is_terminal:
        yield from sys.stdin
        return
    read: Callable[[str], str] = input
    while True:
        try:
            yield read("> ")
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
