"""What sentence-transformers stores about the texts of an embedding model: prompts, where texts are cut, and their case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from train.data.tokenization.tokenizer import SubwordTokenizer
from train.huggingface.sentence_modules import POOLING_FOLDER, modules_of
from train.huggingface.text_files import as_json
from transformer.errors import shown
from transformer.huggingface.checkpoint import read_mapping
from transformer.huggingface.fields import HFConfigReader

_SETTINGS = "config_sentence_transformers.json"
_LENGTHS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that the file with the length of texts has had; the first is the present one."""
_EMPTY = {"query": "", "document": ""}
"""The prompts of a model without any."""
_SHORTEST = 3


def read_texts(folder: Path, body: Path, max_length: int) -> dict[str, Any]:
    """`Conventions.embedding` of a folder; empty where its files have only defaults.

    Args:
        body: the folder with config.json.
        max_length: longest context of the model, in tokens.

    Raises:
        UserError: a file that cannot be read, or fields that are not supported.
    """
    found: dict[str, Any] = {}
    modules = modules_of(folder)
    pooling = (modules[1].folder if modules else folder / POOLING_FOLDER) / "config.json"
    if pooling.exists() and not HFConfigReader(data := read_mapping(pooling)).get("include_prompt", True):
        found["include_prompt"] = data["include_prompt"]
    path = next((body / name for name in _LENGTHS if (body / name).exists()), None)
    length = None
    if path is not None:
        theirs = HFConfigReader(read_mapping(path))
        theirs.must("transformer_task", ["feature-extraction"], "feature-extraction")
        theirs.must("module_output_name", ["token_embeddings"], "token_embeddings")
        if theirs.flag("do_lower_case", False):
            found["lower_case"] = True
        if "max_seq_length" in theirs:
            length = theirs.size("max_seq_length", least=_SHORTEST)
        theirs.done(str(path))
    if modules and length is None and (body / "tokenizer_config.json").exists():
        # The tokenizer of a model that was saved by a newer version has it.
        length = read_mapping(body / "tokenizer_config.json").get("model_max_length")
    if isinstance(length, int) and _SHORTEST <= length < max_length:
        found["max_length"] = length
    return found | (_prompts(folder / _SETTINGS) if (folder / _SETTINGS).exists() else {})


def _prompts(path: Path) -> dict[str, Any]:
    theirs = HFConfigReader(read_mapping(path))
    theirs.must("model_type", ["SentenceTransformer"], "SentenceTransformer")
    theirs.must("similarity_fn_name", ["cosine", "dot", "euclidean", "manhattan"], "cosine")
    prompts = theirs.section("prompts")
    if bad := [name for name, text in prompts.items() if not isinstance(text, str)]:
        theirs.wrong(f"prompts.{bad[0]}: got {shown(prompts[bad[0]])}; allowed: a text")
    default = theirs.get("default_prompt_name")
    known = _EMPTY | prompts
    if default is not None and (not isinstance(default, str) or default not in known):
        theirs.wrong(f"default_prompt_name: got {shown(default)}; allowed: {', '.join(known)}")
    theirs.done(str(path))
    kept = {name: text for name, text in prompts.items() if _EMPTY.get(name) != text}
    found = {"prompts": kept, "default_prompt": default, "similarity": theirs.get("similarity_fn_name", "cosine")}
    usual: dict[str, Any] = {"prompts": {}, "default_prompt": None, "similarity": "cosine"}
    return {name: value for name, value in found.items() if value != usual[name]}


def text_notes(about: Mapping[str, Any]) -> list[str]:
    """What a user should know about `Conventions.embedding`."""
    notes = []
    if "max_length" in about:
        notes.append(f"texts are cut after {about['max_length']} tokens, as in sentence-transformers")
    if "prompts" in about:
        default = about.get("default_prompt")
        usual = f"{default} is put before each text" if default else "none is used unless --prompt-name names it"
        notes.append(f"prompts: {', '.join(about['prompts'])}; {usual}")
    if "similarity" in about:
        notes.append(
            f"its vectors are meant to be compared by {about['similarity']} (similarity_fn_name), not by cosine"
        )
    return notes


def text_files(about: Mapping[str, Any], max_length: int) -> dict[str, str]:
    """The files that `read_texts` reads, by name."""
    lengths = {
        "max_seq_length": about.get("max_length", max_length), "do_lower_case": about.get("lower_case", False)
    }  # fmt: skip
    settings = {
        "model_type": "SentenceTransformer", "prompts": _EMPTY | about.get("prompts", {}),
        "default_prompt_name": about.get("default_prompt"), "similarity_fn_name": about.get("similarity", "cosine"),
    }  # fmt: skip
    return {_LENGTHS[0]: as_json(lengths), _SETTINGS: as_json(settings)}


def with_texts(tokenizer: SubwordTokenizer, about: Mapping[str, Any]) -> SubwordTokenizer:
    """A tokenizer with `Conventions.embedding`; it reads texts in lower case if they say so."""
    from tokenizers import Tokenizer, normalizers

    model = tokenizer.model
    own, several = model.normalizer, cast(Any, normalizers.Sequence)
    parts: list[Any] = list(own) if isinstance(own, several) else [] if own is None else [own]
    if about.get("lower_case") and not any(isinstance(one, normalizers.Lowercase) for one in parts):
        model = Tokenizer.from_str(model.to_str())
        model.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
    kept = dataclasses.replace(tokenizer.conventions, embedding=about)
    return SubwordTokenizer(model, tokenizer.end_token, kept)
