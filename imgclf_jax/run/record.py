"""Reads the records of a run from its work directory or a bundle, and finds all runs below directories."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import bundle, writers
from imgclf_jax.run.provenance import snapshots
from imgclf_jax.run.workdir import Workdir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The record files of a run, by their names in a bundle. Properties raise UserError if their file is damaged."""

    path: Path  # of the work directory, or the bundle
    files: Mapping[str, bytes]

    @classmethod
    def load(cls, text: str) -> Self:
        """Reads the work directory or bundle at this path. Raises UserError if it holds no run."""
        path = paths.as_path(text)
        return cls(path, bundle.read(path)) if path.is_file() else cls.from_workdir(path)

    @classmethod
    def from_workdir(cls, path: Path) -> Self:
        """Reads a work directory. Raises UserError if it holds no run."""
        files = {}
        for name in bundle.NAMES:
            if (path / name).is_file():
                files[name] = paths.read(path / name)
        if "config.json" not in files:
            raise UserError(f"{path} holds no run: there is no {path / 'config.json'}; name the work "
                            "directory of a run, or a bundle")  # fmt: skip
        return cls(path, files)

    @property
    def name(self) -> str:
        """The path of the work directory or bundle, as text."""
        return str(self.path)

    @property
    def workdir(self) -> Workdir:
        """The work directory at `path`."""
        return Workdir(self.path)

    @cached_property
    def config(self) -> ConfigDict:
        """The config that the run was trained with."""
        return configs.from_json(self.files["config.json"], f"config.json of {self.path}")

    @cached_property
    def snapshots(self) -> list[JsonObject]:
        """The snapshots in provenance.json, see `run.provenance`; [] if there is none."""
        return snapshots(self._json("provenance.json"))

    @property
    def provenance(self) -> JsonObject:
        """The snapshot of the start that began the run; {} if there is none."""
        return self.snapshots[0] if self.snapshots else {}

    @cached_property
    def result(self) -> JsonObject:
        """The content of result.json; {} if the run has not ended."""
        found = self._json("result.json")
        if "result.json" in self.files and type(found.get("step")) is not int:
            raise UserError(f"{self.path / 'result.json'} is damaged: it holds no result")
        return found

    @cached_property
    def digests(self) -> list[JsonObject]:
        """The records of digests.jsonl (see `run.digests`); [] for runs of versions that wrote none."""
        return self._records("digests.jsonl")

    @cached_property
    def metrics(self) -> list[JsonObject]:
        """The records of metrics.jsonl."""
        return self._records("metrics.jsonl")

    def _records(self, name: str) -> list[JsonObject]:
        return writers.parse_records(self.files.get(name, b""), f"{name} of {self.path}", strict=True)

    def _json(self, name: str) -> JsonObject:
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{name} of {self.path} is damaged: it is not a JSON object")
        return value

    @cached_property
    def train_examples(self) -> int:
        """The size of the training split; 0 without provenance.json."""
        return self.workdir.load_data_info().train_examples if "provenance.json" in self.files else 0

    @property
    def total(self) -> int | None:
        """The number of steps by the config; None without provenance.json."""
        examples = self.train_examples
        return configs.steps(self.config.total, "total", examples, self.config.batch_size) if examples else None

    @cached_property
    def evals(self) -> dict[str, str]:
        """The recorded fingerprints of the evaluation sets, by name."""
        recorded: dict[str, str] = self.provenance.get("evals", {})
        return recorded

    @property
    def seeds(self) -> range:
        """The seeds that the run trained."""
        return range(self.config.seed, self.config.seed + self.config.num_seeds)

    @property
    def step(self) -> int:
        """The last step that has a record."""
        return max((record["step"] for record in self.metrics), default=0)

    def latest(self) -> dict[str, float]:
        """The latest value of each metric."""
        return {name: value for record in self.metrics for name, value in record.items()
                if type(value) in (int, float) and name != "step"}  # fmt: skip

    def pack(self, file: Path) -> None:
        """Writes the bundle of a work directory. Raises UserError if it cannot be written or a record is damaged."""
        _ = self.digests, self.metrics
        found = sorted(self.provenance.get("packages", {}).items())
        # This package comes from a clone, at the commit in provenance.json.
        lines = [f"{name}=={version}\n" for name, version in found if name != "imgclf-jax"]
        versions = f"# Python {self.provenance.get('python', 'unknown')}\n" + "".join(lines)
        bundle.write(file, {**self.files, "requirements.txt": versions.encode()})


def read(path: Path) -> Record:
    """Reads the record of the run in a work directory. Raises UserError if any of its files is damaged."""
    record = Record.from_workdir(path)
    _ = record.config, record.result, record.evals
    return record


def find(folders: Sequence[str]) -> tuple[list[Record], list[str]]:
    """Finds the runs in and below the folders: returns their records, sorted by name, and sentences on damaged runs.

    Follows no links to folders, since what is written to a run must not land elsewhere. Logs the sentences. Raises
    UserError for a missing folder, and if there is no intact run.
    """
    runs: list[Record] = []
    damaged: list[str] = []
    places: dict[Path, Path] = {}  # by what they are, since folders may lie in one another
    for text in folders:
        folder = paths.as_path(text)
        if not folder.is_dir():
            raise UserError(f"{text} is not a directory; name work directories, or a folder that holds some")
        for link in (path for path in folder.iterdir() if path.is_symlink() and path.is_dir()):
            log.warning("skipped: %s is a link; name it itself to include the runs there", link)
        for name in ("config.json", "result.json"):  # a result alone has lost its config, which reading it reports
            for file in folder.rglob(name):
                places.setdefault(file.parent.resolve(), file.parent)
    for path in sorted(places.values()):
        try:
            runs.append(read(path))
        except UserError as e:
            log.error("skipped: %s", e)
            damaged.append(str(e))
    if not runs:
        raise UserError(f"{', '.join(folders)}: no run there or below; a run's directory has a config.json")
    return runs, damaged
