"""Pictures of attention: written, readable, and drawn with fonts that hold the letters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from transformer.interpret.capture import AttentionMaps
from transformer.interpret.plot import MAX_LABELS, drawable, plot_grid, plot_head, save_plots, thinned


def maps_of(tokens, layers=(0, 2), heads=(1, 3, 4)):
    size = len(tokens)
    weights = np.tril(np.random.default_rng(0).random((len(layers), len(heads), size, size), np.float32))
    weights /= weights.sum(-1, keepdims=True)
    return AttentionMaps(tuple(tokens), tuple(tokens), layers, heads, weights)


def drawn(figure):
    """The picture's pixels; any complaint of matplotlib's is an error in this suite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_every_token_is_on_both_axes():
    figure = plot_head(maps_of(["The", " cat", "\n", "\t", "$x_1$", "", "</script>"]), 2, 3)
    shown = ["The", "␣cat", "↵", "⇥", "$x_1$", "∅", "</script>"]
    axes = figure.axes[0]
    assert labels_of(axes.xaxis) == labels_of(axes.yaxis) == shown
    assert axes.get_title() == "layer 2, head 3"
    assert drawn(figure).std() > 10


def test_letters_of_any_script_are_drawn_or_spelt_out():
    figure = plot_head(maps_of(["你好", "мир", "שלום", "日本", "😀", "\U0001fae8", "\u0378", "é"]), 0, 1)
    drawn(figure)
    for label in labels_of(figure.axes[0].xaxis):
        assert drawable([label])[1] == [label]


def test_a_letter_that_no_font_has_becomes_its_number():
    assert drawable(["a\U000e0fff"])[1] == ["a‹U+E0FFF›"]


def test_long_texts_get_fewer_labels():
    figure = plot_head(maps_of([f"word{number}" for number in range(300)], (0,), (0,)), 0, 0)
    labels = labels_of(figure.axes[0].xaxis)
    assert labels[:3] == ["word0  0", "word5  5", "word10  10"]
    assert len(labels) <= MAX_LABELS
    width, height = figure.get_size_inches()
    assert width <= 15 and height <= 14


@pytest.mark.parametrize(("count", "step"), [(1, 1), (64, 1), (65, 2), (129, 5), (1024, 20), (100_000, 2000)])
def test_thinning(count, step):
    assert thinned(count).step == step
    assert 1 <= len(thinned(count)) <= MAX_LABELS


def test_rows_and_columns_may_be_of_two_texts():
    weights = np.full((1, 1, 2, 3), 1 / 3, np.float32)
    figure = plot_head(
        AttentionMaps(("le", "chat"), ("the", "black", "cat"), (0,), (0,), weights, same_tokens=False), 0, 0
    )
    assert labels_of(figure.axes[0].xaxis) == ["the", "black", "cat"]
    assert labels_of(figure.axes[0].yaxis) == ["le", "chat"]


def test_the_grid_has_a_panel_for_each_head():
    figure = plot_grid(maps_of("abcd"))
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:3]] == ["head 1", "head 3", "head 4"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["layer 0", "layer 2"]


def test_files(tmp_path):
    written = save_plots(maps_of("abcd", (0,), (1, 2)), tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["heads.png", "layer-0-head-1.png", "layer-0-head-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_library_loads_no_matplotlib():
    code = "import sys, transformer.interpret, transformer.models.gpt; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
