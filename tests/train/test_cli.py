"""The commands beside `train`, as a user types them."""

from __future__ import annotations

import io
import logging
import re

import pytest

from train.commands.cli import main
from train.parallel.runtime import set_up_devices


def test_generate_streams_one_prompt(whole, capsys):
    assert main(["generate", str(whole), "--prompt", "value_", "--max-tokens", "9", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("value_")
    assert main(["generate", str(whole), "--prompt", "value_", "--max-tokens", "9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == text


def test_generate_continues_a_batch_of_different_lengths(whole, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nvalue_3 = \n")
    assert main(["generate", str(whole), "--prompts-file", str(tmp_path / "prompts.txt"), "--max-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "value_3 = " in output
    assert output.count("───") >= 2


@pytest.mark.parametrize("search", [[], ["--beams", "2"]])
def test_lines_in_lines_out(whole, capsys, tmp_path, search):
    """Each line of a file is a prompt: a blank one has an empty continuation, and U+2028 ends none."""
    prompts = ["a", "", "b\u2028c", " ", "a"]
    (tmp_path / "prompts.txt").write_bytes("".join(f"{line}\r" for line in prompts).encode("utf-16"))
    arguments = ["generate", str(whole), "--prompts-file", str(tmp_path / "prompts.txt"), "--max-tokens", "2", *search]
    assert main(arguments) == 0
    found = re.split("─+.*\n", capsys.readouterr().out)[1:]
    assert len(found) == 5 and all(map(str.startswith, found, prompts))
    assert [text.strip() == "" for text in found] == [False, True, False, True, False]
    (tmp_path / "prompts.txt").write_text("a\n\n" + "b" * 20)
    assert main(arguments) == 2
    assert "prompt 3 has 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a" * 20], "exceed the model's context of 16"),
        (["--prompt", ""], "prompt 1 is empty"),
        ([], "nothing to continue"),
        (["--prompt", "a", "--step", "5"], "this run has latest, best, "),
        (["--prompt", "a", "--step", "9" * 5_000], "this run has latest, best, "),
        (["--prompts-file", "x" * 300], "File name too long"),
        (["--prompt", "a", "--top-p", "2"], r"--top-p: got 2.0; allowed"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens: got 0"),
        (["--prompts-file", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
    ],
)
def test_generate_refuses_in_one_line(whole, capsys, arguments, message):
    assert main(["generate", str(whole), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_generate_searches(whole, capsys):
    arguments = ["generate", str(whole), "--prompt", "value_", "--max-tokens", "4", "--beams", "3"]
    assert main([*arguments, "--num-best", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("value_") == 2 and shown.count("log-probability") == 2
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip("\n") in shown
    assert main([*arguments, "--num-best", "4"]) == 2
    assert "--num-best: got 4; allowed: 1 to beams (3)" in capsys.readouterr().err


def test_generate_without_a_run(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "no run here" in capsys.readouterr().err


def test_explain_names_every_field_and_the_cost(config_file, capsys):
    assert main(["explain", str(config_file), "--model.num-layers", "3"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"model.num_layers +3 +12 +Number of blocks", output)
    assert re.search(r"parameters +4\d,\d{3} ", output)
    for part in ("parameters", "gradients", "optimiser", "activations"):
        assert re.search(rf"memory, {part} +[\d.]+ [KMG]iB", output)


def test_explain_says_which_attention_each_kind_of_layer_takes(config_file, capsys):
    layers = "[{window: 4}, {}]"
    overrides = ["--model.pattern", layers, "--data.packing", "documents", "--model.dtype", "bfloat16"]
    assert (
        main(["explain", str(config_file), *overrides, "--model.num-layers", "4", "--model.attention-dropout", "0.1"])
        == 0
    )
    dropped = capsys.readouterr().out.partition("by kind of layer")[2]
    assert "cudnn: its dropout" in " ".join(dropped.split())
    assert main(["explain", str(config_file), *overrides, "--model.num-layers", "4"]) == 0
    table = capsys.readouterr().out.partition("by kind of layer")[2]
    rows = [line.split() for line in table.splitlines() if "blockwise" in line]
    assert len(rows) == 2
    # What is plain is fused everywhere; a window in packed rows is not, and the table says why.
    assert {"cudnn", "blockwise"} <= {word for row in rows for word in row}
    assert "no window within packed or padded rows" in " ".join(table.split())


def test_prepare_counts_what_it_made(config_file, capsys):
    assert main(["prepare", str(config_file)]) == 0
    output = capsys.readouterr().out
    assert "train" in output
    assert "validation" in output


@pytest.mark.parametrize("text", ["5", "0:3", "7:3", "a:b"])
def test_a_profile_range_that_makes_no_sense(config_file, capsys, text):
    assert main(["train", str(config_file), "--profile", text]) == 2
    assert "--profile" in capsys.readouterr().err


def test_what_orbax_logs_of_an_error_is_a_line():
    set_up_devices()
    logger, said = logging.getLogger("absl"), io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        raise RuntimeError("a peer is gone")
    except RuntimeError:
        logger.exception("saving failed")
    finally:
        logger.removeHandler(handler)
    assert said.getvalue() == "saving failed\n"


def test_what_is_shown_of_a_name_is_printable(capsys):
    assert main(["train", "\x1b[31m.yaml"]) == 2
    with pytest.raises(SystemExit):
        main(["plot", "run", "--\x1b[31m"])
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\\x1b[31m") == 2


def test_a_name_that_no_disk_takes(whole, capsys):
    assert main(["export", str(whole), "--no-verify", "--out", "x" * 300]) == 2
    assert "File name too long; give a shorter one" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "1e20"])
def test_seconds_after_which_a_process_hangs(config_file, seconds, capsys):
    assert main(["train", str(config_file), "--hang-seconds", seconds]) == 2
    assert "--hang-seconds: got" in capsys.readouterr().err
