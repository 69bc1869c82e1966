"""The site: Sphinx with MyST, so that the pages stay Markdown that reads well without a site, and furo's theme.

Why these: Sphinx imports the library, so what the reference shows is what `help` shows, and it is in steady
development; MkDocs, the other one considered, has had no release since 1.6.1 in 2024. `make docs` builds without a
network and fails at a warning.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "site")]

import peftfn as pf  # noqa: E402  (found by the path above)

project = "peftfn"
author = "the authors of peftfn"
version = release = pf.__version__
html_title = f"{project} {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "reference",
]
exclude_patterns = ["build"]
nitpicky = False  # annotations name types of torch, whose inventory is not here
suppress_warnings = ["myst.header"]  # a page of the reference starts its sections where the page says

# Pages
myst_heading_anchors = 4  # links like many.md#gates, as on a code host
myst_enable_extensions = ["colon_fence"]

# The reference
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # a sentence, whose first words are no type
add_module_names = False

# Appearance
html_theme = "furo"
html_favicon = "site/static/icon.svg"
html_static_path = ["site/static"]
html_css_files = ["peftfn.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
