"""The runs that lie below directories, as their files tell of them."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.places import as_path
from imgclf_jax.run.provenance import find_edits, load_data_info, load_evals, read_json
from imgclf_jax.run.record import contradictions
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics

log = logging.getLogger(__name__)

MAIN_METRICS = ("accuracy", "mean_average_precision", "r2")  # of the tasks; of all the greatest value is the best
_OF_A_RUN = {"checkpoints", "tb", "profile", "damaged"}  # folders of a run, which hold no others


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, done or not."""

    workdir: Workdir
    config: ConfigDict
    result: dict[str, Any] | None  # what `result.json` holds; None if the run is not done
    metrics: list[dict[str, Any]]  # the records of `metrics.jsonl`
    total: int | None  # the steps that the run is to have, if that is known
    contradictions: tuple[str, ...] = ()  # in what it has recorded, see `record.contradictions`
    evals: dict[str, str] = dataclasses.field(default_factory=dict)  # fingerprints of the evaluation sets, if recorded

    @property
    def name(self) -> str:
        """The run's directory, as it was found."""
        return str(self.workdir.path)

    @property
    def seeds(self) -> range:
        """The seeds that were trained: several of them at once, or one."""
        return range(self.config.seed, self.config.seed + self.config.num_seeds)

    @property
    def step(self) -> int:
        """The last step of which there is a record."""
        return max((record["step"] for record in self.metrics), default=0)

    def latest(self) -> dict[str, float]:
        """The latest value of each metric."""
        found: dict[str, float] = {}
        for record in self.metrics:
            numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
            found.update({name: value for name, value in numbers.items() if name != "step"})
        return found


def total_steps(workdir: Workdir, config: ConfigDict) -> int:
    """How many steps a run of this config has, on the data that its files tell of. Raises UserError if they do not."""
    examples = load_data_info(workdir.provenance).train_examples
    return configs.steps(config.total, "total", examples, config.batch_size)


def read(workdir: Workdir) -> Record:
    """What the files of a run say. Raises UserError if they are damaged."""
    config = workdir.load_config()
    result = read_json(workdir.result) if workdir.result.is_file() else None
    total = total_steps(workdir, config) if workdir.provenance.is_file() else None
    if result is not None and not (isinstance(result, dict) and type(result.get("step")) is int):
        raise UserError(f"{workdir.result} is damaged: it holds no result")
    metrics = read_metrics(workdir.metrics)
    wrong = contradictions(result or {}, read_metrics(workdir.digests), metrics)
    if workdir.provenance.is_file():
        files = {file.name: file.read_bytes() for file in (workdir.config, workdir.result) if file.is_file()}
        wrong += find_edits(files, read_json(workdir.provenance))
    if result is not None and total is not None and result["step"] != total:
        result = None  # of a shorter run, which has been extended since
    return Record(workdir, config, result, metrics, total, tuple(wrong), load_evals(workdir.provenance))


def find(folders: Iterable[str]) -> tuple[list[Record], list[str]]:
    """The runs in and below the folders, each once, in the order of their names; and what is wrong with damaged ones.

    Raises UserError for a folder that is not there.
    """
    runs: list[Record] = []
    damaged: list[str] = []
    seen = set[Path]()
    for text in folders:
        folder = as_path(text)
        if not folder.is_dir():
            raise UserError(f"{text} is no directory; name those of runs, or one that they lie in")
        for path in _runs_below(folder, seen):
            try:
                run = read(Workdir(path))
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
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in _OF_A_RUN):
        yield from _runs_below(inner, seen)
