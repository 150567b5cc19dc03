"""The attention weights of one text, in selected layers and heads, whatever kernel the model runs.

L layers, N query heads, T query position, S key position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.models.bert import Bert
from transformer.models.config import StackConfig
from transformer.models.gpt import GPT
from transformer.types import Float

MAX_BYTES = 2 << 30
"""The default limit of the memory that weights may need."""


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention weights with labels. In a notebook, the object shows itself as a page.

    Rows are queries and columns are keys: the same tokens in self-attention; words of two languages in a translator.

    Raises:
        ValueError: weights whose shape does not match the labels.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights_LNTS: Float[np.ndarray, "L N T S"]
    title: str = "Attention"
    same_tokens: bool = True
    """Whether rows and columns are the same tokens, so that distance and rollout mean something."""

    def __post_init__(self) -> None:
        named = (len(self.layers), len(self.heads), len(self.rows), len(self.columns))
        if self.weights_LNTS.shape != named:
            raise ValueError(
                f"weights have shape {self.weights_LNTS.shape}; layers, heads, rows and columns make {named}"
            )
        if self.same_tokens and self.rows != self.columns:
            raise ValueError("rows and columns differ: set same_tokens=False")

    def save(self, path: str | Path) -> Path:
        """Write the page, one file that needs nothing else. Raises `OSError`."""
        from transformer.interpret.page import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from transformer.interpret.page import frame

        return frame(self)


def bytes_needed(num_layers: int, num_heads: int, num_queries: int, num_keys: int) -> int:
    """Memory that capturing needs in addition to the model: each layer's weights in float32, both as they are computed and
    gathered, and the softmax of one layer in progress.
    """
    return 4 * num_queries * num_keys * num_heads * (2 * num_layers + 4)


def attention_maps(
    model: GPT | Bert,
    tokens: Sequence[int] | np.ndarray,
    labels: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    title: str = "Attention",
    max_bytes: int = MAX_BYTES,
) -> AttentionMaps:
    """Run the model over one text and keep the weights of the chosen layers and heads; none are created for the others.

    Args:
        tokens: the text's token ids.
        labels: the name of each token; its id by default.
        layers, heads: from 0; by default all heads, and all layers whose weights are distributions.
        max_bytes: the most memory that the weights may need.

    Raises:
        UserError: a layer or head that does not exist, a layer whose weights are not distributions, no tokens, or weights
            beyond `max_bytes`: nothing is computed then.
        ValueError: more or fewer labels than tokens.
    """
    c = model.config
    chosen_layers = choose_layers("layer", layers, c)
    num_heads = heads_of(c, chosen_layers)
    chosen_heads = choose("head", heads, num_heads)
    ids = np.asarray(tokens, np.int32)
    if not ids.size:
        raise UserError("there is nothing to attend to: the text has no tokens")
    names = tuple(map(str, ids.tolist())) if labels is None else tuple(labels)
    if len(names) != ids.size:
        raise ValueError(f"{len(names)} labels for {ids.size} tokens")
    check_memory(len(chosen_layers), len(chosen_heads), ids.size, ids.size, max_bytes)
    graphdef, params = nnx.split(model)
    everything = len(chosen_layers) == c.num_layers and len(chosen_heads) == num_heads
    choice = everything or (chosen_layers, chosen_heads)

    @jax.jit
    def weights_of(params: nnx.State, tokens_BT: jax.Array) -> jax.Array | None:
        # The logits are not asked for, so neither they nor the layers above the last chosen one are computed.
        return nnx.merge(graphdef, params)(tokens_BT, return_weights=choice).weights

    weights = np.asarray(weights_of(params, jnp.asarray(ids)[None]))[:, 0]
    return AttentionMaps(names, names, chosen_layers, chosen_heads, weights, title)


def choose_layers(name: str, layers: Sequence[int] | None, config: StackConfig) -> tuple[int, ...]:
    """The layers that can be shown: those asked for, or all whose weights are distributions.

    Args:
        name: what the layers are called in error messages.

    Raises:
        UserError: a layer that does not exist, or whose weights are not distributions; or no layer's are.
    """
    mixers = config.mixers()
    shown = [layer for layer, mixer in enumerate(mixers) if mixer.has_distributions]
    if not shown:
        kinds = " and ".join(dict.fromkeys(mixer.kind for mixer in mixers))
        raise UserError(f"this model cannot be shown: weights of {kinds} attention are not distributions")
    chosen = choose(name, shown if layers is None else layers, config.num_layers)
    for layer in chosen:
        if layer not in shown:
            raise UserError(
                f"{name}s: got {layer}; weights of {mixers[layer].kind} attention are not distributions; allowed: "
                f"{', '.join(map(str, shown))}"
            )
    return chosen


def heads_of(config: StackConfig, layers: Sequence[int]) -> int:
    """How many query heads each of these layers has. Raises `UserError` unless it is the same number in all."""
    mixers = config.mixers()
    counts = {mixers[layer].num_heads for layer in layers}
    if len(counts) > 1:
        raise UserError(
            f"layers: those chosen have {' and '.join(map(str, sorted(counts)))} heads; choose layers of one kind"
        )
    return counts.pop()


def choose(what: str, wanted: Sequence[int] | None, number: int) -> tuple[int, ...]:
    """The requested layers or heads, each once, in order. Raises `UserError` for none, or one that does not exist."""
    chosen = tuple(range(number)) if wanted is None else tuple(sorted(set(wanted)))
    wrong = [index for index in chosen if not 0 <= index < number]
    if wrong or not chosen:
        given = wrong[0] if wrong else "none"
        raise UserError(f"{what}s: got {given}; allowed: 0 to {number - 1}")
    return chosen


def check_memory(num_layers: int, num_heads: int, num_queries: int, num_keys: int, max_bytes: int = MAX_BYTES) -> None:
    """Raise a `UserError` that reports what would fit if the weights need more than `max_bytes`."""
    needed = bytes_needed(num_layers, num_heads, num_queries, num_keys)
    if needed <= max_bytes:
        return

    def fitting(most: int, needed: Callable[[int], int]) -> int:
        return max((count for count in range(1, most + 1) if needed(count) <= max_bytes), default=0)

    fewer_layers = fitting(num_layers, lambda layers: bytes_needed(layers, num_heads, num_queries, num_keys))
    fewer_heads = fitting(num_heads, lambda heads: bytes_needed(num_layers, heads, num_queries, num_keys))
    options = []
    if fewer_layers:
        options.append(f"{_count(fewer_layers, 'layer')} of {_count(num_heads, 'head')}")
    if fewer_heads:
        options.append(f"{_count(num_layers, 'layer')} of {_count(fewer_heads, 'head')}")
    one = bytes_needed(1, 1, num_queries, num_keys)
    fits = f"{' or '.join(options)} would fit" if options else f"one head of one layer needs {readable(one)}"
    raise UserError(
        f"the attention weights of {_count(num_layers, 'layer')}, {_count(num_heads, 'head')} and {num_queries:,} × "
        f"{num_keys:,} tokens need {readable(needed)}, above the limit of {readable(max_bytes)}; {fits}"
    )


def readable(count: int) -> str:
    """A number of bytes in a readable unit."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
