"""Settings of the documentation: ``make docs`` builds it, and needs no network."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import tenzoo  # noqa: E402  # of this folder

project = "tenzoo"
author = copyright = "The tenzoo developers"
version = release = tenzoo.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "native_math",
    "project_pages",
]
templates_path = ["_templates"]
exclude_patterns = ["*.py", "_ext", "_static"]

# ---- the interface: what __all__ of each public package names --------------------------------------------------------
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # those of Lightning and torch are in their own documentation
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

# ---- pages and notebooks ---------------------------------------------------------------------------------------------
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # benchmarks/README.md, as written by `make bench`, has no second level
nb_execution_mode = os.environ.get("NB_EXECUTION", "cache")  # "force" runs all notebooks again, "off" none
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 600  # seconds of a cell
nb_execution_raise_on_error = True
nb_merge_streams = True

# ---- the site --------------------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"tenzoo {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
