"""HTML building blocks: the document with its style sheet, text, tables, figures and legends.

Functions return HTML. `text` escapes everything that comes from a run.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import escape_surrogates, printable

_STYLE = Path(__file__).with_name("page.css")


def document(title: str, parts: Sequence[str]) -> str:
    """Returns a page with these parts, without the empty ones."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write(path: Path, page: str) -> None:
    """Writes a page atomically, with bytes that are not UTF-8 escaped. Raises UserError if that fails."""
    try:
        paths.write_atomically(path, escape_surrogates(page))
    except OSError as e:
        raise UserError(f"--html={path} cannot be written: {e.strerror}; name another file") from e


def text(value: str) -> str:
    """Escapes text for HTML, and unprintable characters for people."""
    return escape(printable(value))


def paragraph(value: str, note: bool = False) -> str:
    """Returns a paragraph; a `note` is fainter."""
    return f"<p{' class="note"' if note else ''}>{text(value)}</p>"


def region(label: str, inner: str) -> str:
    """Wraps wide content so that it scrolls on its own, also by keyboard."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{text(label)}">{inner}</div>'


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1, best: bool = False
) -> str:
    """Returns a table whose first `keys` columns name the row. With `best` the first row is highlighted."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row">{text(cell)}</th>' if i < keys else f"<td>{text(cell)}</td>"
                 for i, cell in enumerate(row)]  # fmt: skip
        lines.append(f"<tr{' class="best"' if best and not number else ''}>{''.join(cells)}</tr>")
    return region(caption, f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
                           f"<tbody>{''.join(lines)}</tbody></table>")  # fmt: skip


def charts(figures: Sequence[tuple[str, str]]) -> str:
    """Puts charts side by side, as many as fit, given (caption, svg) of each; those that are "" are left out."""
    shown = [f"<figure><figcaption>{text(caption)}</figcaption>{svg}</figure>" for caption, svg in figures if svg]
    return f'<div class="charts">{"".join(shown)}</div>'


def legend(names: Sequence[tuple[str, int, bool]]) -> str:
    """Returns the legend of charts, given (name, color, dashed) of each line."""
    swatch = '<svg viewBox="0 0 32 14" aria-hidden="true"><path class="line c{}{}" d="M0 7H32"/></svg>'
    items = [f"<li>{swatch.format(color, ' dashed' if dashed else '')}{text(name)}</li>"
             for name, color, dashed in names]  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>'


def details(summary: str, inner: str) -> str:
    """Returns a collapsible block."""
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def code(label: str, lines: Sequence[str]) -> str:
    """Returns a code block."""
    inner = "\n".join(map(text, lines))
    return f'<pre role="region" tabindex="0" aria-label="{text(label)}"><code>{inner}</code></pre>'
