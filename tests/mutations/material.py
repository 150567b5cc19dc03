"""What mutants are made from: small runs, checkpoints, vocabularies and documents, all of them good; made once."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

from tests.shrunk import write_documents

_GPT = """
name: gpt
steps: 2
batch_size: 4
model: {{vocab_size: 256, max_length: 16, num_layers: 2, embed_dim: 16, attention: {{num_heads: 2}}}}
data: {{sources: [{{kind: files, path: {texts}}}], tokenizer: {{kind: bytes}}, validation_fraction: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_steps: 1}}
evaluation: {{every: 1, batches: 1}}
checkpoint: {{every: 1}}
log: {{every: 1, trackers: []}}
sample: {{every: 0}}
"""
_CLASSIFIER = """
name: classifier
steps: 1
batch_size: 4
length: 16
model: {{family: bert, vocab_size: 264, max_length: 16, num_layers: 1, embed_dim: 16, attention: {{num_heads: 2}},
  head: {{kind: classification, pooling: mean}}}}
objective: {{kind: classification}}
data: {{sources: [{{kind: files, path: {labelled}, label_field: class}}], packing: documents, validation_fraction: 0.2,
  tokenizer: {{kind: bytes, special_tokens: ["[MASK]", "[CLS]", "[SEP]"]}}}}
evaluation: {{every: 1, batches: 1}}
log: {{every: 1, trackers: []}}
"""
_TRANSLATOR = """
name: translator
steps: 1
batch_size: 4
length: 24
model: {{family: vaswani, vocab_size: 600, source_vocab_size: 600, max_length: 24, num_layers: 1, embed_dim: 16,
  attention: {{num_heads: 2}}}}
objective: {{kind: seq2seq}}
data: {{sources: [{{kind: synthetic, limit: 100}}], packing: documents, validation_fraction: 0.1,
  tokenizer: {{kind: words, vocab_size: 600}}, target_tokenizer: {{kind: words, vocab_size: 600}}}}
evaluation: {{every: 0, batches: 1, translations: 0}}
sample: {{every: 0, max_tokens: 0}}
log: {{every: 1, trackers: []}}
"""
RUNS = {"gpt": _GPT, "classifier": _CLASSIFIER, "translator": _TRANSLATOR}


def make(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir(parents=True)
    write_documents(folder)
    rows = [{"text": f"text {number}", "class": ("bad", "good")[number % 2]} for number in range(40)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _runs(folder)
    _checkpoints(folder)
    _vocabularies(folder / "tokenizers")


def _runs(folder: Path) -> None:
    from train.commands.cli import main

    for name, text in RUNS.items():
        path = folder / f"{name}.yaml"
        path.write_text(text.format(texts=folder / "texts.jsonl", labelled=folder / "labelled.jsonl"), encoding="utf-8")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(["train", str(path), "--run-dir", str(folder / "runs" / name)])
        assert status == 0, said.getvalue()


def _checkpoints(folder: Path) -> None:
    """Folders of Hugging Face's, one of an encoder, of two decoders, and of an encoder-decoder."""
    from tests.huggingface import ours

    (folder / "huggingface").mkdir()
    for name, config in {"bert": ours.BERT, "gpt2": ours.GPT, "llama": ours.LLAMA, "t5": ours.T5}.items():
        place = folder / "huggingface" / name
        ours.written(config, place, extra={"eos_token_id": 3})
        special = ours.BERT_SPECIAL if name == "bert" else ("<pad>", "<unk>", "<s>", "</s>")
        ours.tokenizer_json(place, special)
    ours.written(ours.LLAMA, folder / "huggingface" / "parts", extra={"eos_token_id": 3}, limit=4_000)
    ours.tokenizer_json(folder / "huggingface" / "parts", ("<pad>", "<unk>", "<s>", "</s>"))


def _vocabularies(folder: Path) -> None:
    """Vocabularies of each kind that is trained, and a file of ranks."""
    from train.data.tokenization.tokenizer import TokenizerConfig
    from train.data.tokenization.vocabulary import make_tokenizer

    texts = ["the cat sat on a mat", "some dogs run over hills far away", "12 of 30"] * 5
    for kind in ("bpe", "wordpiece", "unigram", "words"):
        config = TokenizerConfig(kind=kind, vocab_size=300, special_tokens=("[MASK]", "[CLS]", "[SEP]"))
        make_tokenizer(config, texts).save(folder / kind)
    import base64

    ranks = [bytes([number]) for number in range(256)] + [b"th", b"the", b" a", b"at"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    os.makedirs(folder / "ranks")
    (folder / "ranks" / "ranks.tiktoken").write_text("".join(lines))
