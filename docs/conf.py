"""Sphinx's settings for the site that `make docs` builds from this folder."""

from __future__ import annotations

import sys
from pathlib import Path

# The pages' generators are beside this file, and read the packages in the folder above it.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

project = "manyheads"
author = "the manyheads authors"
html_title = "manyheads"

extensions = ["myst_parser", "site_pages"]
exclude_patterns = ["_static"]
highlight_language = "text"
# Two hyphens are those of an option.
smartquotes = False

# Headings have the anchors that GitHub gives them, and links to a page or anchor that does not exist are warnings.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "deflist"]
myst_dmath_double_inline = True

html_theme = "furo"
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
# Equations are MathML, which browsers show without a script.
html_math_renderer = "mathml"
