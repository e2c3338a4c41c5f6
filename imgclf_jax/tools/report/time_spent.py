"""Where the wall time of a run went, as a stacked bar."""

from imgclf_jax.core.terminal import duration
from imgclf_jax.run import goodput, writers
from imgclf_jax.run.record import Record
from imgclf_jax.tools.pages.html import paragraph, text

_WIDTH, _HEIGHT = 1000, 28
# The order of the parts, each with its color.
_PARTS = {"steps": 0, "input": 1, "evaluation": 2, "checkpoint": 3, "processes": 4, "recomputed": 6, "compile": 5,
          "setup": 7, "other": 8, "idle": 9}  # fmt: skip


def section(run: Record) -> str:
    """Draws the time of each phase over all processes of a run; "" for a run that did not record it."""
    lines = goodput.last_of_each(writers.read_metrics(run.path / goodput.NAME))
    seconds = goodput.sum_up(lines)
    whole = sum(seconds.values())
    if not whole:
        return ""
    seconds["setup"] += seconds.pop("import")
    shares = {name: seconds[name] / whole for name in _PARTS if seconds[name] > 0.0005 * whole}
    started = f" in {len(lines)} attempts" if len(lines) > 1 else ""
    sentence = (f"The run took {duration(whole)}{started}, from its first start to its last record. Training steps "
                f"took {goodput.goodput(seconds):.1%} of that time, its goodput.")  # fmt: skip
    return paragraph(sentence) + _bar(shares) + _legend(shares, seconds)


def _bar(shares: dict[str, float]) -> str:
    description = "Fractions of the wall time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    left, parts = 0.0, []
    for name, share in shares.items():
        width = share / sum(shares.values()) * _WIDTH
        parts.append(f'<rect class="dot c{_PARTS[name]}" x="{left:.1f}" y="0" width="{width:.1f}" height="{_HEIGHT}">'
                     f"<title>{name} {share:.1%}</title></rect>")  # fmt: skip
        left += width
    return (f'<svg class="spent" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{text(description)}">{"".join(parts)}</svg>')  # fmt: skip


def _legend(shares: dict[str, float], seconds: dict[str, float]) -> str:
    swatch = '<svg viewBox="0 0 32 14" aria-hidden="true"><rect class="dot c{}" width="32" height="14"/></svg>'
    items = [f"<li>{swatch.format(_PARTS[name])}{name} {share:.1%} ({duration(seconds[name])})</li>"
             for name, share in shares.items()]  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>'
