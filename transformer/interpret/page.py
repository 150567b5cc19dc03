"""Attention maps as one HTML file that needs nothing else: no network, no other file, no server.

L layers, N query heads, T query position, S key position.

The file is `page.html` with `page.css`, `page.js` and the data written into it. Text from outside reaches the page as
JSON without a `<` in it, and is displayed as text; a policy in the page allows only `page.js` to run, and
nothing to be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import string
import zlib
from typing import Any

import numpy as np

from transformer.interpret.capture import AttentionMaps
from transformer.interpret.labels import visible
from transformer.interpret.rollout import entropy, mean_distance, rollout
from transformer.types import Float

OCTAVES = 32
"""Weights are stored down to 2^-32, in 65,534 equal steps of their logarithm: none is off by more than 0.02%."""
_STEPS = 65534


def page(maps: AttentionMaps) -> str:
    """The whole file.

    Raises:
        ValueError: weights that are not numbers from 0 to 1.
    """
    files = importlib.resources.files("transformer.interpret")
    template, style, script = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    # All placeholders at once, so that none in the data is substituted.
    return string.Template(template).substitute(
        title=html.escape(visible_line(maps.title)),
        policy=f"default-src 'none'; style-src '{hash_of(style)}'; script-src '{hash_of(script)}'; form-action 'none'",
        style=style,
        script=script,
        data=_json(data(maps)),
    )


def frame(maps: AttentionMaps, height: int = 720) -> str:
    """The page inside another one, such as a notebook, which it cannot read or change."""
    return (
        f'<iframe title="{html.escape(visible_line(maps.title))}" sandbox="allow-scripts" srcdoc="{html.escape(page(maps))}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def data(maps: AttentionMaps) -> dict[str, Any]:
    """The data that `page.js` reads."""
    weights_LNTS = maps.weights_LNTS
    return {
        "rows": list(map(visible, maps.rows)),
        "columns": list(map(visible, maps.columns)),
        "layers": list(maps.layers),
        "heads": list(maps.heads),
        "octaves": OCTAVES,
        "maps": [[encode(weights_TS) for weights_TS in weights_NTS] for weights_NTS in weights_LNTS],
        "entropy": entropy(weights_LNTS).tolist(),
        "distance": mean_distance(weights_LNTS).tolist() if maps.same_tokens else None,
        "rollout": [encode(rolled_TT) for rolled_TT in _rollout(maps)],
    }


def _rollout(maps: AttentionMaps) -> Float[np.ndarray, "l T S"]:
    """Rollout through the layers from the first on, up to the first one that was not captured; through none for two texts."""
    known = [index for index, layer in enumerate(maps.layers) if index == layer] if maps.same_tokens else []
    if not known:
        return maps.weights_LNTS[:0, 0] if maps.heads else np.zeros((0, len(maps.rows), len(maps.columns)), np.float32)
    return rollout(maps.weights_LNTS[: len(known)])


def encode(weights_TS: Float[np.ndarray, "T S"]) -> str:
    """A map in base64 of deflated 16-bit codes, first all their low bytes, then all their high ones.

    Code 0 is the weight 0; code c from 1 to 65,535 is 2^(OCTAVES · (c - 65535) / 65534).

    Raises:
        ValueError: weights that are not numbers from 0 to 1.
    """
    weights = np.asarray(weights_TS, np.float64)
    # A softmax in float32 may end a little above 1.
    if not ((weights >= 0) & (weights <= 1.001)).all():
        raise ValueError("a page shows weights from 0 to 1; some are not")
    logs = np.log2(weights, out=np.full_like(weights, -np.inf), where=weights > 0)
    codes = np.where(weights > 0, np.clip(np.rint(65535 + logs.clip(-OCTAVES) * _STEPS / OCTAVES), 1, 65535), 0)
    planes = codes.astype("<u2").reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(planes.tobytes())).decode("ascii")


def decode(text: str, num_rows: int, num_columns: int) -> Float[np.ndarray, "T S"]:
    """What `encode` wrote, as `page.js` reads it."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, num_rows, num_columns)
    codes = planes[0] + 256.0 * planes[1]
    return np.where(codes > 0, 2.0 ** (OCTAVES * (codes - 65535) / _STEPS), 0)


def visible_line(text: str) -> str:
    """A title: plain spaces stay, everything else is as in `visible`."""
    return visible(text.strip() or "Attention").replace(visible(" "), " ")


def _json(value: Any) -> str:
    """JSON that can neither end the element it is in, nor open another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def hash_of(text: str) -> str:
    """The source of a style or a script in a page's policy that allows this text alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
