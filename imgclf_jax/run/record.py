"""What a run has recorded of itself, from its work directory or from a bundle of it."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import places, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import bundle, writers
from imgclf_jax.run.provenance import find_edits, parse_json

TIMES = ("train/images_per_second", "train/input_wait")  # what a run measures of itself
_MOST_BYTES = 512 << 20  # of a file, which is read at once


def contradictions(
    result: Mapping[str, Any], digests: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Where what a run has recorded cannot all be true, in sentences: result.json, digests.jsonl and metrics.jsonl."""
    found: list[str] = []
    whole: dict[int, Any] = {}
    for line in digests:
        step, digest = line["step"], line.get("params_sha256")
        if whole.setdefault(step, digest) != digest:
            found += [f"digests.jsonl has two digests of step {step}"]
    values: dict[int, dict[str, Any]] = {}
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


def _differ(a: Any, b: Any) -> bool:
    return bool(a != b and not (a != a and b != b))  # NaN is NaN


@dataclass(frozen=True)
class Record:
    """The files that a run has written, by their names in a bundle. `path` is its work directory, or the bundle."""

    path: Path
    files: Mapping[str, bytes]
    bundled: bool

    @classmethod
    def named(cls, text: str) -> Self:
        """The record in the work directory or the bundle of this name. Raises UserError if it holds no run."""
        path = places.as_path(text)
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
            value = parse_json(self.files.get(name, b"{}"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{name} of {self.path} is damaged: it is no JSON object")
        return value

    @property
    def contradictions(self) -> list[str]:
        """Where its files contradict each other, see `contradictions`."""
        return contradictions(self.result, self.digests, self.metrics) + find_edits(self.files, self.provenance)

    def pack(self, file: Path) -> None:
        """Writes the bundle of a work directory. Raises UserError if it cannot be written."""
        bundle.write(file, {**self.files, "requirements.txt": self._requirements().encode()})

    def _requirements(self) -> str:
        """The versions that the run was trained with, a package a line, as pip and uv read them."""
        found = self.provenance.get("packages") or self.provenance.get("versions") or {}
        own = ("imgclf-jax", "imgclf_jax")  # from a clone of its repository, at the commit that provenance.json has
        lines = [f"{name}=={version}\n" for name, version in found.items() if name not in own]
        return f"# Python {self.provenance.get('python', 'unknown')}\n" + "".join(lines)
