"""The tokens around a text, and the text that follows another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.data.tokenization.conventions import Conventions
from transformer.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_USUAL_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin▁of▁sentence|>")


def frame_of(model: tokenizers.Tokenizer, end_of_text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text.

    Args:
        model: encodes special tokens that are spelled out as text, before and after the call.
        end_of_text: a token of its vocabulary.
    """
    if model.post_processor is None:
        return (), ()
    # A text that has tokens for certain: the end of text, spelled out.
    model.encode_special_tokens = False
    text = model.encode(end_of_text, add_special_tokens=False)
    model.encode_special_tokens = True
    framed = model.post_process(text, None, add_special_tokens=True)
    own = [place for place, side in enumerate(framed.sequence_ids) if side is not None]
    if not own:
        return (), ()
    return tuple(framed.ids[: own[0]]), tuple(framed.ids[own[-1] + 1 :])


def begin_by_name(model: tokenizers.Tokenizer, conventions: Conventions) -> tuple[int, ...]:
    """The id of the token that begins a text, by its role or its usual names. Raises `UserError` if there is none."""
    names = (conventions.fields.get("bos_token"), *_USUAL_BEGINS)
    found = [model.token_to_id(name) for name in names if isinstance(name, str)]
    known = [id for id in found if id is not None]
    if not known:
        raise UserError(
            "data.tokenizer.begin_of_text: the vocabulary has no token that begins a text, such as "
            f"{', '.join(_USUAL_BEGINS[:3])}; set it to null"
        )
    return (known[0],)


def added_text(before: str, whole: str) -> str:
    """What a text has after the part that it has in common with the text before it."""
    both = zip(before, whole, strict=False)
    shorter = min(len(before), len(whole))
    return whole[next((place for place, (one, other) in enumerate(both) if one != other), shorter) :]
