"""The work directory: the names of its files, and the checks before a command uses it."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.provenance import DataInfo, collect, load_data_info, write_atomically, write_json


@dataclass(frozen=True)
class Workdir:
    """The files of one run under `path`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def load_config(self) -> ConfigDict:
        """The config that the run was trained with. Raises UserError if there is no run in this directory."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run (no config.json); train first, or pass the run's --workdir")
        return configs.from_json(self.config.read_text(), str(self.config))

    def open_for_training(self, config: ConfigDict) -> None:
        """Makes the directory. Raises UserError if it cannot be written or holds a run with another config.

        The error names the keys that differ. The run in the directory is not changed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as e:
            reason = "it is a file" if self.path.is_file() else e.strerror
            raise UserError(f"work directory {self.path} cannot be written: {reason}; pass another --workdir") from e
        if self.config.is_file() and (lines := configs.difference(self.load_config(), config)):
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(lines)}); use the old values, "
                "or pass another --workdir"
            )

    def record(self, config: ConfigDict, data: DataInfo, init_from: dict[str, Any] | None = None) -> None:
        """Writes config.json and provenance.json, each once: they describe the process that began the run.

        `init_from` describes the weights that a new run starts from. It is None for a run that starts from random
        weights or resumes. Raises UserError if the run in the directory began with other data or weights.
        """
        if self.provenance.is_file():
            old = load_data_info(self.provenance)
            if old != data:
                names = [k for k in vars(data) if getattr(old, k) != getattr(data, k)]
                raise UserError(f"the data of the run in {self.path} have changed (another {', '.join(names)}); "
                                "restore them, or pass another --workdir")  # fmt: skip
            if init_from and json.loads(self.provenance.read_text()).get("init_from") != init_from:
                raise UserError(f"the weights in {init_from['path']} have changed since the run in {self.path} began; "
                                "restore them, or pass another --workdir")  # fmt: skip
        else:
            write_json(self.provenance, collect(data) | ({"init_from": init_from} if init_from else {}))
        if not self.config.is_file():
            write_atomically(self.config, configs.to_json(config))
