"""What pages are put together of: the document with its style sheet, text, tables, figures and legends.

Whatever comes from a run passes through `text`, which escapes it. Functions give HTML, as text.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.run.provenance import write_atomically

_STYLE = Path(__file__).with_name("page.css")


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of these parts, without the empty ones."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write(path: Path, page: str) -> None:
    """Writes a page in one piece. Raises UserError if it cannot be written."""
    try:
        write_atomically(path, page)
    except OSError as e:
        raise UserError(f"--html={path} cannot be written: {e.strerror}; name another file") from e


def text(value: str) -> str:
    """Text as HTML: what is not printable is shown as its escape, and no tag begins in it."""
    return escape(printable(value))


def paragraph(value: str, note: bool = False) -> str:
    """A paragraph, of the text's color or fainter."""
    return f"<p{' class="note"' if note else ''}>{text(value)}</p>"


def region(label: str, inner: str) -> str:
    """What is wide scrolls by itself, with the keyboard too, and not the page."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{text(label)}">{inner}</div>'


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1, best: bool = False
) -> str:
    """A table, of which the first `keys` columns name the row. With `best` the first row stands out."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row">{text(cell)}</th>' if i < keys else f"<td>{text(cell)}</td>"
                 for i, cell in enumerate(row)]  # fmt: skip
        lines.append(f"<tr{' class="best"' if best and not number else ''}>{''.join(cells)}</tr>")
    return region(caption, f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
                           f"<tbody>{''.join(lines)}</tbody></table>")  # fmt: skip


def figure(caption: str, svg: str) -> str:
    """A chart with its name above it; nothing without a chart."""
    return f"<figure><figcaption>{text(caption)}</figcaption>{svg}</figure>" if svg else ""


def charts(figures: Sequence[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return f'<div class="charts">{"".join(figures)}</div>'


def legend(names: Sequence[tuple[str, int, bool]]) -> str:
    """What the lines of charts are: (name, color, dashed) of each."""
    swatch = '<svg viewBox="0 0 32 14" aria-hidden="true"><path class="line c{}{}" d="M0 7H32"/></svg>'
    items = [f"<li>{swatch.format(color, ' dashed' if dashed else '')}{text(name)}</li>"
             for name, color, dashed in names]  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>'


def details(summary: str, inner: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def code(label: str, lines: Sequence[str]) -> str:
    """Lines to copy."""
    inner = "\n".join(map(text, lines))
    return f'<pre role="region" tabindex="0" aria-label="{text(label)}"><code>{inner}</code></pre>'
