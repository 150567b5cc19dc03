"""Verification of an import: the same inputs through both frameworks, and the differences between the outputs.

B batch, T position, S source position.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.huggingface.sentence_modules import vectors_by_hand
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from transformer.errors import UserError, first_line
from transformer.functional import graphdef_of
from transformer.generation.beam import BeamSearch
from transformer.generation.ends import before_end
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.generation.translator import Translator
from transformer.huggingface.checkpoint import Checkpoint
from transformer.huggingface.mapping import to_theirs
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import EncoderDecoderConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig

FILE = "parity.json"
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1843, Ada Lovelace wrote about what a machine of numbers could do, and what it could not.",
    "def attend(q, k, v): return softmax(q @ k.T / sqrt(d)) @ v",
)
_LENGTH, _ROWS, _NEW = 24, 3, 12
_LIMIT = 1e-3
"""Maximum relative error between the two models in float32."""


def report(read: Checkpoint, params: nnx.State, tokenizer: Tokenizer | None, *, required: bool) -> dict[str, Any]:
    """Compare both models; the result is plain data.

    Args:
        required: both frameworks must be installed; else a round trip is compared bit by bit if one is missing.

    Raises:
        UserError: torch or transformers is required and not installed, or the two models differ.
    """
    installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if required and not installed:
        raise UserError("verify: it needs torch and transformers; install them, or leave it out")
    result: dict[str, Any] = {"class": read.name, "round_trip_bit_for_bit": _same_bits(read, params)}
    if not result["round_trip_bit_for_bit"]:
        raise UserError(f"{read.folder}: its tensors change in a round trip; please report this checkpoint")
    if installed:
        # Both run on one device: a mesh may have more parts than there are rows.
        alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
        with use_mesh(alone, MeshConfig().rules):
            here = jax.device_put(params, jax.sharding.NamedSharding(alone, jax.sharding.PartitionSpec()))
            result |= _compared(read, here, tokenizer)
    return result


def line(result: dict[str, Any]) -> str:
    """The result as a line of text."""
    if "inputs" not in result:
        return "  verified: every tensor survives a round trip bit for bit (torch and transformers are not installed to compare)"
    worst = _worst(result)
    greedy = {None: "", True: "; the same greedy tokens"}[result["greedy_tokens_equal"]]
    differs = result["token_ids_equal"] is False
    other_ids = "\n  note: transformers' tokenizer gives other ids for the same text" if differs else ""
    return (
        f"  verified against transformers {result['versions']['transformers']}: max relative error "
        f"{worst['relative']:.1e}, max absolute error {worst['largest']:.1e}{greedy}{other_ids}"
    )


def _same_bits(read: Checkpoint, params: nnx.State) -> bool:
    flat = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    theirs = to_theirs(read.tables, flat, np.float32)
    skipped = {rule.theirs for rule in read.tables.rules if getattr(rule.layout, "skipped", 0)}
    # In the file's type, so that a narrow type is rounded only once.
    return all(
        name in skipped or np.array_equal(tensor.astype(read.tensors[name].dtype), read.tensors[name])
        for name, tensor in theirs
    )


def _worst(result: dict[str, Any]) -> dict[str, float]:
    return max((one for each in result["inputs"].values() for one in each.values()), key=lambda one: one["relative"])


def _compared(read: Checkpoint, params: nnx.State, tokenizer: Tokenizer | None) -> dict[str, Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, read.name)
    try:
        theirs = kind.from_pretrained(read.folder, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:  # transformers may fail for its own reasons
        raise UserError(
            f"{read.folder}: transformers {transformers.__version__} does not load it: {first_line(error)}; use "
            "verify=False (--no-verify) to skip the comparison"
        ) from None
    model = nnx.merge(graphdef_of(functools.partial(make_model, read.config)), params)
    compare = {"gpt": _decoder, "bert": _encoder}.get(read.config.family, _encoder_decoder)
    found: dict[str, Any] = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}
    rows = {"random": _random(read, tokenizer)}
    if tokenizer is not None:
        rows["text"] = _texts(read, tokenizer)
    with torch.no_grad():
        found["inputs"] = {name: compare(read, model, theirs, *batch) for name, batch in rows.items()}
        found["greedy_tokens_equal"] = None
        found["token_ids_equal"] = None if tokenizer is None else _same_ids(read, tokenizer)
        if tokenizer is not None and not isinstance(read.config, BertConfig) and hasattr(theirs, "generate"):
            found["greedy_tokens_equal"] = _same_greedy(read, params, theirs, tokenizer)
    worst = _worst(found)
    if not worst["relative"] <= _LIMIT or found["greedy_tokens_equal"] is False:
        what = (
            f"max relative error {worst['relative']:.1e}"
            if not worst["relative"] <= _LIMIT
            else "different greedy tokens"
        )
        raise UserError(f"{read.folder}: its outputs differ from those of transformers ({what}); please report it")
    return found


def _random(read: Checkpoint, tokenizer: Tokenizer | None) -> tuple[np.ndarray, np.ndarray]:
    """Random ids without special tokens, and their positions; the last row is half padding."""
    special = {value for key, value in read.data.items() if key.endswith("token_id") and isinstance(value, int)}
    special |= set() if tokenizer is None else set(tokenizer.special_ids.values())
    usual = np.setdiff1d(np.arange(read.config.vocab_size), list(special))
    length = min(_LENGTH, read.config.max_length)
    ids = np.random.default_rng(0).choice(usual, (_ROWS, length)).astype(np.int32)
    valid = np.ones_like(ids)
    valid[-1, (length + 1) // 2 :] = 0
    return ids, valid


def token_rows(read: Checkpoint, tokenizer: Tokenizer) -> list[list[int]]:
    """`TEXTS` as token ids, with the tokens around each that the model reads."""
    if isinstance(read.config, GPTConfig):
        return [tokenizer.prompt(text) for text in TEXTS]
    rows = [tokenizer.encode(text).tolist() for text in TEXTS]
    if isinstance(read.config, BertConfig):
        cls, sep = (tokenizer.special(name) for name in (CLS, SEP))
        return [[*([] if cls is None else [cls]), *row, *([] if sep is None else [sep])] for row in rows]
    return [[*row, tokenizer.end_of_text] for row in rows]


def _texts(read: Checkpoint, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """`token_rows` in one array, padded with the model's padding token."""
    rows = token_rows(read, tokenizer)
    length = min(max(map(len, rows)), read.config.max_length)
    pad = read.data.get("pad_token_id")
    ids = np.full((len(rows), length), pad if isinstance(pad, int) and pad >= 0 else 0, np.int32)
    valid = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens[:length]
        valid[row, : len(tokens)] = 1
    return ids, valid


def _same_ids(read: Checkpoint, tokenizer: Tokenizer) -> bool | None:
    """Whether the tokenizer of the checkpoint's folder gives the same ids, special tokens included; None without one."""
    import transformers

    if not (read.folder / "tokenizer_config.json").exists():
        # transformers would guess its class.
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(read.folder)
            return [theirs(text).input_ids for text in TEXTS] == token_rows(read, tokenizer)
        except Exception:  # transformers may fail for its own reasons
            return None


def _encoder(read: Checkpoint, model: Any, theirs: Any, ids: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    head = read.config.head.kind  # type: ignore[union-attr]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(valid)}
    if head == "choice":
        inputs = {name: value[None] for name, value in inputs.items()}
    out = theirs(**inputs, output_hidden_states=True)
    hidden, _ = model.hidden(jnp.asarray(ids), segments_BT=jnp.asarray(valid))
    ours = model(jnp.asarray(ids), segments_BT=jnp.asarray(valid))
    # The last of their hidden states is the body's output; outputs at padding are meaningless.
    last = out.last_hidden_state if read.name in read.architecture.bare else out.hidden_states[-1]
    real = valid > 0
    found = {"hidden": _difference(np.asarray(hidden)[real], last.numpy().reshape(*valid.shape, -1)[real])}
    logits = np.asarray(ours.logits)
    if head in ("masked", "pretraining", "tokens", "replaced"):
        other = (out.prediction_logits if head == "pretraining" else out.logits).numpy()
        found["logits"] = _difference(logits[real], other[real])
        if head == "masked":
            found["loss"] = _difference(_loss(logits[real], ids[real]), _loss(other[real], ids[real]))
    elif head == "answer":
        other = np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
        found["logits"] = _difference(logits[real], other[real])
    elif head in ("classification", "choice"):
        found["logits"] = _difference(logits.reshape(out.logits.shape), out.logits.numpy())
    if head == "pretraining":
        # ALBERT's second head predicts the order of two sentences.
        second = out.sop_logits if "sop_logits" in out else out.seq_relationship_logits
        found["pooled"] = _difference(np.asarray(ours.pooled_logits), second.numpy())
    if head == "embedding" and getattr(out, "pooler_output", None) is not None and ours.pooled_logits is not None:
        found["pooled"] = _difference(np.asarray(ours.pooled_logits), out.pooler_output.numpy())
    if head == "embedding":
        found["vectors"] = _difference(logits, vectors_by_hand(read, last.numpy(), valid))
    return found


def _decoder(read: Checkpoint, model: Any, theirs: Any, ids: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(valid)}
    out = theirs(**inputs, output_hidden_states=True)
    hidden, _ = model.hidden(jnp.asarray(ids), segments_BT=jnp.asarray(valid))
    real = valid > 0
    found = {"hidden": _difference(np.asarray(hidden)[real], out.hidden_states[-1].numpy()[real])}
    if (other := getattr(out, "logits", None)) is not None:
        logits, other = np.asarray(model.logits(hidden)), other.numpy()
        found["logits"] = _difference(logits[real], other[real])
        follows = real[:, 1:]
        targets = ids[:, 1:][follows]
        found["loss"] = _difference(_loss(logits[:, :-1][follows], targets), _loss(other[:, :-1][follows], targets))
    return found


def _encoder_decoder(read: Checkpoint, model: Any, theirs: Any, ids: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    target = np.roll(ids, 1, axis=1)
    target[:, 0] = read.config.start_token  # type: ignore[union-attr]
    out = theirs(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid), decoder_input_ids=torch.tensor(target),
        decoder_attention_mask=torch.tensor(valid), output_hidden_states=True,
    )  # fmt: skip
    ours = model(
        jnp.asarray(ids), jnp.asarray(target), source_segments_BS=jnp.asarray(valid), segments_BT=jnp.asarray(valid)
    )
    memory = model.encode(jnp.asarray(ids), source_segments_BS=jnp.asarray(valid))
    real = valid > 0
    logits, other = np.asarray(ours.logits)[real], out.logits.numpy()[real]
    return {
        "hidden": _difference(np.asarray(memory.hidden)[real], out.encoder_last_hidden_state.numpy()[real]),
        "logits": _difference(logits, other),
        "loss": _difference(_loss(logits, ids[real]), _loss(other, ids[real])),
    }


def _same_greedy(read: Checkpoint, params: nnx.State, theirs: Any, tokenizer: Tokenizer) -> bool | None:
    """Whether both generate the same continuations, or translations, of `TEXTS`; None if the context is too short to
    generate in, or transformers fails."""
    import torch
    import transformers

    end, ends, config = tokenizer.end_of_text, tokenizer.ends, read.config
    if config.max_length <= _NEW:
        return None

    def written_there(ids: list[int]) -> list[int]:
        return theirs.generate(torch.tensor([ids]), generation_config=how)[0].tolist()

    never = None
    if isinstance(config, EncoderDecoderConfig) and config.written_tokens < config.vocab_size:
        never = [[config.written_tokens]]
    how = transformers.GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, num_beams=1, eos_token_id=list(ends), pad_token_id=end,
        decoder_start_token_id=getattr(read.config, "start_token", None), bad_words_ids=never,
    )  # fmt: skip
    theirs.generation_config = how
    for text in TEXTS:
        if isinstance(read.config, GPTConfig):
            ids = tokenizer.prompt(text)[: min(8, read.config.max_length - _NEW)]
            other = written_there(ids)[len(ids) :]
            (chunk,) = Generator(read.config, end_of_text=ends).generate(
                params, [ids], max_tokens=_NEW, sampling=Sampling(temperature=0.0)
            )
            ours = chunk[0].tolist()
        else:
            ids = [*tokenizer.encode(text).tolist(), end][: read.config.max_length]
            try:
                other = written_there(ids)[1:]
            except IndexError:
                # For a decoder that is deeper than its encoder.
                return None
            translator = Translator(
                lambda rngs: make_model(config, rngs), start_token=end, end_of_text=ends,
                num_tokens=None if never is None else never[0][0],
            )  # fmt: skip
            best = translator.translate(params, [ids], max_tokens=_NEW, search=BeamSearch(beams=1))[0]
            ours = list(best[0].tokens) if best else []
        if before_end(ours, ends) != before_end(other, ends):
            return False
    return True


def _loss(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    nll = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[:, None].astype(np.int64), 1)[:, 0]
    return np.asarray(nll.mean())


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The maximum absolute error, and its ratio to the reference's largest value."""
    largest = float(np.max(np.abs(ours.astype(np.float64) - theirs)))
    return {"largest": largest, "relative": largest / max(float(np.max(np.abs(theirs))), 1e-12)}
