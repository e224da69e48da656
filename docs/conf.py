"""How Sphinx builds these pages: `python -m sphinx docs build/docs`."""

project = "lossloop"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
myst_heading_anchors = 3
exclude_patterns = ["build"]
html_title = "lossloop"
# The map of the pages is index.md itself, in prose.
suppress_warnings = ["toc.not_included", "myst.xref_missing"]
