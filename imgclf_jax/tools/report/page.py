"""The page of `report`: a trained run in one HTML file without scripts."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imgclf_jax.config import KEYS, flatten
from imgclf_jax.run.record import MAIN_METRICS, Record
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.html import paragraph, table, text
from imgclf_jax.tools.report import curves as report_curves
from imgclf_jax.tools.report import sets as report_sets
from imgclf_jax.tools.report.findings import Evaluated, Findings


class Section(NamedTuple):
    """A part of the page with a heading of its own; `place` is what a link names."""

    place: str
    title: str
    inner: str


def page(run: Record, provenance: Mapping[str, Any], findings: Findings, names: Sequence[str]) -> str:
    """The whole page. `names` are those of the classes. Everything on it that comes from the run is escaped."""
    config = run.config
    sections = [Section("curves", "Learning curves", report_curves.curves(run))]
    for number, one in enumerate(findings.sets):
        inner = report_sets.of_set(one, names, config.num_seeds)
        sections.append(Section(f"set-{number}", f"Evaluation set {one.name}", inner))
    if findings.augmented:
        ops = " and ".join(dict.fromkeys(filter(None, (config.preprocess, config.augment))))
        inner = report_sets.of_augmentation(findings.augmented, ops, config.mix)
        sections.append(Section("augmentation", "Augmentation", inner))
    sections += [
        Section("configuration", "Configuration", _configuration(run)),
        Section("provenance", "Provenance", _provenance(run, provenance, findings)),
        Section("again", "Make it again", _again(run, provenance, findings)),
    ]
    sections = [one for one in sections if one.inner]
    title = f"{run.workdir.path.resolve().name}: {_headline(run, findings)}"
    links = "".join(f'<li><a href="#{one.place}">{text(one.title)}</a></li>' for one in sections)
    return html.document(title, [
        f"<h1>{text(title)}</h1>", _summary(run, findings),
        *(paragraph(sentence) for sentence in findings.missing),
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
        *(f'<section aria-labelledby="{one.place}"><h2 id="{one.place}">{text(one.title)}</h2>{one.inner}</section>'
          for one in sections),
    ])  # fmt: skip


def _results(run: Record, findings: Findings) -> dict[str, Mapping[str, Any]]:
    """The metrics of each evaluation set: as they are found now, else as the run has recorded them."""
    if findings.sets:
        return {one.name: one.metrics for one in findings.sets}
    return {name: value for name, value in (run.final or {}).items() if isinstance(value, dict)}


def _headline(run: Record, findings: Findings) -> str:
    for name, values in _results(run, findings).items():
        if kind := next((kind for kind in MAIN_METRICS if kind in values), ""):
            deviation = values.get(f"{kind}_std", math.nan)
            spread = f" ± {deviation:.4f}" if math.isfinite(deviation) else ""
            return f"{name} {kind.replace('_', ' ')} {values[kind]:.4f}{spread}"
    return f"{run.step} steps"


def _summary(run: Record, findings: Findings) -> str:
    said = f"{run.config.model} on {run.config.data.source}"
    if findings.step is not None:
        said += f", as it is at step {findings.step}"
    said += "."
    if findings.sets:
        said += "".join(f" {_of_set(one)}" for one in findings.sets)
    if run.final is None:
        said += f" The run is not done: its last record is of step {run.step}" + (
            f" of {run.total}." if run.total else ".")  # fmt: skip
    if run.config.num_seeds > 1:
        seeds = f"{run.seeds[0]} to {run.seeds[-1]}"
        said += f" It has {run.config.num_seeds} seeds, {seeds}, trained at once; ± is their sample standard deviation."
    return paragraph(said)


def _of_set(one: Evaluated) -> str:
    if one.of_targets is not None:
        kind = next(kind for kind in MAIN_METRICS if kind in one.metrics)
        found = one.scores.get(kind, {})
        said = f"On {one.metrics['examples']} examples of {one.name}, {kind.replace('_', ' ')} is {found['value']:.4f}"
        said += f" (95 % interval {found['low']:.4f} to {found['high']:.4f})" if "low" in found else ""
        return said + (" by the ensemble." if f"ensemble_{kind}" in one.metrics else ".")
    right = int(one.counts["class_correct"].sum())
    said = f"Of {one.metrics['examples']} examples of {one.name}, {right} are classified right"
    found = one.scores.get("accuracy", {})
    if "low" in found:
        said += f" ({found['value']:.4f}, 95 % interval {found['low']:.4f} to {found['high']:.4f})"
    return said + (" by the ensemble." if "ensemble_accuracy" in one.metrics else ".")


def _configuration(run: Record) -> str:
    """The keys that differ from their defaults, and the others when they are asked for."""
    values = flatten(run.config)
    own = [key for key, (default, _) in KEYS.items() if values[key] != default]
    others = [key for key in KEYS if key not in own]
    rows = [[key, repr(values[key]), repr(KEYS[key][0])] for key in own]
    shown = table("Keys that differ from their defaults", ["key", "value", "default"], rows) if rows else ""
    shown = f'<div class="keys">{shown}</div>'
    rest = "".join(f"<dt>{text(key)}</dt><dd>{text(repr(values[key]))}</dd>" for key in others)
    return shown + html.details(f"The other {len(others)} keys, at their defaults", f"<dl>{rest}</dl>")


def _provenance(run: Record, provenance: Mapping[str, Any], findings: Findings) -> str:
    git, data, result = provenance.get("git") or {}, provenance.get("data") or {}, run.final or {}
    devices = Counter(provenance.get("devices") or ())
    facts = {
        "trained": ", ".join(f"{result[key]} {unit}" for key, unit in _LENGTHS.items()
                             if result.get(key) is not None),
        "digest of the parameters": result.get("params_sha256"),
        "checkpoint of this page": findings.step is not None and f"step {findings.step}",
        "commit": git.get("commit") and git["commit"] + (", with changes that were not committed"
                                                         if git.get("changed") else ""),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "processes": provenance.get("processes"),
        "training examples": data.get("train_examples"),
        "images": " x ".join(map(str, data.get("image_shape") or ())),
        "targets" if data.get("target_names") else "classes": len(data.get("class_names") or ()),
        "fingerprint of the training data": data.get("fingerprint"),
        "files that could not be read": (provenance.get("unreadable") or {}).get("count", 0) or "none",
        "Python": provenance.get("python"),
        "platform": provenance.get("platform"),
        "packages": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }  # fmt: skip
    if start := provenance.get("init_from"):
        facts["started from"] = ", ".join(f"{key} {value}" for key, value in start.items())
    for one in provenance.get("extended") or ():
        facts[f"extended at step {one.get('step')}"] = f"from {one.get('from')} to {one.get('to')}"
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(str(value))}</dd>" for name, value in facts.items() if value)
    lost = [name for name, value in facts.items() if not value]
    note = paragraph(f"Not recorded: {', '.join(lost)}.", note=True) if lost else ""
    return f'<dl class="facts">{rows}</dl>{note}'


_LENGTHS = {
    "step": "steps",
    "epochs": "epochs",
    "seconds": "seconds",
    "images_per_second": "images/s",
}  # the last two are of the process that ended the run


def _again(run: Record, provenance: Mapping[str, Any], findings: Findings) -> str:
    """The commands that train, evaluate and report this once more."""
    train = [str(word) for word in provenance.get("command") or ()]
    lines = []
    if commit := (provenance.get("git") or {}).get("commit"):
        lines.append(f"git checkout {shlex.quote(str(commit))}")
    if train:
        name = Path(train[0]).name
        lines.append("uv run " + shlex.join([name if name == "launch.py" else train[0], *train[1:]]))
    workdir = f"--workdir={run.workdir.path}"
    at = [] if findings.step is None else [f"--checkpoint={findings.step}"]
    lines += [shlex.join(["uv", "run", "launch.py", command, workdir, *at]) for command in ("evaluate", "report")]
    note = "The run's config.json holds every key, whatever the config file says by now."
    if not train:
        note += " How the run was started is not recorded."
    return html.code("Commands", lines) + paragraph(note, note=True)
