"""How Sphinx builds the manual; `tools/docs` runs it."""

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1] / "fusestore" / "__init__.py"
_VERSION = re.search(r'^__version__ = "(.+)"', _PACKAGE.read_text(), re.MULTILINE)
assert _VERSION

project = "fusestore"
author = "fusestore developers"
version = release = _VERSION[1]

extensions = ["myst_parser"]
myst_heading_anchors = 4
# FORMAT.md sets its tables two levels down.
suppress_warnings = ["myst.header"]
html_theme = "furo"
html_title = f"fusestore {release}"
html_copy_source = False
html_show_copyright = False
