"""`manyheads export --format onnx`: writes an encoder as a folder that ONNX Runtime, optimum and transformers.js load.

B batch, T position.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.tokenization.tokenizer import Tokenizer
from train.files import check_new, whole_folder
from train.huggingface import card
from train.huggingface.export import origin_of, write_files
from train.huggingface.onnx_graph import FILE, FOLDER, HIDDEN, OF_TOKENS, VECTOR, inputs_of, outputs_of, write_graph
from train.huggingface.parity import TEXTS, token_rows
from train.huggingface.sentence_modules import is_embedder, with_modules
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.run.run_files import load_run, stored_run
from train.versions import version
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.huggingface import checkpoint
from transformer.huggingface.checkpoint import Checkpoint
from transformer.huggingface.tensors import INDEX
from transformer.models.bert import BertConfig
from transformer.models.families import make_model

LIMIT = 1e-4
"""Largest difference between the graph's outputs and the model's, as a part of the largest output if that is above 1."""
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_LONGEST = 256
"""Tokens of the longest text that is compared; a model's context may be much longer."""
_CHECKED = ("Yes.", *TEXTS, " ".join(TEXTS * 8))
_PAIRS = ((TEXTS[0], "Yes."), ("Yes.", TEXTS[1]))
Inputs = dict[str, np.ndarray]


def export_onnx(run: Path, directory: Path | None = None, *, step: str = "best", model_type: str | None = None) -> Path:
    """Write onnx/model.onnx, config.json with the labels, the tokenizer, sentence-transformers' modules, and a card.

    The graph is compared with the model before the folder is made.

    Args:
        directory: the folder to make, which must not exist; RUN/onnx by default.
        step, model_type: as in `export`.

    Raises:
        UserError: packages that are not installed, no such run or checkpoint, a model that is not an encoder, or that fits no
            architecture; a graph that computes something else; or a folder that exists already or cannot be written.
    """
    directory = run / "onnx" if directory is None else directory
    check_new(directory)
    config = stored_run(run, step).config.model
    if not isinstance(config, BertConfig):
        raise UserError(
            f"{run}: only encoders (family 'bert') are written as ONNX, and this is a model of family {config.family!r}; "
            "--format hf writes what transformers has a class for"
        )
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx: not installed: {', '.join(missing)}; pip install 'manyheads[onnx]'")
    loaded = load_run(run, step)
    try:
        architecture = checkpoint.architecture_of(config, model_type or origin_of(run, loaded))
    except UserError as error:
        if model_type is not None:
            raise
        raise UserError(
            f"{error}; a graph is made from a class of transformers. Train a model of one of its architectures, or use this "
            "one with manyheads predict and manyheads embed"
        ) from None
    # The graph does not know which tokens are the prompt's.
    vectors = not is_embedder(config) or loaded.tokenizer.conventions.embedding.get("include_prompt", True)
    with use_mesh(loaded.mesh, loaded.config.mesh.rules), whole_folder(directory) as partial:
        name = write_files(partial, loaded, architecture)
        read = with_modules(checkpoint.read(partial), partial)
        outputs = outputs_of(read.config, vectors=vectors)
        graph = write_graph(partial / FOLDER, read, outputs)
        rows, same_ids = _inputs(read, partial, loaded.tokenizer)
        report = _compared(read, loaded.params, rows, graph, outputs)
        text = card.text(loaded, run, name, architecture.model_type, outputs=outputs)
        (partial / "README.md").write_text(text, encoding="utf-8")
        (partial / "parity.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        for weights in (*partial.glob("model*.safetensors"), partial / INDEX):
            weights.unlink(missing_ok=True)
    if not same_ids:
        print("  note: the written tokenizer gives other ids than the run's for the same text")
    if not vectors:
        print(
            f"  note: the vectors leave out the prompt's tokens, which a graph cannot know: there is no {VECTOR}; pool "
            f"{outputs[0]}, as sentence-transformers does"
        )
    place = directory / FOLDER / FILE
    print(f"written to {directory}: onnxruntime.InferenceSession({str(place)!r}); outputs: {', '.join(outputs)}")
    return directory


def _inputs(read: Checkpoint, folder: Path, ours: Tokenizer) -> tuple[list[Inputs], bool]:
    """The rows to compare, each alone and without padding: texts of several lengths, and pairs of texts for a model with several
    token types, as the written tokenizer gives them. And whether ours gives the same ids."""
    from tokenizers import Tokenizer as Model

    config: Any = read.config
    longest = min(config.max_length, _LONGEST)
    tokenizer: Any = Model.from_file(str(folder / "tokenizer.json"))
    same = [tokenizer.encode(text).ids for text in TEXTS] == token_rows(read, ours)
    tokenizer.enable_truncation(longest)
    pairs: Any = _PAIRS if config.token_types >= 2 and longest > 4 else ()
    encoded = [*map(tokenizer.encode, _CHECKED), *(tokenizer.encode(*pair) for pair in pairs)]
    given = []
    for one in encoded:
        rows = {"input_ids": one.ids, "attention_mask": [1] * len(one.ids), "token_type_ids": one.type_ids}
        given.append({name: np.array([row]) for name, row in rows.items()})
    return given, same


def _compared(
    read: Checkpoint, params: nnx.State, rows: list[Inputs], graph: Path, outputs: list[str]
) -> dict[str, Any]:
    """The largest difference between the graph's outputs and the model's in float32, of rows alone and of all of them padded.

    Raises:
        UserError: it is above `LIMIT`.
    """
    import onnxruntime

    together = _padded(read, rows)
    ours = _ours(read, params, together)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = inputs_of(read.config)
    head = read.config.head.kind  # type: ignore[union-attr]
    is_choice, of_tokens = head == "choice", OF_TOKENS[head]

    def theirs_of(given: Inputs) -> dict[str, np.ndarray]:
        feed = {name: given[name][None] if is_choice else given[name] for name in names}
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
        return {name: one.reshape(-1, 1) if is_choice else one for name, one in found.items()}

    largest, relative = 0.0, 0.0
    for first, given in [(0, together), *enumerate(rows)]:
        valid = given["attention_mask"] > 0
        for name, theirs in theirs_of(given).items():
            own = ours[name][first : first + len(valid)]
            if name in of_tokens:
                # Outputs at padding are meaningless.
                own, theirs = own[:, : valid.shape[1]][valid], theirs[valid]
            difference = float(np.max(np.abs(own.astype(np.float64) - theirs)))
            largest = max(largest, difference)
            relative = max(relative, difference / max(1.0, float(np.max(np.abs(own)))))
    what = f"largest difference {largest:.1e}"
    if not relative <= LIMIT:
        raise UserError(
            f"{read.name}: the ONNX graph computes something else than the model ({what}; allowed: {LIMIT:g} of the largest "
            "output); please report it. --format hf writes the model for transformers"
        )
    lengths = sorted({row["input_ids"].shape[1] for row in rows})
    print(
        f"  verified with onnxruntime {onnxruntime.__version__}: {what}, in {len(rows)} texts of {lengths[0]} to "
        f"{lengths[-1]} tokens"
    )
    used = {name: version(name) for name in (*_PACKAGES, "jax")}
    return {"class": read.name, "texts": len(rows), "lengths": lengths, "largest_difference": largest, "versions": used}


def _padded(read: Checkpoint, rows: list[Inputs]) -> Inputs:
    """All rows as one batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    pad = read.data.get("pad_token_id")
    filler = {"input_ids": pad if isinstance(pad, int) and pad >= 0 else 0}

    def together(name: str) -> np.ndarray:
        padded = [
            np.pad(row[name][0], (0, longest - row[name].shape[1]), constant_values=filler.get(name, 0)) for row in rows
        ]
        return np.stack(padded)

    return {name: together(name) for name in rows[0]}


def _ours(read: Checkpoint, params: nnx.State, given: Inputs) -> dict[str, np.ndarray]:
    """The outputs of our model, by the graph's names."""
    config: Any = read.config
    alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
    graphdef = graphdef_of(functools.partial(make_model, config))

    @jax.jit
    def run(params: nnx.State, ids_BT: Any, valid_BT: Any, types_BT: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, params)
        options = {"segments_BT": valid_BT, "token_types_BT": types_BT}
        return model(ids_BT, **options), model.hidden(ids_BT, **options)[0]

    with use_mesh(alone, MeshConfig().rules), jax.default_matmul_precision("highest"):
        here = jax.device_put(params, jax.sharding.NamedSharding(alone, jax.sharding.PartitionSpec()))
        arrays = (given[name].astype(np.int32) for name in ("input_ids", "attention_mask", "token_type_ids"))
        out, hidden_BTD = run(here, *map(jnp.asarray, arrays))
    logits = np.asarray(out.logits)
    kind = config.head.kind
    if kind == "embedding":
        return {HIDDEN: np.asarray(hidden_BTD), VECTOR: logits}
    if kind == "answer":
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    if kind == "pretraining":
        return {"prediction_logits": logits, "seq_relationship_logits": np.asarray(out.pooled_logits)}
    return {"logits": logits}
