"""The pages as a site, built by ``make docs``; pages of the whole repository link to each other."""

from fellrec import __version__

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
