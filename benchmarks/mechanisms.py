"""`manyheads-bench mechanisms`: every mechanism of attention that a config can name, trained for the same time on the same data.

Each is a shipped config with a field or two changed, so the same command line trains it alone. A mechanism takes as many steps as
fit into the time, by a measurement of its step before; compiling, preparing the data and scoring it do not count. Tokens a second
are positions of a whole batch, padding included, by that measurement.

    DIRECTORY/TASK/NAME/FINGERPRINT/             the run, of these settings and no others
    DIRECTORY/TASK/NAME/FINGERPRINT.steps.json   what a step takes, and how many there are
    DIRECTORY/TASK/NAME/FINGERPRINT.json         its figures; there once it is finished
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from benchmarks import record
from benchmarks.stage import CONFIGS, folder_of, load, once, scored_at_the_end, train_for_scores
from benchmarks.workload import our_step
from train.config import RunConfig, to_data
from transformer.errors import UserError, nearest
from transformer.models.families import count_parameters

MINUTES = 2.0
DIRECTORY = "runs/mechanisms"
FIGURES = {
    "eval/bits_per_byte": ("bits per byte", ".3f"),
    "eval/loss": ("nats a token", ".3f"),
    "eval/accuracy": ("accuracy", ".1%"),
}
"""What each is called, and how it is written. More accuracy is better, and less of the others."""
_TIMED_STEPS = 5

Fields = Mapping[str, Any]
"""Fields of the model's config, as a file gives them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A shipped config, and the mechanisms that take the place of its own."""

    title: str
    config: str
    """A file of configs/."""
    figure: str
    """What is compared, by its name in metrics.jsonl; one of `FIGURES`."""
    mechanisms: Mapping[str, Fields]
    overrides: tuple[str, ...] = ()
    """Of every mechanism."""

    def arguments(self, fields: Fields) -> list[str]:
        """What follows `manyheads train` on the command line."""
        given = (f"--model.{name.replace('_', '-')}={_flow(value)}" for name, value in fields.items())
        return [*self.overrides, *given]


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("\n...\n").strip()


def _mixer(kind: str, **fields: Any) -> Fields:
    return {"attention": {"kind": kind, **fields}, "pattern": []}


_HEADS: dict[str, Any] = {"num_heads": 2, "bias": False}
_SOFTMAX = {"kind": "softmax", "num_heads": 2, "qk_norm": True, "bias": False, "position": {"kind": "rotary"}}
_DELTA: dict[str, Any] = {"kind": "gated_delta", "num_heads": 2, "feature_map": "identity", "bias": False}

TASKS: dict[str, Task] = {
    "language": Task(
        title="a language model of the standard library", config="stdlib_hybrid.yaml",
        figure="eval/bits_per_byte",
        mechanisms={
            "softmax, multi-head": {"attention": _SOFTMAX, "pattern": []},
            "softmax, multi-query": {"attention": _SOFTMAX | {"num_kv_heads": 1}, "pattern": []},
            "latent": _mixer("latent", num_heads=2),
            "differential": _mixer("differential", **_HEADS, position={"kind": "rotary"}),
            "disentangled": _mixer("disentangled", **_HEADS),
            "linear, elu": _mixer("linear", **_HEADS),
            "linear, DPFP": _mixer("linear", **_HEADS, feature_map="dpfp"),
            "linear, random features": _mixer("linear", **_HEADS, feature_map="favor"),
            "fast weights, sum": _mixer("sum", **_HEADS),
            "fast weights, gated sum": _mixer("gated_sum", **_HEADS),
            "fast weights, delta rule": _mixer("delta", **_HEADS),
            "fast weights, gated delta rule": _mixer(**_DELTA),
            "hybrid, three gated delta to one softmax": {},
            "LSTMN": _mixer("lstmn"),
        },
    ),
    "translation": Task(
        title="a recurrent translator between two synthetic languages", config="history/bahdanau.yaml",
        figure="eval/loss",
        mechanisms={
            "none": {"attention": {"kind": "none"}},
            "additive": {"attention": {"kind": "additive"}},
            "additive, sparsemax": {"attention": {"kind": "additive", "normalizer": "sparsemax"}},
            "additive, entmax-1.5": {"attention": {"kind": "additive", "normalizer": "entmax15"}},
            "dot": {"attention": {"kind": "dot"}},
            "general": {"attention": {"kind": "general"}},
            "concat": {"attention": {"kind": "concat"}},
            "local-m": {"attention": {"kind": "local_m"}},
            "local-p": {"attention": {"kind": "local_p"}},
            "hard": {"attention": {"kind": "hard"}},
            "linear": {"attention": {"kind": "linear"}},
            "delta rule": {"attention": {"kind": "delta"}},
        },
    ),
    "reviews": Task(
        title="a classifier of film reviews", config="classify_reviews.yaml",
        figure="eval/accuracy",
        overrides=(
            "--init-from=null",
            "--data.tokenizer={kind: bpe, vocab_size: 4096, special_tokens: ['[MASK]', '[CLS]', '[SEP]']}",
        ),
        mechanisms={
            "mean of the states": {},
            "structured": {"head": {"kind": "structured", "num_labels": 2}},
        },
    ),
    "pairs": Task(
        title="a classifier of pairs of sentences", config="classify_pairs.yaml",
        figure="eval/accuracy",
        mechanisms={
            "mean of the states": {"head": {"kind": "classification", "num_labels": 2, "pooling": "mean"}},
            "decomposable": {},
            "decomposable, with intra-attention": {"head": {"kind": "decomposable", "num_labels": 2, "intra": True}},
        },
    ),
}  # fmt: skip


def run(
    minutes: float = MINUTES,
    tasks: Sequence[str] | None = None,
    directory: str = DIRECTORY,
    *,
    chosen: Mapping[str, Task] = TASKS,
) -> dict[str, Any]:
    """Train each mechanism of each task, print a table and save it. What is finished is not run again.

    Args:
        minutes: of training for each mechanism.
        tasks: names of `TASKS`; None: all.
        directory: where runs and figures are kept.
        chosen: the tasks themselves.

    Raises:
        UserError: an unknown name, whatever `train` raises, and an interruption.
    """
    for name in tasks or ():
        if name not in chosen:
            raise UserError(f"--tasks: got {name!r}; allowed: {', '.join(chosen)}.{nearest(name, chosen)}")
    names = [name for name in chosen if tasks is None or name in tasks]
    total = sum(len(chosen[name].mechanisms) for name in names)
    print(f"{total} mechanisms, {minutes:g} minutes of training each", flush=True)
    result: dict[str, Any] = {"minutes": minutes, "mechanisms": {}}
    # All are timed first, so that whatever else the machine does later gives none of them more steps than another.
    runs = {name: _timed_runs(chosen[name], Path(directory) / name, minutes) for name in names}
    for name in names:
        task = chosen[name]
        rows = {title: _figures(task, title, run) for title, run in runs[name].items()}
        result["mechanisms"][name] = {
            "title": task.title, "config": f"configs/{task.config}", "figure": task.figure, "rows": rows,
        }  # fmt: skip
    show(result)
    given = f" --minutes {minutes:g}" if minutes != MINUTES else ""
    given += f" --tasks {','.join(names)}" if tasks is not None else ""
    command = f"manyheads-bench mechanisms{given}"
    folder = record.folder_for(directory, DIRECTORY, "mechanisms", command)
    record.save("mechanisms", command, result, show=False, folder=folder)
    return result


def _timed_runs(task: Task, folder: Path, minutes: float) -> dict[str, tuple[RunConfig, dict[str, float]]]:
    """The run of each mechanism, as long as the time allows, and how it was timed: now, or before."""
    runs = {}
    for title, fields in task.mechanisms.items():
        config = scored_at_the_end(load(CONFIGS / task.config, task.arguments(fields)))
        place = folder / "".join(letter if letter.isalnum() else "-" for letter in title)
        directory = folder_of(str(place), minutes, to_data(config))
        config = dataclasses.replace(config, run_dir=str(directory))
        timed = once(Path(f"{directory}.steps.json"), functools.partial(_timed, config, minutes))
        print(f"{task.title}, {title}: {timed['seconds_a_step']:.3f} s a step, {timed['steps']} steps", flush=True)
        runs[title] = _for_steps(config, int(timed["steps"])), timed
    return runs


def _timed(config: RunConfig, minutes: float) -> dict[str, float]:
    """How many steps over a whole batch fit into the time: by the fastest of a few, which other work disturbs least."""
    take = our_step(config)
    record.seconds_per_call(take, 1)
    seconds = min(record.seconds_per_call(take, 1) for _ in range(_TIMED_STEPS))
    jax.clear_caches()
    return {"seconds_a_step": seconds, "steps": max(math.floor(60 * minutes / seconds), 1)}


def _for_steps(config: RunConfig, steps: int) -> RunConfig:
    """The run at that length, with its schedule: a tenth of it is warm-up at most."""
    optimizer = dataclasses.replace(
        config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, max(steps // 10, 1))
    )
    log = dataclasses.replace(config.log, every=max(steps // 20, 1))
    return dataclasses.replace(config, steps=steps, optimizer=optimizer, log=log)


def _figures(task: Task, title: str, timed_run: tuple[RunConfig, dict[str, float]]) -> dict[str, Any]:
    """The figures of one mechanism: trained now, or read if it was before."""
    config, timed = timed_run

    def work() -> dict[str, Any]:
        last = train_for_scores(config, "mechanisms")
        return {
            "arguments": task.arguments(task.mechanisms[title]),
            "model": dict(task.mechanisms[title]),
            "parameters": count_parameters(config.model),
            "steps": config.steps,
            "tokens_per_second": config.batch_size * config.sequence_length / timed["seconds_a_step"],
            "loss": last["eval/loss"],
            "figure": last[task.figure],
        }

    figures = once(Path(f"{config.directory}.json"), work)
    print(
        f"{task.title}, {title}: {written(task.figure, figures['figure'])} after {figures['steps']} steps", flush=True
    )
    return figures


def written(figure: str, value: float) -> str:
    """A figure with its name."""
    name, form = FIGURES[figure]
    return f"{value:{form}} {name}"


def show(result: dict[str, Any]) -> None:
    """Print a table of each task."""
    for part in result["mechanisms"].values():
        print(f"\n{part['title']}: {part['config']}")
        print(markdown(part))


def markdown(part: dict[str, Any]) -> str:
    """The rows of one task as a Markdown table, the best first."""
    (name, form), sign = FIGURES[part["figure"]], -1 if part["figure"] == "eval/accuracy" else 1
    lines = [
        f"| mechanism | in the model | parameters | {name} | steps | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for title, row in sorted(part["rows"].items(), key=lambda item: sign * item[1]["figure"]):
        fields = ", ".join(f"{field}: {_flow(value)}" for field, value in row["model"].items() if value != [])
        lines.append(
            f"| {title} | {f'`{fields}`' if fields else 'as it is'} | {row['parameters']:,} | "
            f"{row['figure']:{form}} | {row['steps']:,} | {row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)
