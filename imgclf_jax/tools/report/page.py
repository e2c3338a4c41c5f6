"""The page of `report`: a trained run in one HTML file without scripts."""

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from imgclf_jax.config import KEYS, flatten
from imgclf_jax.core.text import decimals, interval
from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.run.provenance import PACKAGES, find_differences
from imgclf_jax.run.ranking import main_metric
from imgclf_jax.run.record import Record
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.html import paragraph, table, text
from imgclf_jax.tools.report import curves as report_curves
from imgclf_jax.tools.report import sets as report_sets
from imgclf_jax.tools.report.findings import Findings

_MAX_CHANGES = 8  # differences of two starts of the run that are named


def page(run: Record, findings: Findings, names: Sequence[str]) -> str:
    """Returns the page as HTML. `names` are the class names. All text from the run is escaped."""
    sections = [("model", "Model", _model(findings)), ("curves", "Learning curves", report_curves.curves(run))]
    for i, one in enumerate(findings.sets):
        inner = report_sets.set_section(one, names, run.config.num_seeds)
        sections.append((f"set-{i}", f"Evaluation set {one.name}", inner))
    sections += [("configuration", "Configuration", _configuration(run)),
                 ("provenance", "Provenance", _provenance(run, findings)),
                 ("again", "Make it again", _commands(run, findings))]  # fmt: skip
    sections = [(anchor, title, inner) for anchor, title, inner in sections if inner]
    title = f"{run.workdir.path.resolve().name}: {_headline(run, findings)}"
    links = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name, _ in sections)
    return html.document(title, [
        f"<h1>{text(title)}</h1>", _summary(run, findings),
        *(paragraph(sentence) for sentence in findings.missing),
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
        *(f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(name)}</h2>{inner}</section>'
          for anchor, name, inner in sections),
    ])  # fmt: skip


def _headline(run: Record, findings: Findings) -> str:
    results: dict[str, JsonMapping] = {one.name: one.evaluated.metrics for one in findings.sets}
    results = results or {name: value for name, value in run.result.items() if isinstance(value, dict)}
    reported = {f"{name}/{kind}" for name, values in results.items() for kind in values}
    found = main_metric(run.config.checkpoint.best, run.config.data.eval, reported)
    if found is None:
        return f"{run.step} steps"
    name, _, kind = found[0].partition("/")
    std = results[name].get(f"{kind}_std", math.nan)
    spread = f" ± {decimals(std)}" if math.isfinite(std) else ""
    for score in (one.evaluated.scores.get(kind, {}) for one in findings.sets if one.name == name and not spread):
        spread += f" (95 % interval: {interval(score['low'], score['high'])})" if "low" in score else ""
    return f"{name} {kind.replace('_', ' ')} {decimals(results[name][kind])}{spread}"


def _summary(run: Record, findings: Findings) -> str:
    summary = f"{run.config.model} on {run.config.data.source}"
    summary += "." if findings.step is None else f", at step {findings.step}."
    if not run.result:
        summary += f" The run is unfinished: its last record is from step {run.step}" + (
            f" of {run.total}." if run.total else ".")  # fmt: skip
    if why := run.result.get("stopped_early"):
        summary += f" It stopped early at step {run.step} of {run.total}: {why}."
    if run.config.num_seeds > 1:
        seeds = f"{run.seeds[0]} to {run.seeds[-1]}"
        summary += f" It trained {run.config.num_seeds} seeds, {seeds}, at once; ± is their sample standard deviation."
    return paragraph(summary)


def _model(findings: Findings) -> str:
    """Tabulates the parameters of the model's modules."""
    if not findings.parameters:
        return ""
    total = f"{sum(findings.parameters.values()):,} parameters, {findings.flops / 1e6:,.3g} MFLOPs"
    total += " for the forward pass of an image: two per multiply-add of a matmul."
    rows = [[name, f"{count:,}"] for name, count in findings.parameters.items()]
    return paragraph(total) + table("Parameters of the model", ["module", "parameters"], rows)


def _configuration(run: Record) -> str:
    """Tabulates the keys that differ from their defaults, with the others in a closed block."""
    values = flatten(run.config)
    changed = [key for key, (default, _) in KEYS.items() if values[key] != default]
    others = [key for key in KEYS if key not in changed]
    rows = [[key, repr(values[key]), repr(KEYS[key][0])] for key in changed]
    keys = table("Keys that differ from their defaults", ["key", "value", "default"], rows) if rows else ""
    rest = "".join(f"<dt>{text(key)}</dt><dd>{text(repr(values[key]))}</dd>" for key in others)
    return f'<div class="keys">{keys}</div>' + html.details(
        f"The other {len(others)} keys, at their defaults", f"<dl>{rest}</dl>"
    )


def _provenance(run: Record, findings: Findings) -> str:
    provenance, result = run.provenance, run.result
    git, data = provenance.get("git") or {}, provenance.get("data") or {}
    devices = Counter(provenance.get("devices") or ())
    facts = {
        "trained": result and f"{result['step']} steps in {result.get('seconds')} s by the process that ended the run",
        "started": provenance.get("started"),
        "digest of the parameters": result.get("params_sha256"),
        "checkpoint of this page": findings.step is not None and f"step {findings.step}",
        "commit": git.get("commit") and git["commit"] + (", with uncommitted changes" if git.get("changed") else ""),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "processes": provenance.get("processes"),
        "training examples": data.get("train_examples"),
        "images": " x ".join(map(str, data.get("image_shape") or ())),
        "fingerprint of the training data": data.get("fingerprint"),
        "unreadable files": len(provenance.get("unreadable") or ()),
        "started from": ", ".join(f"{key} {value}" for key, value in (provenance.get("init_from") or {}).items()),
        "Python": provenance.get("python"),
        "platform": provenance.get("platform"),
        "packages": ", ".join(f"{name} {version}" for name, version in (provenance.get("packages") or {}).items()
                              if name in PACKAGES),
    }  # fmt: skip
    for before, after in itertools.pairwise(run.snapshots):
        changed = "; ".join(map(str, find_differences(before, after)[:_MAX_CHANGES]))
        facts[f"resumed at step {after.get('step')}"] = changed or "nothing else changed"
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(str(value))}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{rows}</dl>'


def _commands(run: Record, findings: Findings) -> str:
    """Lists the commands that train, evaluate and report the run again."""
    train = [str(word) for word in run.provenance.get("command") or ()]
    lines = []
    if commit := (run.provenance.get("git") or {}).get("commit"):
        lines.append(f"git checkout {shlex.quote(str(commit))}")
    if train:
        name = Path(train[0]).name
        lines.append("uv run " + shlex.join([name if name == "launch.py" else train[0], *train[1:]]))
    workdir = f"--workdir={run.workdir.path}"
    flag = [] if findings.step is None else [f"--checkpoint={findings.step}"]
    lines += [shlex.join(["uv", "run", "launch.py", command, workdir, *flag]) for command in ("evaluate", "report")]
    note = "The run's config.json has the value of every key, even if the config file has changed since."
    return html.code("Commands", lines) + paragraph(note, note=True)
