"""How Sphinx builds the documentation: `uv run --group docs sphinx-build -W -b html docs docs/_build`."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent.parent))

from imgclf_jax import config as configs

project = "imgclf_jax"
copyright = "its authors, Apache License 2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "sphinx_copybutton"]
templates_path = ["_templates"]
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
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
copybutton_prompt_text = "$ "  # of blocks with output, the commands alone are copied
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


class Notebook(MystParser):
    """Reads a notebook as Markdown: its text, its code, and what the code printed."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", ()))
            parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
        super().parse("\n\n".join(parts), document)


def _without_flax_fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A linen module without a docstring inherits one of Flax, which says nothing of it."""
    if inspect.isclass(obj) and "__doc__" not in vars(obj):
        lines.clear()


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """What Flax adds to each module and dataclass."""
    return True if name in ("name", "parent", "scope", "replace") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    listed = Path(__file__).with_name("api.md").read_text(encoding="utf-8").split()
    for page in Path(__file__).with_name("api").glob("*.rst"):  # autosummary's, of modules that are gone
        if page.stem not in listed:
            page.unlink()
    app.add_directive("config-keys", ConfigKeys)
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(Notebook)
    app.connect("autodoc-process-docstring", _without_flax_fields)
    app.connect("autodoc-skip-member", _skip)
