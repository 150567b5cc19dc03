"""Captures the attention weights of a run's model for one text, and writes a page and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from train.data.tokenization.tokenizer import CLS, SEP
from train.inference.labels import labels
from train.parallel.mesh import use_mesh
from train.run.run_files import LoadedRun, load_run
from transformer.errors import UserError, check_text, is_number, shown
from transformer.functional import graphdef_of
from transformer.interpret.capture import (
    AttentionMaps,
    attention_maps,
    bytes_needed,
    check_memory,
    choose,
    choose_layers,
    heads_of,
    readable,
)
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig

PAGE = "attention.html"


def attend(
    run: Path, text: str, layers: list[int] | None = None, heads: list[int] | None = None, *, pictures: bool = False,
    out: Path | None = None, step: str = "best",
) -> None:  # fmt: skip
    """Write the attention weights of one text as a page.

    Args:
        layers, heads: numbers from 0; all of them by default.
        pictures: also write a picture of all heads together, and one of each, which takes longer than all the rest.
        out: the folder to write into, created if missing; `attention` in the run's folder by default.

    Raises:
        UserError: no such run, checkpoint, layer or head, a text that does not fit the model, or a folder that cannot be
            written.
    """
    loaded = load_run(run, step)
    model = loaded.config.model
    ids = tokens_of(loaded, text, str(run))
    picked = choose_layers("layer", layers, model)  # type: ignore[arg-type]
    num_heads = heads_of(model, picked)  # type: ignore[arg-type]
    chosen = picked, choose("head", heads, num_heads)
    shape = len(chosen[0]), len(chosen[1]), ids.size, ids.size
    check_memory(*shape)
    print(f"text      {ids.size:,} token{'' if ids.size == 1 else 's'}")
    print(f"layers    {_listed(chosen[0], model.num_layers)}")
    print(f"heads     {_listed(chosen[1], num_heads)}")
    print(
        f"memory    {readable(bytes_needed(*shape))} for {shape[0] * shape[1]:,} maps of {ids.size:,} × {ids.size:,} weights"
    )
    maps = maps_of(loaded, ids, *chosen)
    folder = run / "attention" if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = maps.save(folder / PAGE)
        print(f"page      {page} ({readable(page.stat().st_size)})", flush=True)
        drawn = _drawn(maps, folder) if pictures else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    if drawn:
        print(f"pictures  {drawn[0]}")
        print(f"          {drawn[1]}{f' and {len(drawn) - 2:,} more' if len(drawn) > 2 else ''}")


def _drawn(maps: AttentionMaps, folder: Path) -> list[Path]:
    # Imports matplotlib.
    from transformer.interpret.plot import save_plots

    return save_plots(maps, folder)


def maps_of(
    loaded: LoadedRun, ids: np.ndarray, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> AttentionMaps:
    """The attention weights of a text's tokens (`tokens_of`), with the tokens as labels.

    Args:
        layers, heads: numbers from 0; all of them by default.

    Raises:
        UserError: a layer or head that does not exist.
    """
    graphdef = graphdef_of(lambda rngs: make_model(loaded.config.model, rngs))
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        return attention_maps(
            nnx.merge(graphdef, loaded.params), ids, labels(loaded.tokenizer, ids), layers=layers, heads=heads,
            title=f"Attention of {loaded.config.name}",
        )  # fmt: skip


def numbers(option: str, text: str | None) -> list[int] | None:
    """The list of numbers of an option, such as 0,3; None for an option that was not given. Raises `UserError`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(map(is_number, parts)):
        raise UserError(f"{option}: got {shown(text)}; allowed: comma-separated numbers from 0, such as 0,3")
    return [int(part) for part in parts]


def tokens_of(loaded: LoadedRun, text: str, name: str, *, special: bool = False) -> np.ndarray:
    """The token ids of the text.

    Args:
        special: special tokens that the text spells out, such as `[MASK]`, are those tokens.

    Raises:
        UserError: a model or a text that does not fit.
    """
    model, tokenizer = loaded.config.model, loaded.tokenizer
    check_text("text", text)
    if not isinstance(model, GPTConfig | BertConfig):
        raise UserError(f"{name}: a model of family {model.family!r} reads pairs; use manyheads translate --attention")
    ids = np.array(tokenizer.encode_special(text), tokenizer.dtype) if special else tokenizer.encode(text)
    if isinstance(model, GPTConfig):
        ids = np.array(tokenizer.prompt(text), ids.dtype)
    elif isinstance(model, BertConfig):
        # As in training.
        around = [np.array([tokenizer.special(token)], ids.dtype) for token in (CLS, SEP)]
        ids = np.concatenate([around[0], ids, around[1]]) if ids.size else ids
    if not ids.size:
        raise UserError("text: this run's tokenizer gives no tokens for it")
    if ids.size > model.max_length:
        raise UserError(
            f"text: its {ids.size:,} tokens exceed the model's context of {model.max_length:,}; give a shorter one"
        )
    if ids.max() >= model.vocab_size:
        raise UserError(f"text: token id {ids.max()} is outside the model's vocabulary of {model.vocab_size}")
    return ids


def _listed(chosen: tuple[int, ...], number: int) -> str:
    if len(chosen) == number:
        return f"all {number}"
    return f"{', '.join(map(str, chosen))} (of {number}, from 0)"
