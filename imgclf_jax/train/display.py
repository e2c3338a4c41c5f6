"""What training prints for people: a head that says what is trained, a row per record, and what to run next.

Files for programs are written by `run.writers`.
"""

import math
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from imgclf_jax import datasets, metrics
from imgclf_jax.config import KEYS, selecting_metrics
from imgclf_jax.core import cpuinfo, extras, processes
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.data import stream
from imgclf_jax.data.source import Source
from imgclf_jax.models import summary
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import writers
from imgclf_jax.run.provenance import processor
from imgclf_jax.run.workdir import Workdir

WIDTH = 71  # of a line after its time, for terminals of 80 columns
_INDENT = 13
_SHORT = {"mean_average_precision": "mAP", "exact_match": "exact"}  # names in the rows
_OF_ROW = {"loss", "learning_rate", "images_per_second", "input_wait", "examples", "grad_norm", "param_norm"}


def head(compiling: Programs, images: stream.Images, base: Mapping[str, Source], workdir: Workdir, fresh: bool) -> str:
    """What is trained, on what and how. A run that begins (`fresh`) also has a table of its model's blocks."""
    recipe, config = compiling.recipe, compiling.recipe.config
    targets = bool(recipe.data.target_names)
    labels = None if targets else images.source.labels
    data = [f"{printable(config.data.source)}: {len(images):,} images of {_shape(images.shape)}, "
            + classes(recipe.data.class_names, labels, "targets" if targets else "classes"),
            datasets.describe_use(config, base)]  # fmt: skip
    if config.data.sampling != "permutation":
        data.append(
            f"data.sampling={config.data.sampling!r}: an epoch of the stream has {images.sampler.epoch:,} examples"
        )
    blocks = summary.summarize(recipe.model, recipe.data.image_shape, recipe.parameters) if fresh else []
    blocks = [block for block in blocks if recipe.method.predicts or block.name != "head"]
    options = {"clip": config.clip, "accumulate": config.accumulate, "ema": config.ema, "method": config.method,
               "gradient": config.gradient, "stop": config.stop}  # fmt: skip
    more = "".join(f", {key}={value}" for key, value in options.items() if value != KEYS[key][0])
    last = config.seed + recipe.num_seeds - 1
    epochs = recipe.total * config.batch_size / len(images)
    return facts({
        "data": "\n".join(data),
        "model": model(config.model, blocks) if blocks else config.model,
        "optimizer": f"{config.optimizer}{more}",
        "schedule": config.schedule,
        "steps": f"{recipe.total:,} of {config.batch_size} images, {epochs:.4g} epochs",
        "devices": devices(compiling.mesh, config.precision),
        "seed": str(config.seed) if recipe.num_seeds == 1 else f"{config.seed} to {last}, trained at once",
        "workdir": printable(str(workdir.path)),
    })  # fmt: skip


def devices(mesh: Mesh, precision: str) -> str:
    """The devices and the precision of their layers, with a hint if a CPU has no instructions for it."""
    first = mesh.devices.flat[0]
    kind = processor() if first.platform == "cpu" else first.device_kind
    text = f"{mesh.size} {first.platform} device{'s' * (mesh.size > 1)} ({kind})"
    text += f" of {processes.count()} processes" if processes.count() > 1 else ""
    text += f", {precision}"
    if first.platform == "cpu" and precision == "bfloat16" and cpuinfo.lacks_bfloat16():
        text += "\nno bfloat16 instructions: precision=float32 may be faster"
    return text


def facts(named: Mapping[str, str], width: int = WIDTH) -> str:
    """Facts about a run, a name and a text each, in two columns; a line break in a text begins a new line."""
    lines = []
    for name, text in named.items():
        wrapped = [part for line in text.split("\n") for part in _wrap(line, width - _INDENT)]
        labels = [name, *[""] * (len(wrapped) - 1)]
        lines += [f"  {label:<{_INDENT - 2}}{line}" for label, line in zip(labels, wrapped, strict=True)]
    return "\n".join(lines)


def _wrap(line: str, width: int) -> list[str]:
    kept = line.startswith(" ") or len(line) <= width  # the row of a table
    return [line] if kept else textwrap.wrap(line, width, break_on_hyphens=False)


def model(spec: str, blocks: Sequence[summary.Block]) -> str:
    """A model's parameters and FLOPs, and a table of its blocks."""
    flops = summary.amount(sum(block.flops for block in blocks))
    rows = [summary.COLUMNS, *summary.rows(blocks)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        f" {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    parameters = sum(block.parameters for block in blocks)
    return "\n".join(
        [f"{printable(spec)}: {parameters:,} parameters, {flops}{' ' * flops[-1].isdigit()}FLOPs an image", *table]
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def classes(names: Sequence[str], labels: np.ndarray | None, what: str = "classes") -> str:
    """The number of classes and, with known labels i32[n], of their examples: of each, or the least and the most."""
    if labels is None or not len(names):
        return f"{len(names)} {what}"
    counts = np.bincount(labels, minlength=len(names))
    if len(names) <= 4:
        each = ", ".join(f"{printable(name)} {count:,}" for name, count in zip(names, counts, strict=True))
        return f"{len(names)} {what}: {each}"
    least, most = counts.min(), counts.max()
    return f"{len(names)} {what} of {least:,}{f' to {most:,}' if most > least else ''}"


@dataclass
class Rows:
    """The rows of a run's log: step, epoch, set, loss, the task's metric, learning rate, speed, a mark at the best."""

    total: int  # steps of the run
    steps_per_epoch: float
    sets: tuple[str, ...]  # of evaluation
    metric: str  # the column beside the loss; "" for a method without a head
    marked: Mapping[str, float]  # whose best is marked, as "val/loss": 1.0 if the greatest is best, else -1.0
    width: int = WIDTH
    _best: dict[str, float] = field(default_factory=dict)

    def note(self, record: Mapping[str, float]) -> set[str]:
        """Takes a record's values into account, and returns the names of those that are better than all before."""
        better = set()
        for name, sign in self.marked.items():
            value = record.get(name)
            if (
                isinstance(value, int | float)
                and math.isfinite(value)
                and sign * value > self._best.get(name, -math.inf)
            ):
                better.add(name)
                self._best[name] = sign * value
        return better

    def header(self) -> str:
        """The names of the columns."""
        return self._row("step", "epoch", "set", "loss", _SHORT.get(self.metric, self.metric)[:9], "lr", "images/s", [])

    def training(self, step: int, record: Mapping[str, float]) -> str:
        """The row of a record of training; the time that the device waited for input is shown from a tenth on."""
        more = self._more(record)
        if record.get("input_wait", 0) >= 0.1:
            more.insert(0, f"waited {record['input_wait']:.0%}")
        rate, speed = (f"{record[key]:{form}}" if key in record else ""
                       for key, form in (("learning_rate", ".3g"), ("images_per_second", ",.0f")))  # fmt: skip
        return self._row(f"{step}", self._epoch(step), "train", *self._numbers(record), rate, speed, more)

    def evaluations(self, step: int, results: Mapping[str, Mapping[str, float]]) -> list[str]:
        """The rows of an evaluation of each set, without those of a method that measures nothing there."""
        return [self.evaluation(step, name, record) for name, record in results.items() if record.keys() - {"examples"}]

    def evaluation(self, step: int, name: str, record: Mapping[str, float]) -> str:
        """The row of an evaluation of a set; "best" marks it if no earlier one was better."""
        better = self.note({f"{name}/{key}": value for key, value in record.items()})
        more = ["best" if better else "    ", *self._more(record)]
        return self._row(f"{step}", self._epoch(step), name, *self._numbers(record), "", "", more).rstrip()

    def _epoch(self, step: int) -> str:
        return f"{step / self.steps_per_epoch:.1f}"

    def _numbers(self, record: Mapping[str, float]) -> tuple[str, str]:
        loss, metric = (_value(record[key]) if key in record else "" for key in ("loss", self.metric))
        return loss, metric

    def _row(
        self, step: str, epoch: str, name: str, loss: str, metric: str, rate: str, speed: str, more: list[str]
    ) -> str:
        left = f"{step:>{max(4, len(str(self.total)))}}  {epoch:>5}  {_cut(name, self._name_width):<{self._name_width}}"
        line = f"{left}  {loss:>7}" + (f"  {metric:>8}" if self.metric else "")
        # An evaluation has no rate and no speed, and shows more of its metrics there.
        return self._fitting(line, [f"{rate:>8}", f"{speed:>8}", *more] if rate or speed else more)

    @property
    def _name_width(self) -> int:
        return max(5, *(min(10, len(name)) for name in ("train", *self.sets)))

    def _fitting(self, line: str, more: Iterable[str]) -> str:
        """Appends what fits into the width."""
        for item in more:
            if len(line) + 2 + len(item) <= self.width:
                line += f"  {item}"
        return line

    def _more(self, record: Mapping[str, float]) -> list[str]:
        shown = {name: value for name, value in record.items()
                 if name not in _OF_ROW and name != self.metric and not name.endswith("_std")
                 and not (name == "nll" and value == record.get("loss"))}  # fmt: skip
        return [f"{_SHORT.get(name, name)} {_value(value)}" for name, value in shown.items()]


def _value(value: float) -> str:
    return decimals(value) if isinstance(value, float) and 1e-3 <= abs(value) < 100 else f"{value:.4g}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def make_rows(recipe: Recipe, images: stream.Images, workdir: Workdir, start: int) -> Rows:
    """The rows of the log of a run that trains from step `start`, which know in process 0 its records up to there."""
    config = recipe.config
    metric = metrics.REPORTED[recipe.task][0] if recipe.method.predicts else ""
    marked = dict(metrics.parse_best(text, key=key) for key, text in selecting_metrics(config).items())
    if not marked:
        marked = {f"{name}/{metric or 'loss'}": 1.0 if metric else -1.0 for name in config.data.eval}
    rows = Rows(recipe.total, len(images) / config.batch_size, tuple(config.data.eval), metric, marked)
    for record in writers.read_metrics(workdir.metrics) if not processes.index() else ():
        if record["step"] <= start:  # the later ones are written again
            rows.note(record)
    return rows


def program() -> str:
    """How this program was called, for commands to run next."""
    name = Path(sys.argv[0]).name
    return {"launch.py": "uv run launch.py", "__main__.py": "python -m imgclf_jax"}.get(name, name)


def next_commands(workdir: str, predicts: bool) -> list[str]:
    """The commands that a finished run is looked at with."""
    place = f"--workdir {shlex.quote(printable(workdir))}"
    commands = {f"report {place}": "curves, scores, mistakes"}
    if predicts:
        commands[f"predict FILE {place}"] = "new images"
    if predicts and not extras.missing("serve"):
        commands[f"serve {place}"] = "a web page"
    width = max(map(len, commands))
    start = program()
    lines = [f"  {start} {words:<{width}}  {what}" for words, what in commands.items()]
    return lines if max(map(len, lines)) <= 80 else [line.rpartition("  ")[0].rstrip() for line in lines]
