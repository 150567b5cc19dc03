"""The page of a run, or of several side by side: one file that works offline."""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.config import difference, fields, to_data
from train.examine.run_report.pictures import length_picture, loss_picture, score_pictures
from train.examine.run_report.read import RecordedRun, read_run
from train.files import write_whole, writing
from train.report.display import clock
from train.report.page import DARK, page, table
from train.run.run_files import NO_SCORES
from transformer.interpret.capture import readable

_SAMPLES = 8
"""The most samples that the page shows: the first, the last, and some between them."""
_SKIPPED = 20
_TASK_PICTURES = {
    "confusion.png": "Confusion matrix of the held-out documents", "classes.png": "Scores by class",
    "alignment.png": "Alignment", "alignment.svg": "Alignment",
}  # fmt: skip
_OWN = ("name:", "run_dir:")
_STYLE = """<style>
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem .8rem; border-radius: 6px;
  font-size: .82rem; }
.grid { display: flex; flex-wrap: wrap; gap: .4rem; } .grid svg { flex: 0 1 22rem; min-width: 18rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
</style>"""


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of a run, or of several; its path.

    Args:
        out: the file; report.html in the first run's folder by default.

    Raises:
        UserError: no such run, a record that cannot be read, or a page that cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    path = out or folders[0] / "report.html"
    title = runs[0].name if len(runs) == 1 else ", ".join(run.title for run in runs)
    parts = [DARK + _STYLE, *(_whole(runs[0]) if len(runs) == 1 else _side_by_side(runs))]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # What is half of a surrogate pair, in a name or a sample, is written as its number.
        write_whole(path, page(title, parts).encode("utf-8", "backslashreplace").decode())
    print(f"report    {path}")
    return path


def _whole(run: RecordedRun) -> Iterator[str]:
    yield f'<p class="muted">{html.escape(_headline(run))}</p>'
    yield _scores([run])
    yield from _curves([run])
    yield from _details(run)


def _side_by_side(runs: Sequence[RecordedRun]) -> Iterator[str]:
    for run in runs:
        yield f'<p class="muted"><b>{html.escape(run.title)}</b>: {html.escape(_headline(run))}</p>'
    yield _scores(runs)
    first, *others = runs
    yield "<h2>What differs</h2>"
    for other in others:
        lines = [line for line in difference(to_data(first.config), to_data(other.config)) if not line.startswith(_OWN)]
        data = [one.origin.get("data") for one in (first, other)]
        lines += [] if data[0] == data[1] else ["data: other documents, or another order"]
        versions = [one.origin.get("versions", {}) for one in (first, other)]
        lines += difference(versions[0], versions[1], "versions.")
        yield f"<h3>{html.escape(f'{first.title} → {other.title}')}</h3>{_pre(lines or ['nothing but the name'])}"
    yield from _curves(runs)
    for run in runs:
        yield f"<details><summary>{html.escape(run.title)}</summary>{''.join(_details(run))}</details>"


def _headline(run: RecordedRun) -> str:
    """How far the run is, for how long, and on what."""
    config, spent = run.config, run.spent
    parts = [f"{config.model.family}, objective {config.objective.kind}"]
    parts.append(f"{run.step:,} of {config.steps:,} steps" + ("" if run.finished is None else ", finished"))
    if (epoch := run.last("run/epoch")) is not None and (tokens := run.last("run/tokens_seen")) is not None:
        parts.append(f"{epoch:,.3g} epochs, {tokens:,.0f} tokens seen")
    if spent is not None:
        parts.append(clock(spent.total))
    if run.starts:
        last = run.starts[-1]
        parts.append(f"{last['devices']} × {last['device']}" + _processes(last))
    return " · ".join(parts)


def _processes(start: dict[str, Any]) -> str:
    return f" in {start['processes']} processes" if start["processes"] > 1 else ""


def _scores(runs: Sequence[RecordedRun]) -> str:
    """The last value of each score of the held-out documents, and of the training loss."""
    found = dict.fromkeys(name for run in runs for name in run.curves)
    names = [name for name in found if name == "train/loss" or (name.startswith("eval/") and name not in NO_SCORES)]
    if not names:
        return "<p>Nothing is recorded yet.</p>"
    heads = ["last value of", *(run.title for run in runs)] if len(runs) > 1 else ["", "last value", "at step"]
    rows = []
    for name in names:
        cells = ["–" if (value := run.last(name)) is None else f"{value:.5g}" for run in runs]
        title = "training loss" if name == "train/loss" else f"held-out {name.removeprefix('eval/').replace('_', ' ')}"
        rows.append([title, *cells, *([f"{max(runs[0].curves[name]):,}"] if len(runs) == 1 else [])])
    return table(heads, rows, text=(0,))


def _curves(runs: Sequence[RecordedRun]) -> Iterator[str]:
    loss, others = loss_picture(runs), score_pictures(runs)
    if loss or others:
        yield f'<h2>Curves, over steps</h2>{loss}<div class="grid">{"".join(others)}</div>'


def _details(run: RecordedRun) -> Iterator[str]:
    yield from _task_pictures(run)
    yield from _samples(run)
    yield from _data(run)
    yield from _time(run)
    yield from _skipped(run)
    yield "<h2>Config</h2>"
    changed = [
        [field.path, _value(field.value), _value(field.default)]
        for field in fields(run.config) if field.value != field.default and field.path not in ("name", "run_dir")
    ]  # fmt: skip
    yield "<p>What differs from the defaults. The whole config is in <code>config.yaml</code>.</p>"
    yield table(["field", "here", "default"], changed, text=(0,), long=(1, 2))
    yield from _machine(run)


def _task_pictures(run: RecordedRun) -> Iterator[str]:
    for name, title in _TASK_PICTURES.items():
        path = run.folder / name
        if not path.is_file():
            continue
        kind = "svg+xml" if path.suffix == ".svg" else "png"
        content = base64.b64encode(path.read_bytes()).decode()
        yield f'<h2>{title}</h2><img alt="{title}" style="max-width: 100%" src="data:image/{kind};base64,{content}">'


def _samples(run: RecordedRun) -> Iterator[str]:
    if not run.samples:
        return
    yield "<h2>What the model wrote</h2>"
    last = len(run.samples) - 1
    places = sorted({round(last * number / (_SAMPLES - 1)) for number in range(_SAMPLES)})
    for sample in (run.samples[place] for place in places):
        yield f"<h3>step {sample['step']:,}</h3>{_pre([sample['text']])}"


def _data(run: RecordedRun) -> Iterator[str]:
    if run.data is None:
        return
    yield "<h2>Data</h2>"
    rows = []
    for one in run.data["sources"]:
        sizes = one["lengths"]["quantiles"]
        spread = [f"{sizes[share]:,}" if sizes else "–" for share in ("0.5", "0.99", "1")]
        split = "held out" if one["split"] == "validation" else "training"
        counts = [f"{one[name]:,}" for name in ("documents", "tokens", "bytes", "skipped")]
        rows.append([one["name"], split, *counts, *spread])
    heads = ["source", "split", "documents", "tokens", "bytes", "skipped", "median length", "99%", "longest"]
    yield table(heads, rows, text=(0, 1))
    filled = run.data["filled"]
    yield (
        f"<p>{run.data['examples_per_epoch']:,} examples an epoch; {1 - filled:.1%} of the positions of a batch are padding. "
        f"The vocabulary has {run.data['vocabulary']:,} tokens. Lengths are in tokens.</p>"
    )
    yield length_picture(run.data["sources"])


def _time(run: RecordedRun) -> Iterator[str]:
    spent = run.spent
    if spent is None or not spent.total:
        return
    yield "<h2>Where the time went</h2>"
    parts = {
        "training steps": spent.steps, "of them waiting for data": spent.data, "evaluations": spent.evaluations,
        "checkpoints": spent.checkpoints, "lost to interruptions": spent.lost, "starting, compiling, samples": spent.rest,
        "all": spent.total,
    }  # fmt: skip
    yield table(
        ["", "time", "share"],
        [[name, clock(seconds), f"{seconds / spent.total:.1%}"] for name, seconds in parts.items()],
        text=(0,),
    )


def _skipped(run: RecordedRun) -> Iterator[str]:
    if not run.skipped:
        return
    yield f"<h2>Skipped updates</h2><p>{len(run.skipped):,} updates were skipped{_more(len(run.skipped))}.</p>"
    rows = [
        [f"{one['step']:,}", one["reason"], _value(one.get("loss")), _value(one.get("grad_norm")),
         _value(one.get("rolled_back_to")), " ".join(map(str, one["examples"][:8]))]
        for one in run.skipped[:_SKIPPED]
    ]  # fmt: skip
    yield table(["step", "why", "loss", "gradient norm", "rolled back to", "examples"], rows, text=(1,), long=(5,))


def _more(count: int) -> str:
    return f"; the first {_SKIPPED}" if count > _SKIPPED else ""


def _machine(run: RecordedRun) -> Iterator[str]:
    if run.starts:
        yield "<h2>Starts</h2>"
        rows = []
        for start in run.starts:
            when = datetime.datetime.fromtimestamp(start["unix_seconds"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
            where = f"{start['devices']} × {start['device']}{_processes(start)}"
            after = "the beginning" if not start["step"] else f"step {start['step']:,}"
            rows.append([f"{when} UTC", after, where, start["host"], str(start.get("cores", ""))])
        yield table(["when", "from", "devices", "host", "cores"], rows, text=(0, 1, 2, 3))
    if (peak := run.last("run/peak_memory_bytes")) is not None:
        whose = "the process" if run.starts and run.starts[-1]["device"] == "cpu" else "a device"
        yield f"<p>At most {readable(int(peak))} of memory of {whose}.</p>"
    if versions := run.origin.get("versions"):
        yield "<h2>Versions</h2>"
        yield table(["package", "version"], [[name, one] for name, one in versions.items()], text=(0, 1))


def _value(value: Any) -> str:
    """A field's value as YAML has it, or nearly."""
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def _pre(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
