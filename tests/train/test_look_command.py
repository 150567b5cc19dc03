"""`manyheads look`, as a user types it, its page as a person sees it, and the same in Python."""

from __future__ import annotations

import json

import jax
import pytest

import manyheads as mh
from tests.train.fine_tuning import classifier_of
from tests.train.test_manyheads import TRANSLATOR
from train.commands.cli import main
from train.config import load
from train.data.prepared.prepare import prepare
from train.data.sources.synthetic import sentence
from train.parallel.mesh import make_mesh, use_mesh
from train.run.begin import program_of, with_data
from train.run.head_log import HeadLog
from train.run.loop import train
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")
TEXT, OTHER = "value_3 = 5", "value_8 = 5"


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory):
    """The page and what was said, of one text and a corrupted one."""
    folder = tmp_path_factory.mktemp("look")
    arguments = ["--text", TEXT, "--corrupted", OTHER, "--answer", "7", "--instead", "<", "--out", str(folder)]
    assert main(["look", str(whole), *arguments]) == 0
    return folder / "look.html"


def test_it_says_what_stands_out(whole, tmp_path, capsys):
    assert main(["look", str(whole), "--text", TEXT, "--out", str(tmp_path), "--how", "mean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["text", "answer", "lens", "ablation", "attribution", "heads", "heads", "page"]
    assert lines[0] == "text         11 tokens"
    run = mh.load(whole)
    best = run.lens(TEXT).tokens_LTK[-1, -1, 0]
    assert f"answer       {run.tokenizer.decode([best]).replace(' ', '␣')} " in lines[1].replace("\n", "↵")
    assert (tmp_path / "look.html").is_file()


def test_the_page_in_a_browser(page, browser):
    troubles, requests = [], []
    for options in ({"viewport": {"width": 1200, "height": 900}},
                    {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}):  # fmt: skip
        view = browser.new_page(**options)
        view.on("console", lambda message: troubles.append(message.text))
        view.on("pageerror", lambda error: troubles.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(page.as_uri())
        titles = view.locator("h2").all_inner_texts()
        assert titles == ["Logit lens", "Direct logit attribution", "Ablation of heads", "What the heads look at",
                          "Activation patching"]  # fmt: skip
        # Wide tables scroll in their own frames.
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # Before the first layer, the one word that differs restores everything, and is drawn in the strongest shade.
        cell = view.locator("section:last-of-type .cells").first.locator("tbody tr").first.locator("td").nth(6)
        assert cell.inner_text() == "1.00" and cell.get_attribute("class") == "p10"
        shade = cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
        plain = view.locator("section:last-of-type .cells td").first
        assert shade != plain.evaluate("cell => getComputedStyle(cell).backgroundColor")
        view.close()
    assert troubles == [] and set(requests) == {page.as_uri()}


def test_tokens_cannot_be_more_than_text(whole, tmp_path):
    arguments = ["--text", "<b>&", "--answer", "<", "--instead", "&", "--out", str(tmp_path)]
    assert main(["look", str(whole), *arguments]) == 0
    text = (tmp_path / "look.html").read_text("utf-8")
    assert "&lt;" in text and "&amp;" in text and "<b>" not in text and "<script" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no text given: use --text TEXT"),
        (["--text", "a", "--corrupted", "ab"], "corrupted: it has 2 tokens and the clean text 1; give texts of as many tokens"),
        (["--text", "a", "--corrupted", "a"], "corrupted: it gives the two answers the same logit difference"),
        (["--text", "a", "--answer", "xyz"], "answer: 'xyz' is 3 tokens ('x' 'y' 'z'); give one token"),
        (["--text", "a", "--instead", ""], "instead: '' is 0 tokens; give one token"),
        (["--text", "a", "--how", "noise"], "how: got 'noise'; allowed: 'zero', 'mean'"),
        (["--text", "a", "--target", "b"], "target: only an encoder-decoder has one"),
        (["--text", "a" * 17], "text: its 17 tokens exceed the model's context of 16"),
        (["--text", "a", "--out", "/dev/null/x"], "/dev/null/x: cannot be written: Not a directory"),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line(whole, capsys, arguments, message):
    assert main(["look", str(whole), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_language_model_in_python(whole):
    run = mh.load(whole)
    found = run.ablate([TEXT, OTHER], [(0, 1), (1, 0)], "mean")
    assert found.change_BC.shape == (2, 256) and found.loss_change is not None
    table = run.head_importance(TEXT).tables["attention"]
    assert table.shape == (2, 2)
    single = run.ablate(TEXT, [(1, 1)])
    assert table[1, 1] == pytest.approx(single.loss_change, abs=1e-4)
    parts = run.attribute(TEXT, answer="7", instead="8")
    assert parts.total == pytest.approx(parts.difference, abs=1e-3)
    assert run.head_statistics([TEXT, "a"])["attention"].entropy.shape == run.induction_scores(4).shape == (2, 2)
    with pytest.raises(UserError, match=r"heads: got layer 2; allowed: 0 to 1"):
        run.ablate(TEXT, [(2, 0)])


def test_a_masked_model_and_a_classifier(encoder, texts, tmp_path, capsys):
    assert main(["look", str(encoder), "--text", "a [MASK] text", "--out", str(tmp_path)]) == 0
    assert "attribution  none: model." in capsys.readouterr().out
    assert main(["look", str(encoder), "--text", "a text", "--out", str(tmp_path)]) == 2
    assert "text: it has 0 [MASK]; a masked model answers at one" in capsys.readouterr().err
    run = mh.train(classifier_of(texts, tmp_path / "tuned", steps=2))
    found = run.patch("a good text", "a goad text", answer="good", instead="bad")
    # The fifth byte differs, after [CLS].
    assert found.stream[""][0, 5] == pytest.approx(1, abs=1e-2)
    assert main(["look", str(tmp_path / "tuned"), "--text", "a good text", "--answer", "fine"]) == 2
    assert "answer: got 'fine'; the classes are bad, good" in capsys.readouterr().err
    assert main(["look", str(tmp_path / "tuned"), "--text", "a good text"]) == 0
    assert (tmp_path / "tuned" / "look" / "look.html").is_file()


def test_a_translator(tmp_path, capsys):
    model = {"family": "t5", "vocab_size": 600, "max_length": 40, "num_layers": 1, "embed_dim": 16,
             "attention": {"num_heads": 2, "head_dim": 8}, "mlp": {"dim": 16}}  # fmt: skip
    data = TRANSLATOR | {"model": model, "run_dir": str(tmp_path / "pairs"), "steps": 1}
    run = mh.train(data)
    first = sentence(1)
    assert main(["look", str(tmp_path / "pairs"), "--text", first]) == 0
    out = capsys.readouterr().out
    assert "heads        encoder.attention: token before" in out and "attribution  none" not in out
    target = run.target_tokenizer.decode([5])
    assert run.ablate(first, [("decoder.cross", 0, 1)], target=target).loss_change is not None


def test_a_run_records_what_its_heads_look_at(config_file, tmp_path):
    config = load(str(config_file), ["--log.attention", "2", "--steps", "6", "--run-dir", str(tmp_path / "run")])
    train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record for record in records if "attention/layer_0_entropy" in record}
    assert list(found) == [2, 4, 6]
    for record in found.values():
        for layer in (0, 1):
            assert 0 < record[f"attention/layer_{layer}_entropy"] < 4
            assert (
                0 < record[f"attention/layer_{layer}_previous"] <= record[f"attention/layer_{layer}_most_previous"] < 1
            )
    # Training itself is the same without.
    train(load(str(config_file), ["--steps", "6", "--run-dir", str(tmp_path / "plain")]))
    plain = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    losses = [[one["train/loss"] for one in some if "train/loss" in one] for some in (records, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_what_heads_look_at_needs_bounded_memory(config_file, tmp_path):
    config = load(str(config_file), ["--run-dir", str(tmp_path / "run")])
    prepared, mesh = prepare(config.data), make_mesh(config.mesh)
    config = with_data(config, prepared)
    with use_mesh(mesh, config.mesh.rules):
        program = program_of(config, prepared, mesh)
        # Large weights, so that rows differ in what heads look at.
        params = jax.tree.map(lambda leaf: 20 * leaf, program.init().params)
        # Four arrays of each layer, of 2 heads.
        row = 4 * 4 * 2 * config.sequence_length**2
        expected = HeadLog(config, prepared, program)(params)
        in_parts = HeadLog(config, prepared, program, max_bytes=4 * row)(params)
        assert {"layer_0_entropy", "layer_1_entropy"} < set(expected) and in_parts == pytest.approx(expected, rel=1e-5)
        # Below that, fewer rows.
        fewer = HeadLog(config, prepared, program, max_bytes=2 * row)(params)
        assert set(fewer) == set(expected) and fewer["layer_0_entropy"] != pytest.approx(
            expected["layer_0_entropy"], rel=1e-5
        )
        message = r"log.attention: the weights of one layer on 16 tokens need 8\.0 KiB of each device, above the limit"
        with pytest.raises(UserError, match=message):
            HeadLog(config, prepared, program, max_bytes=row - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log.attention", "0"], "log.attention: got 0; allowed: 1 or more, or null"),
        (["--log.attention", "2", "--data.validation-fraction", "0"], "log.attention: it needs held-out text"),
        (["--log.attention", "2", "--model.attention", '{"kind": "delta", "num_heads": 2}'], "has no weights that are"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded(config_file, tmp_path, capsys, options, message):
    assert main(["train", str(config_file), "--run-dir", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
