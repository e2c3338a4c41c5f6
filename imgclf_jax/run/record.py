"""What a run has recorded of itself, from its work directory or from a bundle of it."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import places, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import bundle, writers

_MOST_BYTES = 512 << 20  # of a file, which is read at once


@dataclass(frozen=True)
class Record:
    """The files that a run has written, by their names in a bundle. `path` is its work directory, or the bundle."""

    path: Path
    files: Mapping[str, bytes]
    bundled: bool

    @classmethod
    def named(cls, text: str) -> Self:
        """The record in the work directory or the bundle of this name. Raises UserError if it holds no run."""
        path = places.place(text)
        if path.is_file():
            return cls(path, bundle.read(path), True)
        files = {}
        for name in bundle.NAMES:
            if (path / name).is_file():
                if places.size(path / name) > _MOST_BYTES:
                    raise UserError(f"{path / name} is longer than {_MOST_BYTES >> 20} MB; shorten or remove it")
                files[name] = (path / name).read_bytes()
        if "config.json" not in files:
            raise UserError(f"{path} holds no run (no config.json); name the work directory of a run, or a bundle")
        return cls(path, files, False)

    def untrusted(self, said: Sequence[str] = ()) -> contextlib.AbstractContextManager[None]:
        """Inside, what the run names is not imported and not fetched: it may be anybody's. See `spec.untrusted`."""
        return spec.untrusted(f"the run in {self.path}", said)

    @property
    def config(self) -> ConfigDict:
        """The config that the run was trained with, a new object each time."""
        return configs.from_json(self.files["config.json"], f"config.json of {self.path}")

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; {} if there is none."""
        return self._json("provenance.json")

    @property
    def result(self) -> dict[str, Any]:
        """What result.json holds; {} of a run that is not done."""
        return self._json("result.json")

    @property
    def digests(self) -> list[dict[str, Any]]:
        """The lines of digests.jsonl, see `digests`; none of a run that was made before there were any."""
        return writers.parse_records(self.files.get("digests.jsonl", b""), f"digests.jsonl of {self.path}")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return writers.parse_records(self.files.get("metrics.jsonl", b""), f"metrics.jsonl of {self.path}")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{name} of {self.path} is damaged: it is no JSON object")
        return value

    def pack(self, file: Path) -> None:
        """Writes the bundle of a work directory. Raises UserError if it cannot be written."""
        bundle.write(file, {**self.files, "requirements.txt": self._requirements().encode()})

    def _requirements(self) -> str:
        """The versions that the run was trained with, a package a line, as pip and uv read them."""
        found = self.provenance.get("packages") or self.provenance.get("versions") or {}
        own = ("imgclf-jax", "imgclf_jax")  # from a clone of its repository, at the commit that provenance.json has
        lines = [f"{name}=={version}\n" for name, version in found.items() if name not in own]
        return f"# Python {self.provenance.get('python', 'unknown')}\n" + "".join(lines)
