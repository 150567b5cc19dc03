"""The model card of an exported run: the model, its training data, its scores, and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
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


def text(
    loaded: LoadedRun, run: Path, name: str, model_type: str, *, base: str | None = None,
    outputs: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """The card, in Markdown with the hub's front matter.

    Args:
        name: the class of transformers.
        base: the base model of adapters; None: the model is whole.
        outputs: names of the outputs of an ONNX graph; None: the weights are in safetensors.
    """
    config = loaded.config
    head = getattr(config.model, "head", None)
    without = "text-generation" if config.model.family == "gpt" else "translation"
    tag = without if head is None else _TAGS.get(head.kind, "feature-extraction")
    sources = "\n".join(f"- {source.title}" for source in config.data.sources)
    use = _USES.get(
        config.model.family, "ids = tokenizer('A text.', return_tensors='pt').input_ids\nprint(model.generate(ids))"
    )
    what, library = f"A `{name}`", "transformers"
    code = f"""import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
model = transformers.{name}.from_pretrained(FOLDER)
{use}"""
    if base is not None:
        what, library = f"Low-rank adapters of a `{name}`", f"peft\nbase_model: {base}"
        labels = f", num_labels={head.classes}" if head is not None and tag.endswith("classification") else ""
        code = f"""import peft
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
base = transformers.{name}.from_pretrained({base!r}{labels})
model = peft.PeftModel.from_pretrained(base, FOLDER)
{use}"""
    if outputs is not None:
        what, library = f"The ONNX graph of a `{name}`", "onnx"
        types = ', "token_type_ids": encoding.type_ids' if getattr(config.model, "token_types", 0) >= 2 else ""
        names = ", ".join(outputs) + ("," if len(outputs) == 1 else "")
        one = "[[one]]" if tag == "multiple-choice" else "[one]"
        code = f"""import numpy as np
import onnxruntime
import tokenizers

encoding = tokenizers.Tokenizer.from_file(FOLDER + "/tokenizer.json").encode("A text.")
rows = {{"input_ids": encoding.ids, "attention_mask": encoding.attention_mask{types}}}
inputs = {{name: np.array({one}) for name, one in rows.items()}}
session = onnxruntime.InferenceSession(FOLDER + "/onnx/model.onnx")
{names} = session.run(None, inputs)"""
    return f"""---
library_name: {library}
pipeline_tag: {tag}
tags: [manyheads, {model_type}]
---

# {config.name}

{what} of {count_parameters(config.model):,} parameters, trained with manyheads (step {loaded.step:,}, objective
{config.objective.kind}).

```python
{code}
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
