"""The page as a person uses it, in Chromium, opened as a file.

Without a Chromium the tests are skipped, unless MANYHEADS_REQUIRE_BROWSER=1 says that there must be one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.interpret.attention_pages import HOSTILE, maps_of, two_texts

TOKENS = ("The", " cat", " sat", "\n", " 猫", "</b>", " down", ".")


@pytest.fixture
def show(browser, tmp_path):
    """Open a page of some maps; at the end nothing may have gone wrong in it, nor asked for anything."""
    pages, troubles, requests = [], [], []

    def show(maps, **options):
        path = maps.save(tmp_path / "page.html")
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}} | options)
        pages.append(page)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelector('#map .legend .largest').textContent !== ''")
        return page

    yield show
    for page in pages:
        page.close()
    assert troubles == []
    assert all(url.startswith("file:///") and url.endswith("/page.html") for url in requests), requests


def hover(page, t, s, shape, view="map"):
    """Move the pointer to the middle of a cell."""
    box = page.locator(f"#{view} .cells canvas").bounding_box()
    page.mouse.move(box["x"] + (s + 0.5) * box["width"] / shape[1], box["y"] + (t + 0.5) * box["height"] / shape[0])


def shown_weight(page):
    return float(page.locator("#tip b").inner_text())


def test_hovering_shows_the_number_and_both_tokens(show):
    maps = maps_of(TOKENS)
    page = show(maps)
    for t, s in ((0, 0), (5, 2), (7, 7), (6, 4), (7, 1), (1, 6)):
        hover(page, t, s, (8, 8))
        assert shown_weight(page) == pytest.approx(float(maps.weights_LNTS[0, 0, t, s]), rel=6e-3, abs=1e-9)
    # To the digit where rounding is not near a tie.
    hover(page, 7, 4, (8, 8))
    assert page.locator("#tip .query").inner_text() == "query . (7)"
    assert page.locator("#tip .key").inner_text() == "key ␣猫 (4)"
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_numbers_are_right_to_three_digits(show):
    maps = maps_of(TOKENS)
    weights = maps.weights_LNTS[0, 0]
    page = show(maps)
    for t, s in zip(*np.nonzero(weights), strict=True):
        hover(page, t, s, (8, 8))
        # Half of the third digit, and the 0.02% of the encoding.
        weight = float(weights[t, s])
        third = 10.0 ** (math.floor(math.log10(weight)) - 2)
        assert shown_weight(page) == pytest.approx(weight, abs=0.5 * third + 2e-4 * weight)


def test_a_thumbnail_opens_its_head(show):
    maps = maps_of(TOKENS)
    page = show(maps)
    page.click("#tab-grid")
    thumbnails = page.locator("#grid button")
    assert thumbnails.count() == 6
    page.get_by_role("button", name="Layer 2, head 3").click()
    assert page.locator("#map").is_visible()
    assert page.locator("#layer option:checked").inner_text() == "2"
    assert page.locator("#head option:checked").inner_text() == "3"
    page.wait_for_timeout(100)
    hover(page, 6, 2, (8, 8))
    assert shown_weight(page) == pytest.approx(float(maps.weights_LNTS[2, 1, 6, 2]), rel=6e-3)


def test_the_keyboard_is_enough(show):
    maps = maps_of(TOKENS)
    page = show(maps)
    page.focus("#tab-map")
    page.keyboard.press("ArrowRight")
    assert page.locator("#lines").is_visible()
    page.keyboard.press("ArrowLeft")
    page.locator("#map .cells").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert shown_weight(page) == pytest.approx(float(maps.weights_LNTS[0, 0, 3, 1]), rel=6e-3)
    assert "↵" in page.locator("#tip .query").inner_text()
    page.select_option("#head", label="3")
    page.get_by_role("button", name="Next layer").press("Enter")
    page.wait_for_timeout(100)
    hover(page, 5, 3, (8, 8))
    assert shown_weight(page) == pytest.approx(float(maps.weights_LNTS[1, 1, 5, 3]), rel=6e-3)


def test_lines_show_where_a_token_looks_and_who_looks_at_it(show):
    maps = maps_of(TOKENS)
    page = show(maps)
    page.click("#tab-lines")
    page.locator("#lines .rows button").nth(4).click()
    page.mouse.move(2, 2)
    numbers = page.locator("#lines .columns small").all_inner_texts()
    for s, text in enumerate(numbers):
        weight = float(maps.weights_LNTS[0, 0, 4, s])
        assert text == "" if weight < 0.002 else float(text) == pytest.approx(weight, rel=6e-3)
    page.locator("#lines .columns button").nth(0).hover()
    assert float(page.locator("#lines .rows small").nth(0).inner_text()) == 1


def test_measures_sort_and_open(show):
    page = show(maps_of(TOKENS))
    page.click("#tab-measures")
    page.get_by_role("button", name="Entropy (bits)").click()
    values = [float(text) for text in page.locator("#measures td:nth-child(2) span").all_inner_texts()]
    assert values == sorted(values)
    page.locator("#measures td button").nth(3).click()
    assert page.locator("#map").is_visible()


def test_rollout_has_its_own_map(show):
    from transformer.interpret.rollout import rollout

    maps = maps_of(TOKENS)
    page = show(maps)
    page.click("#tab-rollout")
    page.select_option("#layer", label="2")
    page.wait_for_timeout(100)
    hover(page, 5, 2, (8, 8), "rollout")
    assert shown_weight(page) == pytest.approx(float(rollout(maps.weights_LNTS)[2, 5, 2]), rel=6e-3)


def test_hostile_tokens_are_text(show):
    page = show(maps_of(HOSTILE, title=HOSTILE[0]))
    title = page.title()
    for view in ("lines", "grid", "measures", "rollout", "map"):
        page.click(f"#tab-{view}")
    for t in range(len(HOSTILE)):
        hover(page, t, 0, (8, 8))
    page.wait_for_timeout(100)
    assert page.title() == title == HOSTILE[0]
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator("#lines .rows span").nth(0).text_content() == HOSTILE[0].replace(" ", "␣")


def test_words_of_two_languages(show):
    maps = two_texts()
    page = show(maps)
    assert page.locator("#tab-rollout").is_hidden()
    hover(page, 1, 2, (3, 5))
    assert shown_weight(page) == pytest.approx(float(maps.weights_LNTS[0, 0, 1, 2]), rel=6e-3)
    assert page.locator("#tip").inner_text().split("\n")[1:] == ["query chat (1)", "key cat (2)"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_every_view_fits_the_window_in_both_colours(show, width, scheme):
    page = show(
        maps_of([f"token{n}" for n in range(60)]), viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    for view in ("map", "lines", "grid", "measures", "rollout"):
        page.click(f"#tab-{view}")
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 29)") == (scheme == "dark")


def test_a_notebook_frame_works(browser, tmp_path):
    maps = maps_of(TOKENS)
    (tmp_path / "notebook.html").write_text("<!doctype html>" + maps._repr_html_(), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#tab-lines").click()
    assert frame.locator("#lines .rows button").count() == 8
    page.close()
