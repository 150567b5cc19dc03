"""The page as a file: what is in it comes back out, and nothing in it is more than text."""

from __future__ import annotations

import html
import html.parser
import json
import re

import numpy as np
import pytest

from tests.interpret.attention_pages import HOSTILE, maps_of, two_texts
from transformer.interpret import AttentionMaps
from transformer.interpret.page import decode, encode, page
from transformer.interpret.rollout import entropy, mean_distance, rollout


class Elements(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data += data


def data_of(text):
    return json.loads(Elements(text).data)


def test_weights_come_back_to_three_digits():
    maps = maps_of([f"t{number}" for number in range(40)])
    data = data_of(page(maps))
    for layer in range(3):
        for head in range(2):
            read = decode(data["maps"][layer][head], 40, 40)
            weights = maps.weights_LNTS[layer, head]
            np.testing.assert_allclose(read, weights, rtol=2e-4, atol=2.0**-32)
            np.testing.assert_array_equal(read == 0, weights == 0)


def test_measures_and_rollout_are_those_of_the_library():
    maps = maps_of(list("abcde"))
    data = data_of(page(maps))
    np.testing.assert_allclose(data["entropy"], entropy(maps.weights_LNTS), rtol=1e-6)
    np.testing.assert_allclose(data["distance"], mean_distance(maps.weights_LNTS), rtol=1e-6)
    read = [decode(text, 5, 5) for text in data["rollout"]]
    np.testing.assert_allclose(read, rollout(maps.weights_LNTS), rtol=2e-4)
    assert (data["layers"], data["heads"]) == ([0, 1, 2], [0, 3])


@pytest.mark.parametrize(("layers", "through"), [((0, 1, 2), 3), ((0, 1, 4), 2), ((1, 2), 0)])
def test_rollout_ends_at_a_gap_between_layers(layers, through):
    assert len(data_of(page(maps_of("abc", layers)))["rollout"]) == through


def test_two_texts_have_no_distance_and_no_rollout():
    data = data_of(page(two_texts()))
    assert (data["rows"], data["columns"][1]) == (["le", "chat", "dort"], "black")
    assert data["distance"] is None
    assert data["rollout"] == []
    assert decode(data["maps"][0][1], 3, 5).shape == (3, 5)


def test_hostile_tokens_and_titles_add_no_element():
    tame = Elements(page(maps_of(["x"] * len(HOSTILE))))
    text = page(maps_of(HOSTILE, title=HOSTILE[0] + "$policy"))
    wild = Elements(text)
    assert [tag for tag, _ in wild.tags] == [tag for tag, _ in tame.tags]
    assert not any(name.startswith("on") for _, attributes in wild.tags for name in attributes)
    assert json.loads(wild.data)["rows"][0] == HOSTILE[0].replace(" ", "␣")
    assert "<img" not in text
    assert json.loads(wild.data)["rows"][6] == "‹U+202E›right␣to␣left"


def test_nothing_comes_from_elsewhere():
    text = page(maps_of("abc"))
    for tag, attributes in Elements(text).tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(attributes["content"] for tag, attributes in Elements(text).tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_a_long_text_stays_small():
    maps = maps_of(["word"] * 256, (0,), (0,))
    assert len(encode(maps.weights_LNTS[0, 0])) < 2.2 * 256 * 256


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.nan])
def test_what_is_no_weight(bad):
    with pytest.raises(ValueError, match="from 0 to 1"):
        encode(np.full((2, 2), bad, np.float32))


def test_extremes():
    weights = np.array([[0, 1, 1.0000001, 1e-12, 2.0**-32]], np.float32)
    np.testing.assert_allclose(decode(encode(weights), 1, 5), [[0, 1, 1, 2.0**-32, 2.0**-32]])


def test_a_notebook_shows_the_page_in_a_closed_frame():
    maps = maps_of(HOSTILE, title='"><script>')
    frame = Elements(maps._repr_html_())
    (tag, attributes), *others = frame.tags
    assert (tag, others) == ("iframe", [])
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == page(maps)


def test_save(tmp_path):
    maps = maps_of(["日本", "\udc80"])
    assert maps.save(tmp_path / "page.html").read_text("utf-8") == page(maps)
    assert isinstance(maps, AttentionMaps)
