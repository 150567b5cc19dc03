"""`manyheads eval --tasks`: a language model evaluated by lm-evaluation-harness, on its tasks or on the user's.

The harness is an optional dependency (`pip install 'manyheads[lm-eval]'`), which only this module imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from train.files import write_whole, writing
from train.inference.log_probabilities import TokenScorer
from train.parallel.mesh import use_mesh
from train.run.run_files import LoadedRun, load_run
from transformer.errors import UserError, first_line, nearest, shown
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

_ROWS = 16
"""Texts that are continued together."""
_CHUNK = 16
"""Tokens between two looks for a stop."""
_NEW_TOKENS = 256
_SAMPLED_BY = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_Rolling = tuple[None, list[int], list[int]]


def evaluate_tasks(
    run: Path, tasks: Sequence[str], *, step: str = "best", examples: int | None = None, limit: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run, print the harness's table, and store its results if asked.

    Args:
        tasks: names of the harness's tasks, or YAML files with tasks.
        examples: solved ones in front of each question; by default as the task says.
        limit: take only so many questions of each task.
        out: a folder for `tasks.json`.

    Returns:
        The metrics of each task.

    Raises:
        UserError: no such run, task or file, a model that is not a language model, or data that cannot be fetched.
    """
    # Reading the harness's own list of tasks takes a while.
    manager = TaskManager(include_defaults=not all(map(_is_file, tasks)))
    names = [_spec(name, manager) for name in tasks]
    loaded = load_run(run, step)
    if not isinstance(model := loaded.config.model, GPTConfig):
        raise UserError(
            f"{run}: the harness's tasks need a language model (gpt); this one is of family {model.family!r}"
        )
    try:
        # Whatever a task's own code, its data, or the hub raises.
        found = manager.load(names)
    except Exception as error:
        raise UserError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {first_line(error)}") from None
    grouped = {task for group in found["groups"].values() for task in (one.task_name for one in group.get_all_tasks())}
    own = [task for name, task in found["tasks"].items() if name not in grouped]
    results = lm_eval.simple_evaluate(
        HarnessModel(loaded), tasks=[*own, *found["groups"].values()], task_manager=manager, num_fewshot=examples,
        limit=limit, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert results is not None
    print(utils.make_table(results))
    if out is not None:
        kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "tasks.json", json.dumps(kept, indent=2, default=str) + "\n")
    return results["results"]


def _spec(name: str, manager: TaskManager) -> str:
    """A name that the harness knows, or the path of a YAML file."""
    if _is_file(name):
        if not Path(name).is_file():
            raise UserError(f"--tasks: {name}: no such file")
        return str(Path(name).absolute())
    if name not in manager.task_index:
        near = nearest(name, manager.task_index)
        raise UserError(f"--tasks: got {shown(name)}; allowed: tasks of lm-evaluation-harness, or YAML files.{near}")
    return name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


class HarnessModel(TemplateLM):
    """A run as a model of the harness. Texts become the tokens that the harness's own Hugging Face model makes of them."""

    def __init__(self, loaded: LoadedRun) -> None:
        super().__init__()
        model = loaded.config.model
        assert isinstance(model, GPTConfig)
        self._loaded, self._tokenizer, self.max_length = loaded, loaded.tokenizer, model.max_length
        self._scorer = TokenScorer(model)
        self._generator = Generator(model, end_of_text=self._tokenizer.ends, num_tokens=self._tokenizer.vocab_size)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return _begin_of(self._loaded)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self._tokenizer.encode_special(string)
        return self._tokenizer.prompt(string, special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        texts = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        with self._on_mesh():
            scored = self._scorer(self._loaded.params, texts)
        found = []
        for one, (text, _, continuation) in zip(scored, requests, strict=True):
            count = min(len(continuation), len(one.log_probabilities))
            own = slice(len(one.log_probabilities) - count, None)
            answer = (float(one.log_probabilities[own].sum(dtype=float)), bool(one.is_likeliest[own].all()))
            found.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        owners: list[int] = []
        windows: list[_Rolling] = []
        for number, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for window in map(utils.make_disjoint_window, found):
                owners.append(number)
                windows.append((None, *window))
        sums = [0.0] * len(requests)
        for number, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_probability
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        ids = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        for own in groups.values():
            # Rows of similar length are padded least.
            own.sort(key=lambda number: len(ids[number]))
            for first in range(0, len(own), _ROWS):
                some = own[first : first + _ROWS]
                texts = self._continued([ids[number] for number in some], requests[some[0]].args[1])
                for number, text in zip(some, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _continued(self, prompts: list[list[int]], given: Mapping[str, Any]) -> list[str]:
        """The continuations of prompts, each up to the first of the stops."""
        options = dict(normalize_gen_kwargs(dict(given), _NEW_TOKENS))
        stops = handle_stop_sequences(options.pop("until", None), eos=None)
        # A context and its continuation share the model's positions.
        most = min(int(options.pop("max_gen_toks")), self.max_length // 2)
        prompts = [ids[-(self.max_length - most) :] for ids in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        with self._on_mesh():
            for chunk in self._generator.generate(
                self._loaded.params, prompts, max_tokens=most, sampling=_sampling(options), chunk=_CHUNK
            ):
                for row, new in zip(written, chunk, strict=True):
                    row += new.tolist()
                texts = [self._text(row) for row in written]
                if all(
                    any(stop in text for stop in stops) or self._ended(row)
                    for text, row in zip(texts, written, strict=True)
                ):
                    break
        return [postprocess_generated_text(text, stops, None) for text in map(self._text, written)]

    def _ended(self, ids: Iterable[int]) -> bool:
        return any(id in self._tokenizer.ends for id in ids)

    def _text(self, ids: list[int]) -> str:
        """What the tokens before the end decode to alone, as the harness has it."""
        end = next((place for place, id in enumerate(ids) if id in self._tokenizer.ends), len(ids))
        return self._tokenizer.decode(ids[:end])

    def _on_mesh(self) -> Any:
        return use_mesh(self._loaded.mesh, self._loaded.config.mesh.rules)


def _sampling(options: dict[str, Any]) -> Sampling:
    """How to sample, from the harness's settings. Raises `UserError` for one that is not supported."""
    if not options.pop("do_sample", False):
        return Sampling(temperature=0.0)
    unknown = set(options) - set(_SAMPLED_BY)
    if unknown:
        raise UserError(
            f"generation_kwargs: {', '.join(sorted(unknown))}: not supported; allowed: {', '.join(_SAMPLED_BY)}"
        )
    return Sampling(**{name: value for name, value in options.items() if value is not None})


def _begin_of(loaded: LoadedRun) -> int:
    """The token that stands for an empty context: the vocabulary's begin of text, or its end of text."""
    tokenizer = loaded.tokenizer
    name = tokenizer.conventions.fields.get("bos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    id = tokenizer.special(name) if isinstance(name, str) else None
    if id is not None:
        return id
    return tokenizer.begin[0] if tokenizer.begin else tokenizer.end_of_text
