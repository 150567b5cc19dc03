"""Twenty checkpoints of many architectures, each with another tokenizer: ids, greedy texts and streams are those of transformers,
before and after import, export and import."""

from __future__ import annotations

import pytest

from manyheads.run import Run
from tests.huggingface.peers import DECODERS, peer, saved
from tests.huggingface.vocabularies import KINDS, save_tokenizer, tokenizer
from train.data.tokenization.stream import StreamDecoder
from train.huggingface.export import export
from train.huggingface.import_checkpoint import import_checkpoint
from train.run.run_files import load_run

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.torch]

NAMES = [name for name, (kind, _) in DECODERS.items() if kind.endswith(("ForCausalLM", "LMHeadModel"))]
# The number of kinds of tokenizers divides neither step, so that each architecture meets several.
CASES = [(NAMES[number * 5 % len(NAMES)], KINDS[number % len(KINDS)], number) for number in range(20)]
PROMPTS = ["the king of the", "hello  world", "a <s> king<|eot|>"]
LENGTH = 12


def options_of(number):
    """How the tokenizer begins a text, and whether it has tokens that the model lacks."""
    added = {"pad_token": "<pad>", "extra_special_tokens": ["<|tool|>"]} if number % 3 == 0 else {}
    return added | ({"add_bos_token": True, "add_eos_token": False} if number % 4 == 2 else {})


def texts_of_transformers(folder):
    """The ids, special tokens read as such, and the greedy text, of each prompt; and its ids where they are text."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # The one for the architecture may take another kind of vocabulary for its own.
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for prompt in PROMPTS:
        ids = theirs(prompt).input_ids
        out = model.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)[0].tolist()
        found.append((ids, out, theirs.decode(out, skip_special_tokens=True)))
    return found


def texts_of_ours(run):
    loaded = load_run(run)
    model, found = Run(run, loaded), []
    for prompt in PROMPTS:
        ids = loaded.tokenizer.prompt(prompt, special=True)
        new = model.generate(prompt, max_tokens=LENGTH, temperature=0.0, special=True)
        found.append((ids, loaded.tokenizer.decode(ids) + new))
    return loaded, found


@pytest.mark.parametrize(("name", "kind", "number"), CASES)
def test_the_same_ids_texts_and_streams(name, kind, number, tmp_path):
    made = tokenizer(kind)
    class_name, fields = DECODERS[name]
    ends = [2, 3] if number % 2 else 2
    about = {"vocab_size": made.get_vocab_size(), "bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0}
    model = peer(class_name, {name: value for name, value in fields.items() if name not in about}, **about)
    model.generation_config.eos_token_id = ends
    saved(model, tmp_path / "hf")
    save_tokenizer(made, tmp_path / "hf", **options_of(number))
    expected = texts_of_transformers(tmp_path / "hf")

    first = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run", verify=False)
    out = export(first, tmp_path / "out", verify=False)
    assert texts_of_transformers(out) == expected
    for run in (first, import_checkpoint(str(out), tmp_path / "again", verify=False)):
        loaded, found = texts_of_ours(run)
        for (ids, whole, text), (own_ids, own_text) in zip(expected, found, strict=True):
            assert own_ids == ids and own_text == text
            decoder = StreamDecoder(loaded.tokenizer, ids)
            new = [id for id in whole[len(ids) :] if id not in loaded.tokenizer.ends]
            assert (
                loaded.tokenizer.decode(ids) + "".join([*map(decoder.push, ([one] for one in new)), decoder.flush()])
                == text
            )
