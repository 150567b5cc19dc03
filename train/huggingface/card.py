"""The model card of an exported run: the model, its training data, its scores, and how to use it."""

from __future__ import annotations

from pathlib import Path

from train.config import dump
from train.run.run_files import LoadedRun, read_metrics
from transformer.models.families import count_parameters

_TAGS = {
    "masked": "fill-mask", "pretraining": "fill-mask", "classification": "text-classification",
    "tokens": "token-classification", "answer": "question-answering", "choice": "multiple-choice",
    "embedding": "feature-extraction",
}  # fmt: skip
_USES = {
    "gpt": "ids = tokenizer('The', return_tensors='pt').input_ids\nprint(tokenizer.decode(model.generate(ids)[0]))",
    "bert": "print(model(**tokenizer('A text.', return_tensors='pt')))",
}


def text(loaded: LoadedRun, run: Path, name: str, model_type: str, *, base: str | None = None) -> str:
    """The card, in Markdown with the hub's front matter.

    Args:
        name: the class of transformers.
        base: the base model of adapters; None: the model is whole.
    """
    config = loaded.config
    head = getattr(config.model, "head", None)
    without = "text-generation" if config.model.family == "gpt" else "translation"
    tag = without if head is None else _TAGS.get(head.kind, "feature-extraction")
    sources = "\n".join(f"- {source.title}" for source in config.data.sources)
    use = _USES.get(
        config.model.family, "ids = tokenizer('A text.', return_tensors='pt').input_ids\nprint(model.generate(ids))"
    )
    what, library, imports = f"A `{name}`", "transformers", "import transformers"
    load = f"model = transformers.{name}.from_pretrained(FOLDER)"
    if base is not None:
        what, library = f"Low-rank adapters of a `{name}`", f"peft\nbase_model: {base}"
        imports = "import peft\nimport transformers"
        labels = f", num_labels={head.classes}" if head is not None and tag.endswith("classification") else ""
        load = (
            f"base = transformers.{name}.from_pretrained({base!r}{labels})\n"
            "model = peft.PeftModel.from_pretrained(base, FOLDER)"
        )
    return f"""---
library_name: {library}
pipeline_tag: {tag}
tags: [manyheads, {model_type}]
---

# {config.name}

{what} of {count_parameters(config.model):,} parameters, trained with manyheads (step {loaded.step:,}, objective
{config.objective.kind}).

```python
{imports}

tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
{load}
{use}
```

## Data

{sources or "- unknown"}

## Held-out scores

{_scores(run, loaded.step)}

## Config

The whole config is also in `config.yaml`.

```yaml
{dump(config).rstrip()}
```
"""


def _scores(run: Path, step: int) -> str:
    """The scores on held-out data that the run recorded at a step, or last before it, as a table."""
    found = {}
    for name, curve in read_metrics(run).items():
        known = {at: value for at, value in curve.items() if at <= step and value is not None}
        if name.startswith("eval/") and known:
            found[name] = known[max(known)]
    if not found:
        return "None were recorded."
    rows = "\n".join(f"| {name.removeprefix('eval/')} | {value:g} |" for name, value in found.items())
    return f"| metric | value |\n|---|---:|\n{rows}"
