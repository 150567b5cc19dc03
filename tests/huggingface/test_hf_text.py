"""Text in and out as a checkpoint's tokenizer defines them, against transformers: prompts, end tokens, continuations, streams,
and what survives an export."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from manyheads.run import Run
from tests.huggingface.vocabularies import CHAT, KINDS, llama, save_tokenizer, tokenizer
from train.commands.cli import main
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource
from train.data.tokenization.stream import StreamDecoder
from train.data.tokenization.tokenizer import TokenizerConfig
from train.data.tokenization.vocabulary import make_tokenizer
from train.huggingface.export import export
from train.huggingface.import_checkpoint import import_checkpoint
from train.inference.generate import sampling_of
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.generation.sampling import Sampling

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.torch]
PROMPTS = ["the king of the", "hello", "hello  world", "a <s> b</s>", "naïve Ԓ 王"]
OPTIONS = {"sentencepiece_unigram": {"add_bos_token": True, "add_eos_token": False}}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A folder of transformers, its model, its tokenizer, and its import."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    made = tokenizer(request.param)
    save_tokenizer(made, folder / "hf", **OPTIONS.get(request.param, {}))
    model = llama(folder / "hf", made.get_vocab_size() + 3, ends=[2, 3])
    run = import_checkpoint(str(folder / "hf"), folder / "run", verify=False)
    return folder, model, AutoTokenizer.from_pretrained(folder / "hf"), load_run(run)


def greedy(model, ids, count, **options):
    """What transformers writes after the ids."""
    import torch

    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0,
        suppress_tokens=list(range(model.config.vocab_size - 3, model.config.vocab_size)), **options,
    )  # fmt: skip
    return out[0].tolist()


def test_prompts_have_the_ids_of_transformers(checkpoint):
    _, _, theirs, loaded = checkpoint
    for prompt in PROMPTS:
        # A unigram model of theirs takes a name for the token even so.
        if "<s>" not in prompt or type(loaded.tokenizer.model.model).__name__ != "Unigram":
            expected = theirs(prompt, split_special_tokens=True).input_ids
            assert loaded.tokenizer.prompt(prompt) == expected, prompt
    begins = [1] if theirs("a").input_ids[0] == 1 else []
    assert list(loaded.tokenizer.frame[0]) == list(loaded.tokenizer.begin) == begins


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(checkpoint):
    _, _, theirs, loaded = checkpoint
    text = "<s>hi<|eot|>"
    assert not {1, 2, 3} & set(loaded.tokenizer.encode(text).tolist())
    spelled = loaded.tokenizer.prompt(text, special=True)
    # The frame is not added again.
    assert spelled == theirs(text, add_special_tokens=False).input_ids and spelled[0] == 1 and spelled[-1] == 3
    assert loaded.tokenizer.prompt("hi<|eot|>", special=True) == theirs("hi<|eot|>").input_ids


def test_text_goes_on_from_a_prompt_as_the_whole_decodes(checkpoint):
    folder, model, theirs, loaded = checkpoint
    run = Run(folder / "run", loaded)
    for prompt in PROMPTS[:2]:
        ids = theirs(prompt).input_ids
        whole = theirs.decode(greedy(model, ids, 10), skip_special_tokens=True)
        assert prompt + run.generate(prompt, max_tokens=10, temperature=0.0) == whole


def test_streamed_pieces_join_to_the_text_of_the_whole(checkpoint):
    _, _, theirs, loaded = checkpoint
    rng = np.random.default_rng(0)
    for number in range(60):
        prompt = loaded.tokenizer.prompt(PROMPTS[number % len(PROMPTS)])
        # Half of them are single bytes, most of which make no character.
        high = len(theirs) if number % 2 else 260
        new = rng.integers(0, high, rng.integers(1, 24)).tolist()
        decoder, pieces = StreamDecoder(loaded.tokenizer, prompt), []
        for place in range(0, len(new), size := int(rng.integers(1, 5))):
            pieces.append(decoder.push(new[place : place + size]))
        streamed = "".join([*pieces, decoder.flush()])
        assert streamed == loaded.tokenizer.continuation(prompt, new)
        before, whole = (theirs.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
        if whole.startswith(before):
            assert before + streamed == whole


def test_malformed_bytes_are_neither_lost_nor_shown_twice():
    """Bytes that make a character until another byte follows them."""
    from train.data.tokenization.tokenizer import SubwordTokenizer

    own = SubwordTokenizer(tokenizer("sentencepiece_bpe"), "</s>")
    new = [own.model.token_to_id(name) for name in ("<0xD4>", "<0x92>", "<0xF8>", "▁king", "<0xD4>")]
    decoder = StreamDecoder(own, own.prompt("the"))
    pieces = [decoder.push([token]) for token in new]
    assert pieces == ["", "", "", "\ufffd\ufffd\ufffd king", ""] and decoder.flush() == "\ufffd"


def test_generation_stops_at_any_of_several_end_tokens(tmp_path, capsys):
    import torch
    from transformers import LlamaForCausalLM

    made = tokenizer("sentencepiece_bpe")
    save_tokenizer(made, tmp_path / "hf")
    model = llama(tmp_path / "hf", made.get_vocab_size(), ends=[2, 3])
    ids = [1, *made.encode("the king", add_special_tokens=False).ids]
    new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    fourth = int(new[0, len(ids) + 3])
    for end in (2, 3):
        with torch.no_grad():
            model.lm_head.weight[2:4] = 0.0
            model.lm_head.weight[end] = model.lm_head.weight[fourth] * 1.05
        model.save_pretrained(tmp_path / "hf")
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
        whole = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
        assert whole[-1] == end
        run = import_checkpoint(str(tmp_path / "hf"), tmp_path / f"run{end}")
        said = capsys.readouterr().out
        assert "the same greedy tokens" in said and "other ids" not in said
        assert json.loads((run / "parity.json").read_text())["token_ids_equal"] is True
        loaded = load_run(run)
        text = loaded.tokenizer.decode(whole)
        mine = Run(run, loaded)
        assert "the king" + mine.generate("the king", max_tokens=20, temperature=0.0) == text
        assert "the king" + mine.generate("the king", max_tokens=20, beams=1, length_penalty=0.0) == text
        shown = ["generate", str(run), "--prompt", "the king", "--max-tokens", "20", "--temperature", "0"]
        assert main(shown) == 0
        assert capsys.readouterr().out == text + "\n"
    assert main([*shown[:3], "the<|eot|>king", *shown[4:], "--special"]) == 0


def test_what_is_published_with_a_model_survives_its_export(checkpoint, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder, _, theirs, loaded = checkpoint
    out = export(folder / "run", tmp_path / "out", verify=False)
    back = AutoTokenizer.from_pretrained(out)
    assert (back.chat_template, back.bos_token, back.eos_token) == (CHAT, "<s>", "</s>")
    for prompt in PROMPTS:
        assert back(prompt).input_ids == theirs(prompt).input_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 3]
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == [2, 3] and config["bos_token_id"] == 1
    again = load_run(import_checkpoint(str(out), tmp_path / "again", verify=False))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, again.params))
    for prompt in PROMPTS:
        assert again.tokenizer.prompt(prompt) == loaded.tokenizer.prompt(prompt)
        assert again.tokenizer.prompt(prompt, special=True) == loaded.tokenizer.prompt(prompt, special=True)
    assert again.tokenizer.ends == (2, 3) and again.tokenizer.begin == loaded.tokenizer.begin
    assert again.tokenizer.conventions.chat_templates == {"default": CHAT}
    whole = [*theirs(PROMPTS[0]).input_ids, *range(4, 30)]
    assert again.tokenizer.decode(whole) == back.decode(whole, skip_special_tokens=True)


def test_sampling_defaults_and_added_tokens_of_a_chat_model(tmp_path, capsys):
    from transformers import AutoTokenizer

    made = tokenizer("sentencepiece_bpe")
    size = made.get_vocab_size()
    save_tokenizer(made, tmp_path / "hf", pad_token="<pad>", extra_special_tokens=["<|tool|>"])
    own = {"do_sample": True, "temperature": 0.6, "top_k": 7, "repetition_penalty": 1.2, "max_new_tokens": 5}
    llama(tmp_path / "hf", size, ends=[2, 3], **own)
    run = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run", verify=False)
    assert "the model has no ids for <pad>, <|tool|>: they stay in the tokenizer" in capsys.readouterr().out
    again = import_checkpoint(str(export(run, verify=False)), tmp_path / "again", verify=False)
    kept = json.loads((run / "huggingface" / "generation_config.json").read_text())
    assert {name: kept[name] for name in own} == own
    back = AutoTokenizer.from_pretrained(run / "huggingface")
    assert (back.pad_token, back.pad_token_id) == ("<pad>", size) and len(back) == size + 2
    for one in (run, again):
        loaded = load_run(one)
        assert loaded.tokenizer.vocab_size == size + 2 and loaded.tokenizer.special("<|tool|>") == size + 1
        usual = sampling_of(loaded.tokenizer, {})
        assert usual == Sampling(temperature=0.6, top_k=7, repetition_penalty=1.2)
        assert sampling_of(loaded.tokenizer, {"temperature": 0.0}).top_k == 7
        assert loaded.tokenizer.conventions.max_new_tokens == 5
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "the king", "--temperature", "0"]) == 0
    assert main(["generate", str(run), "--prompt", "the<|tool|>", "--special"]) == 2
    assert f"token id {size + 1} is outside the model's vocabulary of {size}" in capsys.readouterr().err


def test_documents_begin_as_the_tokenizer_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tokenizer("sentencepiece_bpe")
    save_tokenizer(made, tmp_path / "hf")
    llama(tmp_path / "hf", made.get_vocab_size(), ends=[2, 3])
    run = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run", verify=False)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": "the king"}) for _ in range(3)))
    text = made.encode("the king", add_special_tokens=False).ids
    path = str(run / "tokenizer" / "tokenizer.json")
    source = FilesSource(path=str(tmp_path / "texts.jsonl"))
    for choice, begin in ((None, [1]), (True, [1]), (False, [])):
        config = TokenizerConfig(kind="file", path=path, begin_of_text=choice)
        prepared = prepare(DataConfig(sources=(source,), validation_fraction=0, tokenizer=config), progress=False)
        assert np.asarray(prepared.train[0].tokens).tolist() == [2, *[*begin, *text, 2] * 3]
        # A prompt begins as the documents did, and end tokens are those of the import.
        assert prepared.tokenizer.prompt("the king") == [*begin, *text] and prepared.tokenizer.ends == (2, 3)
    plain = tmp_path / "plain.json"
    made.save(str(plain))
    own = make_tokenizer(TokenizerConfig(kind="file", path=str(plain)), [])
    # A frame that the model's documents do not have is not put around a prompt.
    assert own.begin == () and own.frame[0] == (1,) and own.prompt("the king") == text
    tokenizer("wordpiece").save(str(plain))
    assert make_tokenizer(TokenizerConfig(kind="file", path=str(plain), begin_of_text=True), []).begin == (1,)
    (run / "tokenizer" / "tokenizer_about.json").unlink()
    bare = tokenizer("wordpiece").to_str().replace("<s>", "<x>")
    plain.write_text(bare)
    with pytest.raises(
        UserError, match=r"data.tokenizer.begin_of_text: the vocabulary has no token that begins a text"
    ):
        make_tokenizer(TokenizerConfig(kind="file", path=str(plain), begin_of_text=True), [])


def test_an_encoders_tokens_around_a_text_are_those_of_its_post_processor(tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer, BertConfig, BertModel

    made = tokenizer("wordpiece")
    names = [("<|eot|>", 3), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<|eot|> $A </s>", special_tokens=names)
    save_tokenizer(made, tmp_path / "hf")
    config = BertConfig(
        vocab_size=made.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    run = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    vector = Run(run, load_run(run)).embed("the king", pooling="mean", normalize=False)
    inputs = theirs("the king", return_tensors="pt")
    expected = model(**inputs).last_hidden_state[0].mean(0).detach().numpy()
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    made.post_processor = processors.TemplateProcessing(single="<|eot|> $A", special_tokens=names[:1])
    save_tokenizer(made, tmp_path / "hf")
    with pytest.raises(
        UserError, match="puts 1 tokens before a text and 0 after it; supported of an encoder: one each"
    ):
        import_checkpoint(str(tmp_path / "hf"), tmp_path / "other")
