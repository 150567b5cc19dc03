"""An encoder of transformers as an ONNX graph: its inputs and outputs by name, and the head of an embedding model after it.

B batch, T position, D embed, P pooled, O out, C choices of a question.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from transformer.errors import UserError, first_line
from transformer.huggingface.checkpoint import Checkpoint
from transformer.models.embedding_head import EmbeddingHeadConfig, LayerNormLayerConfig, NormalizeLayerConfig

HIDDEN, VECTOR = "last_hidden_state", "sentence_embedding"
OUTPUTS: dict[str, tuple[str, ...]] = {
    "classification": ("logits",), "tokens": ("logits",), "choice": ("logits",), "masked": ("logits",),
    "replaced": ("logits",), "answer": ("start_logits", "end_logits"),
    "pretraining": ("prediction_logits", "seq_relationship_logits"), "embedding": (HIDDEN, VECTOR),
}  # fmt: skip
"""Head → names of the graph's outputs, in the order in which transformers returns them."""
OF_TOKENS: dict[str, tuple[str, ...]] = {
    "classification": (), "choice": (), "tokens": ("logits",), "masked": ("logits",), "replaced": ("logits",),
    "answer": ("start_logits", "end_logits"), "pretraining": ("prediction_logits",), "embedding": (HIDDEN,),
}  # fmt: skip
"""Head → those of its outputs that have numbers for each token."""
FOLDER, FILE, WEIGHTS = "onnx", "model.onnx", "model.onnx_data"
"""Where sentence-transformers, optimum and transformers.js look; the weights have a file of their own if they are large."""
_SINGLE_LIMIT = 1_900_000_000
"""Bytes of weights up to which the graph and they are one file; the format's limit is 2 GiB."""


def inputs_of(config: Any) -> list[str]:
    """The names of the graph's inputs: token_type_ids only if there are several types, as the tokenizer's files say too."""
    return ["input_ids", "attention_mask", *(["token_type_ids"] if config.token_types >= 2 else [])]


def outputs_of(config: Any, *, vectors: bool = True) -> list[str]:
    """The names of the graph's outputs.

    Args:
        vectors: of an embedding model, whether the vectors of texts are among them.
    """
    return [name for name in OUTPUTS[config.head.kind] if vectors or name != VECTOR]


def write_graph(folder: Path, read: Checkpoint, outputs: list[str]) -> Path:
    """Write a checkpoint's graph into a folder; the file.

    The batch and the length, and for a head of choices their number, may be any.

    Args:
        outputs: some of `outputs_of`.

    Raises:
        UserError: transformers does not load it, or torch cannot write its graph.
        OSError: any error while writing.
    """
    import torch
    import transformers
    from onnxscript import ir
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    transformers.utils.logging.disable_progress_bar()
    names = inputs_of(read.config)
    with _quietly():
        try:
            kind = getattr(transformers, read.name)
            theirs = kind.from_pretrained(read.folder, dtype=torch.float32, attn_implementation="eager").eval()
            with torch.no_grad():
                program: Any = torch.onnx.export(
                    _module(theirs, read, names, outputs), kwargs=_example(read, names), dynamo=True, verbose=False,
                    input_names=names, output_names=outputs,
                    dynamic_shapes={name: dict(enumerate(_axes(read.config))) for name in names},
                )  # fmt: skip
        except Exception as error:  # torch and transformers may fail for their own reasons
            raise UserError(
                f"{read.name}: torch {torch.__version__} with transformers {transformers.__version__} cannot write its "
                f"graph: {first_line(error)}; --format hf writes the model for transformers"
            ) from None
    folder.mkdir(exist_ok=True)
    size = sum(tensor.nbytes for tensor in read.tensors.values())
    # torch notes which lines of Python each operation comes from, with the paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    ir.save(program.model, folder / FILE, external_data=WEIGHTS if size > _SINGLE_LIMIT else None)
    return folder / FILE


def _axes(config: Any) -> tuple[str, ...]:
    """The names of the axes of an input."""
    return ("batch_size", *(["num_choices"] if config.head.kind == "choice" else []), "sequence_length")


def _example(read: Checkpoint, names: list[str]) -> dict[str, Any]:
    """Inputs to follow the model's computation on. No size is 1, and some tokens are padding: neither is taken for a rule."""
    import torch

    length = max(min(8, read.config.max_length), 2)
    ids = torch.randint(min(5, read.config.vocab_size - 1), read.config.vocab_size, (2, length))
    if read.config.head.kind == "choice":  # type: ignore[union-attr]
        ids = torch.stack([ids, ids.flip(0), ids], 1)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[-1, ..., length // 2 :] = 0
    types[..., length // 2 :] = 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: given[name] for name in names}


def _module(theirs: Any, read: Checkpoint, names: list[str], outputs: list[str]) -> Any:
    """A module of torch from the inputs to the outputs, as a tuple."""
    import torch

    head = _vector_head(read) if VECTOR in outputs else None

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            given = dict(zip(names, (input_ids, attention_mask, token_type_ids), strict=False))
            found = self.model(**given).to_tuple()[: len(outputs)]
            return found if head is None else (found[0], head(found[0], attention_mask))

    return Graph().eval()


def _vector_head(read: Checkpoint) -> Callable[[Any, Any], Any]:
    """From hidden states [B, T, D] and a mask [B, T] to vectors [B, O]: the modules after the Transformer, with the checkpoint's
    tensors."""
    import torch

    head: Any = read.config.head  # type: ignore[union-attr]
    assert isinstance(head, EmbeddingHeadConfig)
    tensors = {
        rule.ours[0]: torch.tensor(np.asarray(read.tensors[rule.theirs], np.float32))
        for rule in read.tables.rules
        if "/" in rule.theirs
    }
    activations: dict[str, Callable[[Any], Any]] = {
        "identity": lambda x: x, "tanh": torch.tanh, "relu": torch.relu, "gelu_exact": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid,
    }  # fmt: skip

    def vectors(hidden_BTD: Any, mask_BT: Any) -> Any:
        x = torch.cat([_pooled(hidden_BTD, mask_BT, how) for how in head.poolings], -1)
        for number, layer in enumerate(head.layers):
            start = f"embedding_head.layer_{number}"
            if isinstance(layer, NormalizeLayerConfig):
                x = torch.nn.functional.normalize(x, dim=-1)
            elif isinstance(layer, LayerNormLayerConfig):
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{start}.scale"], tensors[f"{start}.bias"])
            else:
                y = torch.nn.functional.linear(
                    x, tensors[f"{start}.linear.kernel"], tensors.get(f"{start}.linear.bias")
                )
                y = activations[layer.activation](y)
                residual = tensors.get(f"{start}.residual.kernel")
                x = y + (x if residual is None else x @ residual.T) if layer.residual else y
        return x

    return vectors


def _pooled(hidden_BTD: Any, mask_BT: Any, how: str) -> Any:
    """One vector per row [B, D]: see `EmbeddingHeadConfig.pooling`."""
    import torch

    if how == "cls":
        return hidden_BTD[:, 0]
    if how == "max":
        return hidden_BTD.masked_fill(mask_BT[..., None] == 0, -torch.inf).amax(1)
    places_T = torch.arange(1, hidden_BTD.shape[1] + 1)
    weights_BT = mask_BT.to(hidden_BTD.dtype)
    if how == "last":
        numbered_BT = places_T * mask_BT
        weights_BT = (numbered_BT == numbered_BT.amax(1, keepdim=True)).to(hidden_BTD.dtype)
    elif how == "weighted_mean":
        weights_BT = weights_BT * places_T
    sums_BD = (hidden_BTD * weights_BT[..., None]).sum(1)
    total_B1 = weights_BT.sum(1, keepdim=True).clamp(min=1)
    return sums_BD / (total_B1.sqrt() if how == "mean_sqrt_len" else total_B1)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what torch says about its own parts from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
