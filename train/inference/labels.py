"""Labels of tokens for display."""

from __future__ import annotations

import numpy as np

from train.data.tokenization.tokenizer import SEP, Tokenizer


def labels(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text of each token alone; a part of a character is shown as bytes, such as \\xe4."""
    # A token's own name comes before the general one, such as [CLS].
    names = {id: name for name, id in reversed(tokenizer.special_ids.items())}
    if tokenizer.special(SEP) != tokenizer.end_of_text:
        names.pop(tokenizer.end_of_text, None)

    def label(token: int) -> str:
        if name := names.get(token):
            return name
        data = tokenizer.token_bytes(token)
        return tokenizer.decode([token]) if data is None else data.decode("utf-8", "backslashreplace")

    return [label(int(token)) for token in ids]
