"""The pages as a site, built by ``make docs``; pages of the whole repository link to each other."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

from fellrec import __version__

sys.path.insert(0, str(Path(__file__).parent))
from settings_page import reference

project = "fellrec"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "README.md",
    "[CS]*.md",
    "docs/*.md",
    "docs/*.rst",
    "experiments/*/README.md",
    "benchmarks/*.md",
]
exclude_patterns = [".venv", "build", "runs"]
root_doc = "docs/index"
myst_heading_anchors = 4
napoleon_use_ivar = True
html_theme = "furo"
html_title = "fellrec"
autodoc_member_order = "bysource"
autodoc_typehints = "description"


def setup(app: Sphinx) -> None:
    """Add the tables of settings to their page."""
    app.connect("source-read", _with_settings)


def _with_settings(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "docs/configuration":
        source[0] += f"\n{reference()}"
