"""Describes the figures in sentences: ranks, gaps, and ties within noise. All sentences are derived from the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.history.models import ENTRIES

Figures = dict[str, Any]
"""A stage's figures, as in its JSON."""

CLOSE_LOSS = 0.05
"""Nats a token."""
CLOSE_BLEU = 1.0
CLOSE_RATE = 0.02
LEAST_BLEU = 2.0
"""Below this BLEU a model translates almost nothing."""
LEAST_PAIRS = 10
"""A bucket with fewer pairs is ignored."""


def title(figures: Figures) -> str:
    """The title of a stage's model."""
    return ENTRIES[figures["model"]].title


def findings(stages: Sequence[Figures]) -> list[str]:
    """Sentences about the models of one task, in reading order.

    Args:
        stages: of one task, two or more.
    """
    found = [_losses(stages), *_gain(stages), _quality(stages), *_lengths(stages), *_alignments(stages)]
    return [*found, *_speed(stages)]


def _losses(stages: Sequence[Figures]) -> str:
    ranked = sorted(stages, key=lambda one: one["held_out_loss"])
    best, last = ranked[0], ranked[-1]
    text = (
        f"Held-out loss: {title(best)} is lowest with {best['held_out_loss']:.3f} nats a token, {title(last)} highest with "
        f"{last['held_out_loss']:.3f}."
    )
    near = [title(one) for one in ranked[1:] if one["held_out_loss"] - best["held_out_loss"] < CLOSE_LOSS]
    return text + (f" Within {CLOSE_LOSS} of the lowest: {_listed(near)}." if near else "")


def _gain(stages: Sequence[Figures]) -> Iterator[str]:
    """How the models with attention compare with the one without."""
    without = next((one for one in stages if one["model"] == "none"), None)
    if without is None:
        return
    gains = {title(one): without["held_out_loss"] - one["held_out_loss"] for one in stages if one is not without}
    better = [name for name, gain in gains.items() if gain >= CLOSE_LOSS]
    worse = [name for name, gain in gains.items() if gain <= -CLOSE_LOSS]
    same = [name for name in gains if name not in better and name not in worse]
    parts = [
        f"{text}: {_listed(names)}"
        for text, names in (
            (f"lower by {CLOSE_LOSS} or more", better),
            (f"differs by less than {CLOSE_LOSS}", same),
            (f"higher by {CLOSE_LOSS} or more", worse),
        )
        if names
    ]
    widest = max(gains, key=lambda name: abs(gains[name]))
    yield (
        f"Compared with the model without attention, held-out loss is {'; '.join(parts)}. The widest gap is {widest}'s, "
        f"{abs(gains[widest]):.3f} nats {'lower' if gains[widest] > 0 else 'higher'}."
    )


def _quality(stages: Sequence[Figures]) -> str:
    ranked = sorted(stages, key=lambda one: -one["bleu"])
    best, last = ranked[0], ranked[-1]
    if best["bleu"] < LEAST_BLEU:
        return (
            f"BLEU stays below {LEAST_BLEU:g} for every model (best: {title(best)}, {best['bleu']:.2f}): with so little "
            "training no model translates yet, and ranks by BLEU mean nothing."
        )
    near = [title(one) for one in ranked[1:] if best["bleu"] - one["bleu"] < CLOSE_BLEU]
    text = f"BLEU on {best['pairs']} held-out pairs: {title(best)} leads with {best['bleu']:.2f}"
    text += f"; closer than {CLOSE_BLEU:g} to it: {_listed(near)}" if near else f", {_gap(ranked)}"
    text += f". Last is {title(last)} with {last['bleu']:.2f}."
    first = max(stages, key=lambda one: one["chrf"])
    agrees = "the same model leads" if first is best else f"{title(first)} leads"
    return f"{text} By chrF {agrees} ({first['chrf']:.2f})."


def _gap(ranked: Sequence[Figures]) -> str:
    second = ranked[1]
    return f"{ranked[0]['bleu'] - second['bleu']:.2f} ahead of {title(second)}"


def _lengths(stages: Sequence[Figures]) -> Iterator[str]:
    """From the shortest sources to the longest with enough pairs."""
    usable = [i for i, bucket in enumerate(stages[0]["by_length"]) if bucket["pairs"] >= LEAST_PAIRS]
    able = [one for one in stages if one["bleu"] >= LEAST_BLEU]
    if len(usable) < 2 or len(able) < 2:
        return
    first, last = usable[0], usable[-1]
    changes = {title(one): one["by_length"][last]["bleu"] - one["by_length"][first]["bleu"] for one in able}
    ranked = sorted(changes, key=lambda name: -changes[name])
    buckets = stages[0]["by_length"]
    longest = max(able, key=lambda one: one["by_length"][last]["bleu"])
    yield (
        f"From sources of {buckets[first]['words']} words to those of {buckets[last]['words']}, BLEU changes by "
        f"{changes[ranked[0]]:+.1f} ({ranked[0]}) to {changes[ranked[-1]]:+.1f} ({ranked[-1]}). On the longest "
        f"{title(longest)} is best with {longest['by_length'][last]['bleu']:.2f}."
    )


def _alignments(stages: Sequence[Figures]) -> Iterator[str]:
    aligned = sorted(
        (one for one in stages if one["alignment"] is not None), key=lambda one: one["alignment"]["error_rate"]
    )
    if not aligned:
        return
    rate = {title(one): one["alignment"]["error_rate"] for one in aligned}
    diagonal = aligned[0]["alignment"]["diagonal"]
    best = next(iter(rate))
    near = [name for name in rate if name != best and rate[name] - rate[best] < CLOSE_RATE]
    text = f"Alignment error rate: {best} is lowest with {rate[best]:.3f}"
    text += f", within {CLOSE_RATE} of it {_listed(near)}" if near else ""
    above = [name for name in rate if rate[name] >= diagonal]
    text += f". A diagonal alignment has {diagonal:.3f}; "
    text += f"not better than that: {_listed(above)}." if above else "every model is below that."
    translator = max(stages, key=lambda one: one["bleu"])
    if translator["bleu"] >= LEAST_BLEU and len(aligned) > 1:
        same = title(translator) == best
        text += f" The best aligner is {'also' if same else 'not'} the one with the highest BLEU."
    several = [one for one in aligned if one["alignment"]["heads"] > 1]
    for one in several:
        kept = one["alignment"]
        text += (
            f" Of {title(one)}'s {kept['heads']} heads, head {kept['head']} of layer {kept['layer']} was chosen on other "
            f"sentences, with an error rate of {kept['chosen_at']:.3f}."
        )
    yield text


def _speed(stages: Sequence[Figures]) -> Iterator[str]:
    timed = sorted(
        (one for one in stages if one["tokens_per_second"]), key=lambda one: -one["tokens_per_second"]
    )  # fmt: skip
    if len(timed) > 1:
        fastest, slowest = timed[0], timed[-1]
        yield (
            f"Training speed: {title(fastest)} is fastest with {fastest['tokens_per_second']:,.0f} target tokens a second, "
            f"{fastest['tokens_per_second'] / slowest['tokens_per_second']:.1f} times {title(slowest)}, the slowest."
        )


def _listed(names: Sequence[str]) -> str:
    # Titles hold commas.
    return "; ".join(names) if any("," in name for name in names) else ", ".join(names)
