"""Provenance: the versions, devices, git commit and data of a run, written next to its checkpoints."""

import contextlib
import functools
import hashlib
import importlib.metadata
import math
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

import jax
from ml_collections import ConfigDict

from imgclf_jax.core import cpuinfo, json_files
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Json, JsonMapping, JsonObject
from imgclf_jax.data.info import DataInfo

_PACKAGES = ("imgclf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "tensorflow",
             "tensorflow-cpu", "tensorflow-datasets", "scikit-learn")  # fmt: skip

# The extensions of x86 that decide how matmuls and sums round, as /proc/cpuinfo calls them, widest first.
_VECTORS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
# JAX's options that may differ between processes, or that change no result.
_OF_ONE_PROCESS = "cache|device|debug|_log_|logging|dump|traceback|profil|timeout|address|mtls|pprint"
# The types of entries that commands read; the others are only shown.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("compiler_options", "data", "evals", "git", "init_from", "jax_options", "modules",
                     "packages", "unreadable", "versions"), dict),
    **dict.fromkeys(("changed", "command", "devices", "extended"), list),
}  # fmt: skip
OF_COMPILERS = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_OPTIONS = "JAX_(?!COMPILATION_CACHE|PERSISTENT_CACHE)"  # JAX's environment variables, except those of its cache
# The flags of XLA, and further options of JAX, that change no result or that the devices and processes show.
_FLAGS_OF_NO_RESULT = "--xla_(dump|force_host_platform_device_count)"
_OPTIONS_OF_NO_RESULT = f"{_OF_ONE_PROCESS}|platform|process|coordinat"


def collect(data: DataInfo) -> JsonObject:
    """The provenance of this process, as JSON values."""
    return {**_invocation(), **_computing(), "data": asdict(data)}


def process_facts() -> JsonObject:
    """The facts that all processes of a run must share, as JSON values: versions, code, options of JAX and XLA."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    return {
        "python": platform.python_version().rpartition(".")[0],
        **_versions(),
        "the code of imgclf_jax": _code()[:12],
        "XLA_FLAGS": " ".join(sorted(flags)),
        **{name: os.environ.get(name, "") for name in OF_COMPILERS},
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


def module_facts() -> dict[str, str]:
    """The digests of the user's own modules, and the versions of the installed packages imported so far.

    Processes may have imported different ones, so they must share the facts that both have.
    """
    imported = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)]
    packages = sorted({package for name in imported for package in _distributions().get(name, ()) if package})
    return {**module_digests(), **{package: importlib.metadata.version(package) for package in packages}}


def module_digests() -> dict[str, str]:
    """The SHA-256 of each of the user's own modules, see `own_files`."""
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in own_files().items()}


def raised_in_own_code(error: BaseException) -> bool:
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


def find_changes(recorded: JsonMapping) -> dict[str, dict[str, str]]:
    """What has changed since the run last recorded it, of what the record and this process both have.

    - "files": the digests of code by file, where `imgclf_jax` stands for all files of this package.
    - "environment": the versions, the processor, the devices and processes, and the flags of the compilers.
    """
    computing, found = _computing(), {}
    for kind, describe in (("files", _code_by_name), ("environment", environment)):
        before, now = describe(recorded), describe(computing)
        for change in code_changes(recorded):
            before |= change.get(kind, {})
        found[kind] = {name: value for name, value in now.items() if before.get(name, value) != value}
    return found


def with_changed_code(recorded: JsonMapping, step: int) -> JsonObject:
    """The provenance of a run that continues from `step`, with what has changed in `changed_code`."""
    earlier = [change for change in code_changes(recorded) if change["step"] < step]
    rest = {name: value for name, value in recorded.items() if name != "changed_code"}
    if not step:  # nothing is left of the processes before
        return {**rest, **_invocation(), **_computing()}
    changed = find_changes({**rest, "changed_code": earlier})
    if any(changed.values()):
        commit = {"git": _git()} if "imgclf_jax" in changed["files"] else {}
        earlier.append({"step": step, **{kind: names for kind, names in {**changed, **commit}.items() if names}})
    return {**rest, "changed_code": earlier} if earlier else rest


def code_changes(recorded: JsonMapping) -> list[JsonObject]:
    """The steps at which a run went on with other code or elsewhere, without damaged entries.

    Each is {"step": n, "files": {name: digest}, "environment": {name: value}}, with one of the two or both, and with
    "git" if this package has changed.
    """
    found = recorded.get("changed_code")
    return [change for change in (found if isinstance(found, list) else []) if isinstance(change, dict)
            and type(change.get("step")) is int and {"files", "environment"} & change.keys()
            and all(isinstance(change.get(kind, {}), dict) for kind in ("files", "environment"))]  # fmt: skip


def _invocation() -> JsonObject:
    """The entries that say how and from which installation this process was called."""
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _installed(),
        "git": _git(),
    }


def _computing() -> JsonObject:
    """The entries of this process on which the bits of a step depend."""
    return {
        "versions": _versions(),
        "code": _code(),
        "modules": module_digests(),
        "processor": processor(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_options": {name: value for name, value in sorted(os.environ.items()) if re.match(_OPTIONS, name)},
        "compiler_options": {name: os.environ.get(name, "") for name in OF_COMPILERS},
    }


def environment(recorded: JsonMapping) -> dict[str, str]:
    """Versions, processor, devices, processes, and flags of compilers by name, without what was not recorded.

    The version of this package is in its code. Flags that change no result are left out.
    """
    devices, found = recorded.get("devices"), dict(json_files.as_object(recorded.get("versions")))
    found.pop("imgclf_jax", None)
    found["processor"] = recorded.get("processor")
    if isinstance(devices, list) and devices:
        found["devices"] = ", ".join(sorted({*map(str, devices)}))
        found["number of devices"] = len(devices)
    found["processes"] = recorded.get("processes")
    if isinstance(flags := recorded.get("xla_flags"), str):
        found["XLA_FLAGS"] = " ".join(sorted(f for f in flags.split() if not re.match(_FLAGS_OF_NO_RESULT, f)))
    if isinstance(options := recorded.get("jax_options"), dict):
        kept = (name for name in sorted(options) if not re.search(_OPTIONS_OF_NO_RESULT, name.lower()))
        found["JAX options"] = " ".join(f"{name}={options[name]}" for name in kept)
    found |= json_files.as_object(recorded.get("compiler_options"))
    return {name: str(value) or "not set" for name, value in found.items() if value is not None}


def _code_by_name(recorded: JsonMapping) -> dict[str, str]:
    package = {"imgclf_jax": recorded["code"]} if recorded.get("code") else {}
    return package | json_files.as_object(recorded.get("modules"))


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


_distributions = functools.cache(importlib.metadata.packages_distributions)  # packages by the modules that they hold


def _installed() -> dict[str, str]:
    """The version of each installed package, from its folder's name, which is faster than reading its metadata."""
    found: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):
                package, _, version = name.removesuffix(".dist-info").rpartition("-")
                if name.endswith(".dist-info") and package:
                    found.setdefault(package.replace("_", "-").lower(), version)  # the first on Python's path wins
    return dict(sorted(found.items()))


def _code() -> str:
    """A digest of the files of this package, committed or not."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def processor() -> str:
    """The processor's name, family, model and widest vector extension, since different CPUs round differently.

    The name alone is not enough: in clouds "AMD EPYC" is of several generations.
    """
    facts = cpuinfo.facts()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    parts = [facts["model name"]]
    if facts.keys() >= {"cpu family", "model"}:
        parts.append(f"family {facts['cpu family']} model {facts['model']}")
    return ", ".join(filter(None, [*parts, _vector_extension()]))


def _vector_extension() -> str:
    """The widest vector extension of the processor; "" if unknown."""
    flags = cpuinfo.flags()
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


def _data_info(data: Json) -> DataInfo:
    h, w, c = map(int, data["image_shape"])
    names, counts = tuple(map(str, data["class_names"])), tuple(map(int, data.get("class_counts", ())))
    targets, sampling = tuple(map(str, data.get("target_names", ()))), str(data.get("sampling", ""))
    extra = {str(name): _data_info(one) for name, one in data.get("extra", {}).items()}
    return DataInfo(
        int(data["train_examples"]), (h, w, c), names, str(data["fingerprint"]), counts, targets, sampling, extra
    )


def load_data_info(path: Path) -> DataInfo:
    """Loads the DataInfo from a `provenance.json`. Raises UserError if the file is missing or damaged."""
    try:
        return _data_info(json_files.read(path)["data"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
        what = "is damaged; remove it" if path.is_file() else "is missing"
        raise UserError(f"{path} {what}, and run train again with the config and work directory of this run, which "
                        "writes it anew from the data") from e  # fmt: skip


def well_formed(recorded: JsonMapping) -> JsonObject:
    """The content of a provenance.json without entries that no run writes, as if they had not been recorded."""
    found: JsonObject = {name: value for name, value in recorded.items() if isinstance(value, _TYPES.get(name, object))}
    for name in found.keys() & {"changed", "extended"}:
        found[name] = [one for one in found[name] if isinstance(one, dict) and type(one.get("step")) is int]
    if not isinstance(found.get("git", {}).get("commit"), str):
        found.pop("git", None)
    return found


def pin_groups(config: ConfigDict, mesh: str, recorded: JsonMapping) -> ConfigDict:
    """The config that a run continues with on any devices: 'per_device' keeps the number of groups that it began with.

    `mesh` is that of the config with which it began, and `recorded` its provenance. A run of a version that recorded no
    groups had one per device that trains the same seed.
    """
    if config.batch_norm != "per_device":
        return config
    groups = recorded.get("batch_norm_groups")
    if not isinstance(groups, int):
        devices = recorded.get("devices")
        count = len(devices) if isinstance(devices, list) else 0
        sizes = {name: int(size) for name, size in re.findall(r"(\w+)\s*=\s*(-?\d+)", mesh)}
        own = sizes.pop("seeds", 1)
        groups = count // own if own > 0 else math.prod(sizes.values())
    images = config.batch_size // config.accumulate
    if groups < 1 or images % groups:
        return config
    pinned = config.copy_and_resolve_references()
    pinned.batch_norm = f"groups({images // groups})"
    return pinned
