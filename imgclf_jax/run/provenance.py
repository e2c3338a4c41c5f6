"""Provenance: snapshots of what the bits of a run depend on, one at each start, and the comparison of two snapshots.

provenance.json is the snapshot of the first start, and has those of later starts under "resumed".
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax

from imgclf_jax.core import machine
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Json, JsonMapping, JsonObject
from imgclf_jax.data.source import DataInfo

# The packages that compute or load data; in a snapshot they come first.
PACKAGES = ("imgclf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "tensorflow",
             "tensorflow-cpu", "tensorflow-datasets", "scikit-learn")  # fmt: skip

# The extensions of x86 that decide how matmuls and sums round, as /proc/cpuinfo calls them, widest first.
_VECTORS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
# JAX's options that may differ between processes, or that change no result.
_OF_ONE_PROCESS = "cache|device|debug|_log_|logging|dump|traceback|profil|timeout|address|mtls|pprint"
# The flags of XLA, and further options of JAX, that change no result or that the devices and processes show.
_FLAGS_OF_NO_RESULT = "--xla_(dump|force_host_platform_device_count)"
_OPTIONS_OF_NO_RESULT = f"{_OF_ONE_PROCESS}|platform|process|coordinat"

# The kind of each entry of a snapshot that is compared, and the most important first. The others are only shown.
_KINDS = {
    **dict.fromkeys(("data", "evals", "read", "unreadable"), "data"), "init_from": "weights", "fixed_sha256": "weights",
    "keys": "config", "code": "code", "modules": "code", "traced": "trace", "python": "version", "packages": "version",
    "platform": "device", "processor": "device", "devices": "device", "processes": "device", "flags": "flags",
}  # fmt: skip
# The types of entries that commands read, in a file that anybody may have written.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("data", "evals", "flags", "git", "init_from", "keys", "modules", "packages"), dict),
    **dict.fromkeys(("command", "devices", "unreadable"), list),
    "step": int,
}


class Difference(NamedTuple):
    """A difference of two runs that may explain different numbers."""

    kind: str  # data, weights, config, code or trace; version, device or flags, which only affect rounding
    what: str  # its name in provenance.json, such as "packages.jax"
    recorded: str
    here: str

    def __str__(self) -> str:
        return f"{self.what} was {self.recorded}, here it is {self.here}"


def take_snapshot(keys: JsonMapping, data: DataInfo, **recorded: Json) -> JsonObject:
    """What the bits of a run depend on, in this process: an entry of provenance.json, as JSON values.

    `keys` are those of the config that may change on resume. `recorded` are further entries, see docs/using.md.
    """
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git(),
        "keys": dict(keys),
        "data": json.loads(json.dumps(asdict(data))),  # with lists for tuples
        **recorded,
        "code": _code(leave_out="tools/**/*.py"),  # which train nothing
        "modules": module_digests(),
        "python": platform.python_version(),
        "packages": _installed(),
        "platform": platform.platform(),
        "processor": processor(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "flags": _flags(),
    }


def find_differences(old: JsonMapping, new: JsonMapping) -> list[Difference]:
    """The differences of two snapshots, or parts of them, in what both have; the most important first."""
    a, b = _flatten(old), _flatten(new)
    found = [Difference(kind, name, _short(a[name]), _short(b[name]))
             for entry, kind in _KINDS.items() for name in a
             if name.partition(".")[0] == entry and name in b and a[name] != b[name]]  # fmt: skip
    commits = _commit(old.get("git", {})), _commit(new.get("git", {}))
    if any(one.what == "code" for one in found) and commits[0] != commits[1]:
        found.append(Difference("code", "git.commit", *commits))
    return found


def _flatten(value: JsonMapping, prefix: str = "") -> JsonObject:
    """The leaves of nested objects by dotted name. The path of weights is not compared, but their digest is."""
    found: JsonObject = {}
    for name, inner in value.items():
        found |= _flatten(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    found.pop("init_from.path", None)
    return found


def _short(value: Json) -> str:
    if isinstance(value, list):
        value = f"{len(value)}: {', '.join(dict.fromkeys(map(str, value)))}"
    text = str(value) or "not set"
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text[:200]


def _commit(git: JsonMapping) -> str:
    return f"{str(git.get('commit', 'unknown'))[:12]}{', changed' if git.get('changed') else ''}"


def snapshots(recorded: JsonMapping) -> list[JsonObject]:
    """The snapshots in a provenance.json, in the order of their steps, without entries of types that no run writes."""
    later = recorded.get("resumed")
    some = [recorded, *(one for one in (later if isinstance(later, list) else []) if isinstance(one, dict))]
    return [found for one in some if (found := _well_formed(one))]


def _well_formed(snapshot: JsonMapping) -> JsonObject:
    found: JsonObject = {name: value for name, value in snapshot.items() if isinstance(value, _TYPES.get(name, object))}
    if not isinstance(found.get("git", {}).get("commit", ""), str):
        del found["git"]
    return {name: value for name, value in found.items() if name != "resumed"}


def process_facts() -> JsonObject:
    """The facts that any two processes of a run must share where both have them, as JSON values.

    Versions, code, options of JAX and XLA, and the digests of the user's own modules that are imported so far.
    """
    imported = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)]
    packages = sorted({package for name in imported for package in _distributions().get(name, ()) if package})
    return {
        "python": platform.python_version().rpartition(".")[0],
        **{package: importlib.metadata.version(package) for package in packages},
        "the code of imgclf_jax": _code()[:12],
        **module_digests(),
        **_flags(),
        **{name: str(value) for name, value in jax.config.values.items() if not re.search(_OF_ONE_PROCESS, name)},
    }


def device_facts(counted: bool) -> JsonObject:
    """The kind of this process's devices and, if `counted`, their number. Starts JAX's backend."""
    try:
        here = jax.local_devices()
    except RuntimeError as e:  # for example, hosts with different kinds of devices wait for each other
        raise UserError(f"JAX cannot use the devices of all processes: {reason(e)}") from e
    # CPUs of unlike vector extensions compile unlike programs.
    cpu = f" with {extension}" if (extension := _vector_extension()) else ""
    kinds = sorted({f"{d.platform}: {d.device_kind}{cpu * (d.platform == 'cpu')}" for d in here})
    return {"devices of kind": ", ".join(kinds), **({"number of local devices": len(here)} if counted else {})}


def module_digests() -> dict[str, str]:
    """The SHA-256 of each of the user's own modules, see `own_files`."""
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in own_files().items()}


def raised_in_user_code(error: BaseException) -> bool:
    """Whether a frame of the error's traceback lies in a module of the user's, so that the traceback says where."""
    files = set(own_files().values())
    return any(frame.f_code.co_filename in files for frame, _ in traceback.walk_tb(error.__traceback__))


def own_files() -> dict[str, str]:
    """The paths of the user's own modules: imported files neither installed nor part of this package.

    Files are named by their module: `my_nets.py`, `my_package/__init__.py`.
    """
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    elsewhere = tuple(f"{folder}{os.sep}" for folder in (*installed, Path(__file__).parents[1]))
    launcher = str(Path(__file__).parents[2] / "launch.py")
    files = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or file == launcher or file.startswith(elsewhere) or not os.path.isfile(file):
            continue
        parts = Path(file).parts
        if not {"site-packages", "dist-packages"}.intersection(parts):
            depth = name.count(".") + 1 + parts[-1].startswith("__init__.")
            files["/".join(parts[-depth:])] = file
    return dict(sorted(files.items()))


def _flags() -> dict[str, str]:
    """The flags of the compilers and JAX's options in the environment, without those that change no result."""
    xla = os.environ.get("XLA_FLAGS", "").split()
    options = [f"{name}={value}" for name, value in os.environ.items()
               if name.startswith("JAX_") and not re.search(_OPTIONS_OF_NO_RESULT, name.lower())]  # fmt: skip
    return {
        "XLA_FLAGS": " ".join(sorted(flag for flag in xla if not re.match(_FLAGS_OF_NO_RESULT, flag))),
        "JAX options": " ".join(sorted(options)),
        **{name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")},
    }


_distributions = functools.cache(importlib.metadata.packages_distributions)  # packages by the modules that they hold


def _installed() -> dict[str, str]:
    """The version of each installed package, the most important first."""
    found = {one.name.replace("_", "-").lower(): one.version for one in importlib.metadata.distributions()}
    return dict(sorted(found.items(), key=lambda one: (one[0] not in PACKAGES, one)))


def _code(leave_out: str = "") -> str:
    """A digest of the files of this package, committed or not, without those that match the pattern `leave_out`."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(set(package.rglob("*.py")) - set(package.glob(leave_out) if leave_out else ())):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def processor() -> str:
    """The processor's name, family, model and widest vector extension, since different CPUs round differently.

    The name alone is not enough: in clouds "AMD EPYC" is of several generations.
    """
    facts = machine.cpu_facts()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    parts = [facts["model name"]]
    if facts.keys() >= {"cpu family", "model"}:
        parts.append(f"family {facts['cpu family']} model {facts['model']}")
    return ", ".join(filter(None, [*parts, _vector_extension()]))


def _vector_extension() -> str:
    """The widest vector extension of the processor; "" if unknown."""
    flags = machine.cpu_flags()
    return next((name for flag, name in _VECTORS.items() if flag in flags), "")


def _git() -> JsonObject:
    """The git commit of this code, and whether the working tree differs from it; {} outside a checkout.

    A repository that does not track this file is another one, such as that of a virtual environment's project.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
        return done.stdout.decode(errors="replace").strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def data_info(data: Json) -> DataInfo:
    """The DataInfo in a snapshot's `data`. Raises an error of any of several types if it is damaged."""
    h, w, c = map(int, data["image_shape"])
    names, counts = tuple(map(str, data["class_names"])), tuple(map(int, data.get("class_counts", ())))
    targets, sampling = tuple(map(str, data.get("target_names", ()))), str(data.get("sampling", ""))
    extra = {str(name): data_info(one) for name, one in data.get("extra", {}).items()}
    return DataInfo(int(data["train_examples"]), (h, w, c), names, str(data["fingerprint"]), counts, targets, sampling,
                    extra, int(data.get("bits", 16)))  # fmt: skip
