"""Bad inputs of each kind, made at random: each is refused in a message, or works. `tests.mutations.run` makes thousands."""

from __future__ import annotations

import collections

import pytest

from tests.mutations.run import SHARES, outcomes

COUNTS = {"config": 40, "data": 16, "tokenizer": 8, "run": 4, "weights": 10, "arguments": 6}
"""Mutants of each kind."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of all of them, in one process of their own: it limits its memory, and audits what it writes."""
    mutants = [(kind, number) for kind, count in COUNTS.items() for number in range(count)]
    kinds = collections.defaultdict(list)
    # Compiling takes its time on a machine with other work.
    for one in outcomes(mutants, tmp_path_factory.mktemp("mutations"), seconds=60):
        kinds[one["kind"]].append(one)
    return kinds


@pytest.mark.parametrize("kind", SHARES)
def test_a_bad_input_is_refused_or_works(found, kind):
    findings = [one for one in found[kind] if one["what"] == "finding"]
    again = "python -m tests.mutations.run --count 1 --kind {kind} --seed {seed}"
    assert not findings, "\n".join(f"{again.format(**one)}: {one['message']}\n  {one['about']}" for one in findings)
    assert len(found[kind]) == COUNTS[kind]


def test_some_are_refused_and_some_work(found):
    assert {"refused", "accepted"} <= {one["what"] for kind in SHARES for one in found[kind]}
