"""Attention through history: budgets are met, stages are kept and not run again, and the report says what the figures say."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import record, stage
from benchmarks.cli import main
from benchmarks.history import findings, models, stages, tasks
from benchmarks.history import run as program
from benchmarks.history.models import ENTRIES, TOLERANCE, chosen, solve
from tests.devices import on_one_device
from transformer.errors import UserError
from transformer.models.families import count_parameters

pytestmark = pytest.mark.usefixtures("one_device")

NAMES = ("bahdanau", "delta")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two models on a few synthetic pairs: the figures, and the folder of the runs and the report."""
    published, runs = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, on_one_device():
        patch.setattr(record, "RESULTS", published)
        result = _compare(runs)
    # A folder of one's own holds the results too: those that are published stay as they are.
    assert not list(published.iterdir())
    return result, runs


def _compare(runs, **options):
    return program.run(
        options.pop("models", NAMES), parameters=50_000, steps=2, data="synthetic", directory=str(runs),
        synthetic_pairs=1000, **options,
    )  # fmt: skip


def test_the_report_holds_every_model_and_the_figures_of_the_record(compared):
    result, results = compared
    kept = json.loads((results / "history_synthetic_cpu.json").read_text())["result"]
    assert kept == json.loads(json.dumps(result))
    page, markdown = ((results / f"history_synthetic_cpu.{suffix}").read_text() for suffix in ("html", "md"))
    assert page.count("<svg") == 3 and "http-equiv" not in page and "src=" not in page
    for one in result["tasks"]["synthetic"]["stages"]:
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {ENTRIES[one['model']].title} |"))
        assert f"{one['held_out_loss']:.3f}" in row and f"{one['parameters']:,}" in row
        assert ENTRIES[one["model"]].title in page and f"{one['held_out_loss']:.3f}" in page
        assert row.rstrip(" |").endswith("–") == (one["alignment"] is None)
    for picture in re.findall(r"\]\((.+?\.svg)\)", markdown):
        assert (results / picture).read_text().startswith("<svg")


def test_figures_of_a_stage(compared):
    additive, delta = compared[0]["tasks"]["synthetic"]["stages"]
    assert delta["alignment"] is None and delta["example"]["weights"] is None
    assert 0 <= additive["alignment"]["error_rate"] <= 1 and 0 < additive["alignment"]["diagonal"] < 1
    shown = additive["example"]
    assert [len(shown["weights"]), len(shown["weights"][0])] == [len(shown["rows"]), len(shown["columns"])]
    assert shown["source"] == delta["example"]["source"]
    assert sum(bucket["pairs"] for bucket in additive["by_length"]) == additive["pairs"]
    assert [step for step, _ in additive["curves"]["training"]] == [1, 2]


def test_finished_stages_are_not_run_again(compared, monkeypatch, capsys):
    result, runs = compared
    monkeypatch.setattr(stage, "train", lambda config: pytest.fail("a finished stage was trained again"))
    again = _compare(runs)
    assert again["tasks"] == result["tasks"]
    assert capsys.readouterr().out.count("already finished") == 1 + len(NAMES)


def test_a_stop_says_how_to_go_on(compared, monkeypatch):
    _, runs = compared

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", stopped)
    with pytest.raises(UserError, match=r"stopped in stage 1 of 3 \(synthetic, none\).*same command"):
        _compare(runs, models=("none", *NAMES))
    assert not list(runs.rglob("none.json"))


def test_other_settings_are_kept_apart(tmp_path):
    task = tasks.tasks_of("synthetic", 1000)
    folders = {
        stages.Settings(tasks=task, parameters=parameters, steps=steps, seed=seed).folder(tmp_path)
        for parameters, steps, seed in ((1000, 5, 0), (2000, 5, 0), (1000, 6, 0), (1000, 5, 1))
    }
    assert len(folders) == 4


@pytest.mark.parametrize("name", ENTRIES)
def test_every_model_meets_the_budget(name):
    budget = 2_000_000
    config = solve(name, budget, source_vocab_size=840, vocab_size=840, max_length=32)
    assert abs(count_parameters(config) - budget) <= TOLERANCE * budget


def test_a_budget_below_the_embeddings_is_refused():
    with pytest.raises(UserError, match="--parameters: got 1,000; the nearest size of none has"):
        solve("none", 1000, source_vocab_size=840, vocab_size=840, max_length=32)


def test_unknown_names_are_one_line(capsys):
    assert main(["history", "--models", "none,bahdanou", "--data", "synthetic"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "got 'bahdanou'; allowed: none, bahdanau" in error and "Did you mean 'bahdanau'?" in error
    assert main(["history", "--data", "synthetik"]) == 2
    assert "Did you mean 'synthetic'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="none is named"):
        chosen([])
    assert chosen(["transformer", "none", "none"]) == ("none", "transformer")


def _figures(model, loss, bleu, rate=None):
    aligned = rate and {"error_rate": rate, "diagonal": 0.6, "heads": 1}
    buckets = [
        {"words": "1–8", "bleu": bleu + 5, "chrf": bleu, "pairs": 50},
        {"words": "9–16", "bleu": bleu, "chrf": bleu, "pairs": 40},
        {"words": "17+", "bleu": 0.0, "chrf": 0.0, "pairs": 3},
    ]
    return {
        "model": model, "held_out_loss": loss, "bleu": bleu, "chrf": bleu, "pairs": 93, "by_length": buckets,
        "alignment": aligned, "tokens_per_second": 1000.0 * loss,
    }  # fmt: skip


def test_findings_follow_the_figures():
    text = "\n".join(
        findings.findings(
            [
                _figures("none", 3.0, 10.0),
                _figures("bahdanau", 2.0, 30.0, 0.2),
                _figures("hard", 2.03, 29.5, 0.7),
                _figures("linear", 3.2, 8.0, 0.21),
            ]
        )
    )
    assert "Bahdanau (additive) is lowest with 2.000" in text and "Linear highest with 3.200" in text
    assert "Within 0.05 of the lowest: Hard." in text
    assert "lower by 0.05 or more: Bahdanau (additive), Hard; higher by 0.05 or more: Linear" in text
    assert "leads with 30.00; closer than 1 to it: Hard. Last is Linear with 8.00." in text
    assert "From sources of 1–8 words to those of 9–16" in text  # three pairs say nothing of longer ones
    assert "within 0.02 of it Linear" in text and "not better than that: Hard." in text
    assert "Linear is fastest with 3,200" in text and "1.6 times Bahdanau (additive), the slowest" in text


def test_models_that_translate_nothing_are_not_ranked_by_bleu():
    text = findings.findings([_figures("none", 6.0, 0.1), _figures("hard", 6.1, 0.2)])
    assert any("ranks by BLEU mean nothing" in line for line in text)
    assert not any("leads" in line for line in text)


def test_names_of_styles_are_those_of_models():
    from benchmarks.history.plots import STYLES

    assert STYLES.keys() == models.ENTRIES.keys()
