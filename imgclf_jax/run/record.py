"""What a run has recorded, read from its work directory or from a bundle; and all the runs below directories."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import places
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Json, JsonMapping, JsonObject
from imgclf_jax.run import bundle, writers
from imgclf_jax.run.provenance import find_edits, load_data_info, load_evals, parse_json
from imgclf_jax.run.workdir import Workdir

TIMES = ("train/images_per_second", "train/input_wait")  # what a run measures of itself
MAIN_METRICS = ("accuracy", "mean_average_precision", "r2")  # one per task; the greatest value is the best
_NOT_RUNS = {"checkpoints", "tb", "profile", "damaged"}  # folders of a run, which hold no others
_MOST_BYTES = 512 << 20  # of a file, which is read at once


def contradictions(result: JsonMapping, digests: Sequence[JsonMapping], metrics: Sequence[JsonMapping]) -> list[str]:
    """Where what a run has recorded cannot all be true, in sentences: result.json, digests.jsonl and metrics.jsonl."""
    found: list[str] = []
    whole: dict[int, Json] = {}
    for line in digests:
        step, digest = line["step"], line.get("params_sha256")
        if whole.setdefault(step, digest) != digest:
            found += [f"digests.jsonl has two digests of step {step}"]
    values: dict[int, JsonObject] = {}
    for record in metrics:
        step, known = record["step"], values.setdefault(record["step"], {})
        for name, value in record.items():
            if name not in TIMES and _differ(known.setdefault(name, value), value):
                found += [f"metrics.jsonl has two values of {name} at step {step}, {known[name]} and {value}"]
    step = result.get("step")
    if step is None:
        return found
    if type(step) is not int:
        return [*found, f"result.json is of step {step!r:.80}, which is no number of steps"]
    if whole and step not in whole:
        found.append(f"result.json is of step {step}, which digests.jsonl does not have")
    elif _differ(whole.get(step, result.get("params_sha256")), result.get("params_sha256")):
        found.append(f"result.json has other parameters of step {step} than digests.jsonl")
    for name, group in result.items():
        for key, value in group.items() if isinstance(group, dict) else ():
            logged = values.get(step, {}).get(f"{name}/{key}", value)
            if _differ(logged, value):
                found.append(f"result.json says {name}/{key} {value}, metrics.jsonl {logged} at step {step}")
    return found


def read_contradictions(workdir: Path) -> list[str]:
    """The contradictions in what the run in a work directory has recorded. A damaged result says nothing."""
    result, provenance, content = None, None, b""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = (workdir / "result.json").read_bytes() if (workdir / "result.json").is_file() else b""
        result = parse_json(content)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        provenance = parse_json((workdir / "provenance.json").read_bytes())
    files = (writers.read_metrics(workdir / name) for name in ("digests.jsonl", "metrics.jsonl"))
    found = contradictions(result if isinstance(result, dict) else {}, *files)
    return found + find_edits({"result.json": content} if content else {}, provenance)


def _differ(a: Json, b: Json) -> bool:
    return bool(a != b and not (a != a and b != b))  # NaN is NaN


@dataclass(frozen=True)
class Record:
    """The files that a run has written, by their names in a bundle. `path` is its work directory, or the bundle.

    Every property raises UserError if its file is damaged.
    """

    path: Path
    files: Mapping[str, bytes]
    bundled: bool = False

    @classmethod
    def named(cls, text: str) -> Self:
        """Reads the work directory or the bundle of this name. Raises UserError if it holds no run."""
        path = places.as_path(text)
        return cls(path, bundle.read(path), bundled=True) if path.is_file() else cls.of_workdir(path)

    @classmethod
    def of_workdir(cls, path: Path) -> Self:
        """Reads a work directory. Raises UserError if it holds no run."""
        files = {}
        for name in bundle.NAMES:
            if (path / name).is_file():
                if places.size(path / name) > _MOST_BYTES:
                    raise UserError(f"{path / name} is longer than {_MOST_BYTES >> 20} MB; shorten or remove it")
                files[name] = (path / name).read_bytes()
        if "config.json" not in files:
            raise UserError(f"{path} holds no run (no config.json); name the work directory of a run, or a bundle")
        return cls(path, files)

    @property
    def name(self) -> str:
        """The run's directory, as it was given."""
        return str(self.path)

    @property
    def workdir(self) -> Workdir:
        """The work directory that the record was read from."""
        return Workdir(self.path)

    def untrusted(self, said: Sequence[str] = ()) -> contextlib.AbstractContextManager[None]:
        """See `Workdir.untrusted`."""
        return self.workdir.untrusted(said)

    @cached_property
    def config(self) -> ConfigDict:
        """The config that the run was trained with."""
        return configs.from_json(self.files["config.json"], f"config.json of {self.path}")

    @cached_property
    def provenance(self) -> JsonObject:
        """The content of provenance.json; {} if there is none."""
        return self._json("provenance.json")

    @cached_property
    def result(self) -> JsonObject:
        """The content of result.json; {} if the run is not done."""
        return self._json("result.json")

    @cached_property
    def digests(self) -> list[JsonObject]:
        """The lines of digests.jsonl, see `run.digests`; none for a run of a version that wrote none."""
        return self._records("digests.jsonl")

    @cached_property
    def metrics(self) -> list[JsonObject]:
        """The records of metrics.jsonl."""
        return self._records("metrics.jsonl")

    def _records(self, name: str) -> list[JsonObject]:
        return writers.parse_records(self.files.get(name, b""), f"{name} of {self.path}", strict=True)

    def _json(self, name: str) -> JsonObject:
        try:
            value = parse_json(self.files.get(name, b"{}"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{name} of {self.path} is damaged: it is not a JSON object")
        return value

    @cached_property
    def contradictions(self) -> list[str]:
        """Sentences on what its files contradict each other in, see `contradictions`."""
        return contradictions(self.result, self.digests, self.metrics) + find_edits(self.files, self.provenance)

    @cached_property
    def total(self) -> int | None:
        """The number of steps that the config plans; None if the directory has no provenance.json."""
        return total_steps(self.workdir, self.config) if "provenance.json" in self.files else None

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """How many steps an epoch takes; None if the directory has no provenance.json."""
        if "provenance.json" not in self.files:
            return None
        return load_data_info(self.workdir.provenance).train_examples / self.config.batch_size

    @cached_property
    def final(self) -> JsonObject | None:
        """The content of result.json; None if the run is not done, or was extended and is not done again."""
        if self.files.get("result.json") is None:
            return None
        if type(self.result.get("step")) is not int:
            raise UserError(f"{self.path / 'result.json'} is damaged: it holds no result")
        return self.result if self.total in (None, self.result["step"]) else None

    @cached_property
    def evals(self) -> dict[str, str]:
        """The fingerprints of the evaluation sets, as far as they are recorded."""
        return load_evals(self.workdir.provenance)

    @property
    def seeds(self) -> range:
        """The seeds that were trained, one or several at once."""
        return range(self.config.seed, self.config.seed + self.config.num_seeds)

    @property
    def step(self) -> int:
        """The last step that has a record."""
        return max((record["step"] for record in self.metrics), default=0)

    def latest(self) -> dict[str, float]:
        """The latest value of each metric."""
        found: dict[str, float] = {}
        for record in self.metrics:
            numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
            found.update({name: value for name, value in numbers.items() if name != "step"})
        return found

    def pack(self, file: Path) -> None:
        """Writes the bundle of a work directory. Raises UserError if it cannot be written or a record is damaged."""
        _ = self.digests, self.metrics
        bundle.write(file, {**self.files, "requirements.txt": self._requirements().encode()})

    def _requirements(self) -> str:
        """The versions that the run was trained with, a package a line, as pip and uv read them."""
        found = self.provenance.get("packages") or self.provenance.get("versions") or {}
        own = ("imgclf-jax", "imgclf_jax")  # from a clone of its repository, at the commit that provenance.json has
        lines = [f"{name}=={version}\n" for name, version in found.items() if name not in own]
        return f"# Python {self.provenance.get('python', 'unknown')}\n" + "".join(lines)


def total_steps(workdir: Workdir, config: ConfigDict) -> int:
    """The number of steps that a run of this config has on its recorded data. Raises UserError if it recorded none."""
    examples = load_data_info(workdir.provenance).train_examples
    return configs.steps(config.total, "total", examples, config.batch_size)


def read(path: Path) -> Record:
    """The record of the run in a work directory. Raises UserError if any of its files is damaged."""
    record = Record.of_workdir(path)
    _ = record.config, record.final, record.contradictions, record.evals
    return record


def find(folders: Iterable[str]) -> tuple[list[Record], list[str]]:
    """The runs in and below the folders, each once, in the order of their names; and what is wrong with damaged ones.

    Raises UserError for a folder that is not there.
    """
    runs: list[Record] = []
    damaged: list[str] = []
    seen = set[Path]()
    for text in folders:
        folder = places.as_path(text)
        if not folder.is_dir():
            raise UserError(f"{text} is no directory; name those of runs, or one that they lie in")
        for path in _runs_below(folder, seen):
            try:
                run = read(path)
                if run.contradictions:
                    raise UserError(f"{path} contradicts itself: {'; '.join(run.contradictions[:3])}")
                runs.append(run)
            except UserError as e:
                damaged.append(str(e))
    return runs, damaged


def _runs_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    if (real := folder.resolve()) in seen:  # a link may lead back
        return
    seen.add(real)
    if (folder / "config.json").is_file():
        yield folder
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in _NOT_RUNS):
        yield from _runs_below(inner, seen)
