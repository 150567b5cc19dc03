"""Metrics of predictions against scikit-learn, seqeval, SciPy and SQuAD's formulas on cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from scipy.stats import pearsonr, spearmanr

from train.checkpoints.selection import Selection, ranking_key
from train.objectives import OBJECTIVES, TokenClassification
from train.objectives.tasks.answers import best_margin, exact_match, f1, normal
from train.objectives.tasks.report import ClassScores, class_table


def metrics_of(kind: str, predictions: list[dict], labels=()) -> dict[str, float]:
    found = OBJECTIVES[kind]().scores(predictions, labels)
    assert tuple(found) == OBJECTIVES[kind].metrics
    return found


def given(gold, told) -> list[dict]:
    return [{"id": str(n), "gold": one, "label": other} for n, (one, other) in enumerate(zip(gold, told, strict=True))]


@pytest.mark.parametrize(
    ("gold", "told"), [("aabbbcc", "abbbcca"), ("aaaa", "aaaa"), ("aaaa", "bbbb"), ("abab", "aaaa"), ("ab", "cc")]
)
def test_classes(gold, told):
    found = metrics_of("classification", given(gold, told), "abc")
    both = (list(gold), list(told))
    assert found["accuracy"] == sklearn.metrics.accuracy_score(*both)
    assert found["f1"] == sklearn.metrics.f1_score(*both, average="macro", zero_division=0)
    expected = sklearn.metrics.matthews_corrcoef(*both) if len({*gold, *told}) > 1 else 0
    assert found["matthews"] == expected
    assert metrics_of("choice", given(gold, told), "abc") == {"accuracy": found["accuracy"]}


def test_numbers():
    rng = np.random.default_rng(0)
    gold, told = rng.normal(size=(2, 20))
    found = metrics_of("regression", given(gold.tolist(), told.tolist()))
    assert found["pearson"] == pytest.approx(pearsonr(gold, told).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(gold, told).statistic)
    assert found["mse"] == pytest.approx(np.mean((gold - told) ** 2))
    assert metrics_of("regression", given([1.0, 2.0], [3.0, 3.0])) == {"pearson": 0, "spearman": 0, "mse": 2.5}
    assert metrics_of("regression", given([1.0], [2.0]))["pearson"] == 0


GOLD = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"], ["O", "O", "B-PER"]]
TOLD = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "I-ORG"], ["O", "B-LOC", None]]


def test_entities(tmp_path):
    labels = sorted({tag for row in GOLD for tag in row})
    found = metrics_of("token_classification", given(GOLD, TOLD), labels)
    told = [[tag or "O" for tag in row] for row in TOLD]
    assert found["precision"] == seqeval.metrics.precision_score(GOLD, told)
    assert found["recall"] == seqeval.metrics.recall_score(GOLD, told)
    assert found["f1"] == seqeval.metrics.f1_score(GOLD, told) == pytest.approx(2 / 8)
    assert found["accuracy"] == pytest.approx(5 / 9)
    said = "\n".join(TokenClassification().describe(given(GOLD, TOLD), labels, tmp_path))
    assert "1 held-out words are beyond the end of their row or have no token" in said
    assert [line.split()[0] for line in said.splitlines()[2:5]] == ["LOC", "ORG", "PER"]
    assert (tmp_path / "classes.png").stat().st_size > 1000


def test_tags_of_single_words(tmp_path):
    gold, told = [["NOUN", "VERB"], ["ADJ", "NOUN"]], [["NOUN", "NOUN"], ["ADJ", None]]
    labels = ("ADJ", "NOUN", "VERB")
    found = metrics_of("token_classification", given(gold, told), labels)
    flat = (["NOUN", "VERB", "ADJ", "NOUN"], ["NOUN", "NOUN", "ADJ", ""])
    names = ["ADJ", "NOUN", "VERB"]
    assert found["f1"] == sklearn.metrics.f1_score(*flat, labels=names, average="macro", zero_division=0)
    assert found["accuracy"] == 0.5
    assert TokenClassification().describe(given(gold, told), labels, tmp_path)[1].splitlines()[1].split()[0] == "ADJ"


def test_answers_by_squads_formulas():
    assert normal("The  Eiffel-Tower, (a) tower!") == "eiffeltower tower"
    assert exact_match("the cat", ["A dog", "Cat."]) == 1 and exact_match("cats", ["cat"]) == 0
    assert f1("the black cat", ["black cat sat", "dog"]) == pytest.approx(0.8)
    assert f1("dog", ["cat"]) == 0 and f1("", []) == 1 == exact_match("", []) and f1("x", []) == 0
    found = metrics_of("answer", given([["cat"], ["a black cat"]], ["the cat", "black dog"]))
    assert found == {"exact_match": 0.5, "f1": pytest.approx(0.75)}


def test_the_margin_that_would_have_been_best():
    def one(span, gold, margin):
        return {"span": span, "gold": gold, "scores": {"answer": 1.0, "no_answer": 1.0 + margin}}

    right, wrong, absent = one("cat", ["cat"], -3.0), one("dog", ["cat"], 4.0), one("cow", [], 2.0)
    margin, best = best_margin([absent, wrong, right])
    assert margin == pytest.approx(-3.0) and best == pytest.approx(2 / 3)
    margin, best = best_margin([absent])
    assert margin < 2 and best == 1


def test_what_is_better():
    assert ranking_key("f1", {"f1": 0.2}) > ranking_key("f1", {"f1": 0.1}) > ranking_key("f1", {})
    assert ranking_key("mse", {"mse": 0.1}) > ranking_key("mse", {"mse": 0.2})
    selection = Selection("mse")
    for step, value, since in ((1, 0.5, 0), (2, 0.5, 1), (3, 0.6, 2), (4, 0.4, 0), (5, 0.41, 1)):
        selection = selection.after(step, value)
        assert selection.since == since and selection.is_over(2) == (since == 2) and not selection.is_over(None)
    assert selection.step == 4 and selection.value == 0.4 and selection.counted == 5
    stored = {"name": "mse", "value": 0.4, "step": 4, "since": 1, "counted": 5}
    assert Selection.from_data("mse", stored) == selection and Selection.from_data("pearson", stored) == Selection(
        "pearson"
    )


def test_the_table_has_a_line_for_each_class():
    lines = class_table([ClassScores("good", 0.5, 1.0, 2 / 3, 1234)]).splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "f1", "count"]
    assert lines[1].split() == ["good", "50.00%", "100.00%", "66.67%", "1,234"]
