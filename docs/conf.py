"""How Sphinx builds the documentation: `uv run --group docs sphinx-build -W -b html docs docs/_build`."""

import inspect
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent.parent))

from imgclf_jax import config as configs

project = "imgclf_jax"
copyright = "its authors, Apache License 2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "imgclf_jax"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
smartquotes = False  # quotation marks are code more often than not
myst_heading_anchors = 3
nitpicky = False  # types of JAX and Flax have pages of their own, which need a network

autodoc_default_options = {"members": True, "member-order": "bysource"}
add_module_names = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings write `x` for code


class ConfigKeys(SphinxDirective):
    """A list of all config keys: each with its default and what it means."""

    def run(self) -> list[nodes.Node]:
        items = []
        for key, (default, meaning) in configs.KEYS.items():
            paragraph = nodes.paragraph()
            for i, part in enumerate(meaning.split("`")):  # `x` is code
                paragraph += nodes.literal(part, part) if i % 2 else nodes.Text(part)
            term = nodes.literal("", f"{key} = {default!r}")
            items.append(nodes.definition_list_item("", nodes.term("", "", term), nodes.definition("", paragraph)))
        return [nodes.definition_list("", *items)]


def _without_flax_fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A linen module without a docstring inherits one of Flax, which says nothing of it."""
    if inspect.isclass(obj) and "__doc__" not in vars(obj):
        lines.clear()


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """What Flax adds to each module and dataclass."""
    return True if name in ("name", "parent", "scope", "replace") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    app.connect("autodoc-process-docstring", _without_flax_fields)
    app.connect("autodoc-skip-member", _skip)
