"""Which documents are held out: the same share of every class, and whole groups."""

from __future__ import annotations

import collections
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.prepared.held_out import HeldOut, position_of
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.records import Document
from train.data.sources.source_config import FilesSource

LABELLED = FilesSource(path="rows.jsonl", label_field="label")


def chosen(labels, fraction, *, split_at=0, source=LABELLED):
    """The numbers of the documents that are held out; those from `split_at` on by a second chooser that goes on."""
    documents = [Document(f"rows:{number}", "text", label=label) for number, label in enumerate(labels)]
    first = HeldOut(source, fraction)
    found = [number for number in range(split_at) if first.holds_out(documents[number])]
    second = HeldOut(source, fraction, first.counts)
    return found + [number for number in range(split_at, len(labels)) if second.holds_out(documents[number])]


@given(
    labels=st.lists(st.sampled_from("abc"), max_size=200), fraction=st.sampled_from([0.01, 0.05, 0.15, 0.3, 0.5, 0.9]),
    part=st.floats(0, 1),
)  # fmt: skip
def test_every_class_has_the_same_share_wherever_parts_begin(labels, fraction, part):
    found = chosen(labels, fraction)
    assert found == chosen(labels, fraction, split_at=int(part * len(labels)))
    counts, held_out = collections.Counter(labels), collections.Counter(labels[number] for number in found)
    for name, count in counts.items():
        assert math.floor(count * fraction) <= held_out[name] <= math.ceil(count * fraction)


def test_they_are_no_fixed_places_of_a_class():
    places = [number % 20 for number in chosen(["a"] * 2000, 0.05)]
    assert len(places) == 100 and len(set(places)) > 15


@pytest.mark.parametrize(
    "source",
    [
        FilesSource(path="rows.jsonl"),
        FilesSource(path="rows.jsonl", label_field="label", group_field="group"),
        FilesSource(path="rows.jsonl", label_field="label", label_kind="number"),
        FilesSource(path="rows.jsonl", label_field="label", choice_fields=("one", "two")),
    ],
)
def test_other_documents_are_chosen_by_id_or_group(source):
    documents = [Document(f"rows:{number}", "text", label="a", group=f"group {number // 3}") for number in range(300)]
    held_out = HeldOut(source, 0.2)
    assert [held_out.holds_out(one) for one in documents] == [position_of(one.split_by) < 0.2 for one in documents]
    assert held_out.counts == {}


def test_all_or_none_of_a_source():
    assert chosen(["a", "b"] * 9, 1.0) == list(range(18))
    assert chosen(["a", "b"] * 9, 0.0) == []


def test_prepared_data_hold_out_the_rarer_class_too(tmp_path):
    rows = [{"text": f"text {number}", "label": "rare" if number % 10 == 3 else "common"} for number in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(path=str(tmp_path / "rows.jsonl"), label_field="label")
    prepared = prepare(DataConfig(sources=(source,), packing="documents"), progress=False)
    (held_out,) = prepared.validation
    assert collections.Counter(document.label for document in prepared.held_out(held_out)) == {"common": 18, "rare": 2}


def test_the_first_of_a_class_is_for_training():
    for fraction in (0.05, 0.2, 0.5, 0.9):
        assert chosen([f"class {number}" for number in range(300)], fraction) == []
        assert 0 not in chosen(["a"] * 20, fraction)
    assert len(chosen(["a"] * 1000, 1e-7)) <= 1
