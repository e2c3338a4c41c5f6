"""Opens strangers' files with every command under a seeded plan of attacks, and lets hostile clients loose on `serve`.

    uv run python tests/attack.py --seconds 3600                # runs, sweeps, bundles, weights and data
    uv run python tests/attack.py --seconds 3600 --serve        # clients of one server
    uv run python tests/attack.py --seed 17 --rounds 1 --keep   # round 17 again, whose files and log are kept

Each round copies a work directory, a folder of runs, a bundle, a weights file or data, attacks the copy, and opens it
with one command, without `--trust`. The verdict counts the faults, and the exit status is 1 if there is any:

- outside: a file outside of the copy and of the named outputs was written, moved or removed, or a pipe got bytes
- code: the stranger's code ran, or a program started
- network: the command looked up a name or opened a connection
- hang: the command neither computed nor ended for 5 s
- endless: it computed for a minute, or took 4 GB, for a tiny run
- crash: a signal ended it
- traceback: it ended with a traceback. This breaks no promise on strangers' files, but is a bug

With `--serve` they are: slow, refused (for a polite client), memory, traceback, and an end that takes too long.
"""

import argparse
import collections
import contextlib
import fcntl
import gc
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import pty
import random
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attack_clients import attack_server

ROOT = Path(__file__).parent.parent
ASLEEP, CPU, MEMORY = 5.0, 60.0, 4 << 30  # seconds, seconds and bytes that make a fault
SHARED = ("--config.preprocess=decode(1)", "--config.augment=", "--config.model=mlp(widths=(32,))",
          "--config.schedule=constant(1e-2)", "--config.total=12 steps", "--config.batch_size=16",
          "--config.checkpoint_every=4 steps", "--config.eval_every=6 steps", "--config.log_every=4 steps",
          "--config.checkpoint.best=test/accuracy")  # fmt: skip
TINY = ("--config.data.source=fake(64, (12, 12, 1), 4)", *SHARED)
USES = tuple((command, *words, "--workdir=ITEM") for command, *words in (
    ("evaluate",), ("evaluate", "--predictions=ITEM/predictions.csv"), ("evaluate", "--checkpoints=all"),
    ("predict", "IMAGES"), ("features", "--output=OUT/f.npz"), ("probe",), ("probe", "--plot=OUT/p.png"),
    ("explain", "IMAGES/a/0.png", "--output=OUT/explained"), ("report",), ("show-batch",), ("export", "OUT/x.onnx"),
    ("export", "OUT/x.stablehlo"), ("export", "OUT/x.safetensors"), ("export", "OUT/x.savedmodel"),
    ("serve", "--port=0"), ("train", *TINY), ("train", *TINY), ("train", *TINY),
    ("train", *TINY, "--config.total=16 steps", "--extend", "--profile=13:15"), ("dryrun", *TINY, "--chips=cpu:1"),
))  # fmt: skip
WEIGHTS = tuple((*words, *TINY, "--config.init_from=ITEM") for words in (
    ("evaluate",), ("predict", "IMAGES"), ("train", "--workdir=OUT/new"), ("find-lr", "--steps=4"), ("probe",),
    ("export", "OUT/x.safetensors"), ("features", "--output=OUT/f.npz"), ("serve", "--port=0"), ("config",),
))  # fmt: skip
DATA = tuple((*words, "--config.data.source=DATA", *SHARED, "--config.data.eval.test=train") for words in (
    ("train", "--workdir=OUT/new"), ("show-batch", "--output=OUT/b.png"), ("find-lr", "--steps=4"),
    ("sweep", "--workdir=OUT/sweep", "--sweep=seed=0..1", "--print"), ("dryrun", "--chips=cpu:1"),
))  # fmt: skip
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "run": (*USES, *WEIGHTS, ("compare", "ITEM"), ("compare", "--test", "--html=OUT/c.html", "ITEM"),
            ("status", "ITEM"), ("reproduce", "ITEM", "--output=OUT/again"),
            ("reproduce", "ITEM", "--bundle=OUT/b.zip"),
            ("train", "--workdir=OUT/new", *TINY, "--config.method=distill('ITEM')")),
    "sweep": (("compare", "ITEM"), ("compare", "--test", "ITEM"), ("status", "ITEM"),
              ("sweep", "--workdir=ITEM", *TINY, "--sweep=seed=0..1")),
    "bundle": (("reproduce", "ITEM"), ("reproduce", "ITEM", "--output=OUT/again"),
               ("reproduce", "ITEM", "--bundle=OUT/b.zip")),
    "weights.safetensors": WEIGHTS, "weights.pth": WEIGHTS,
    "images": (*DATA, ("predict", "ITEM", "--workdir=RUN"), ("explain", "ITEM", "--workdir=RUN", "--output=OUT/e"),
               ("features", "ITEM", "--workdir=RUN", "--output=OUT/f.npz"), ("train", "--config=folder:ITEM", *SHARED,
               "--workdir=OUT/new", "--config.preprocess_eval="), ("evaluate", "--workdir=RUN",
               "--config.data.eval.new=DATA/train"), ("evaluate", "--workdir=RUN", "--corruptions=frost",
               "--frost=ITEM")),
    "data.npz": DATA, "labels.csv": DATA,
}  # fmt: skip
# What commands may write into a run besides the files that it has: `strace` has listed them.
NAMES = ("lock", "report.html", "predictions.csv", "predictions.npz", "batch-0.png", "skipped.jsonl",
         "corruption.jsonl", "parameters.txt", "time.jsonl", "result.json", "metrics.jsonl", "digests.jsonl", "tb",
         "profile", "profile/plugins", "damaged", "damaged/12", "checkpoints", "checkpoints/12", "checkpoints/16",
         "checkpoints/removed-4", "checkpoints/removed-8", "checkpoints/replaced-12",
         "checkpoints/12/metrics/metrics", "checkpoints/12/manifest.json", "checkpoints/16.orbax-checkpoint-tmp",
         "checkpoints/12.orbax-checkpoint-tmp-7", "checkpoints/12/.manifest.json.tmp")  # fmt: skip
ODD = ("a\nb", "'", '"', "*", "?[a]", "-rf", "--trust", "\x1b]0;x\x07", "\x1b[2J", "\udcff\udcfe", "\u202e", "~", "$HOME",
       "$(touch MARK)", "`touch MARK`", "%s{}", " ", ".", "..", "../../outside/victim", "\x7f", "CON", "é" * 60)  # fmt: skip
FOREIGN = {"posix", "os", "nt", "subprocess", "shutil", "runpy", "sys", "builtins", "stranger"}  # modules in a pickle
PROGRAMS = {"git", "fc-match", "nvidia-smi"}  # that the package starts
OBSERVED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "os.system", "os.exec",
            "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class")  # fmt: skip


class Harm:
    """Its pickle runs a shell command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


class Round:
    """One attacked copy in `folder`, and one command that opens it; `seed` decides both. `words` says what was done."""

    def __init__(self, seed: int, base: Path, folder: Path, port: int):
        self.rng, self.base, self.folder = random.Random(seed), base, folder
        self.kind = self.rng.choice(("run",) * 6 + tuple(COMMANDS))
        self.command = self.rng.choice(COMMANDS[self.kind])
        self.outside, self.out, self.mark = folder / "outside", folder / "out", folder / "outside" / "mark"
        self.victim, self.moved = self.outside / "victim", 0
        self.words: list[str] = []
        self.held: list[tuple[str, int]] = []  # pipes and terminals that nothing may be written to
        for name in ("outside/home/.keras", "outside/0", "outside/12/metrics", "outside/photos/200", "out", "tmp"):
            (folder / name).mkdir(parents=True)
        for file in ("victim", "photos/200/a.png", "photos/keep.txt", "12/metrics/metrics", "home/.profile"):
            (self.outside / file).write_text("precious\n")
        self.hold(self.outside / "pipe", "the pipe outside")
        name = self.rng.choice((self.kind,) * 8 + ("a b", "x*y?", "lr=[0.1]", "é漢")) + Path(self.kind).suffix
        self.item = folder / "place" / name
        self.addresses = (f"http://127.0.0.1:{port}/x", "gs://evil/x", "s3://evil/x.npz", f"https://127.0.0.1:{port}",
                          "hdfs://127.0.0.1/x", f"file://{self.victim}", str(self.victim), "../../outside/photos",
                          str(self.outside / "pipe"), str(self.outside / "photos"), "/dev/full", "~/.profile")  # fmt: skip

    def hold(self, path: Path, name: str) -> None:
        """Makes a named pipe that has a reader and a writer, so that opening it succeeds and reading it waits."""
        os.mkfifo(path)
        self.held.append((name, os.open(path, os.O_RDWR | os.O_NONBLOCK)))

    def prepare(self) -> None:
        source = {"run": "run", "bundle": "run"}.get(self.kind, self.kind)
        source = "cut" if source == "run" and self.rng.random() < 0.5 else source
        self.item.parent.mkdir()
        target = self.item if self.kind != "bundle" else self.folder / "tmp" / "unpacked"
        copy = shutil.copytree if (self.base / source).is_dir() else shutil.copyfile
        copy(self.base / source, target)
        runs = {"run": [target], "bundle": [target], "sweep": sorted(p for p in target.iterdir() if p.is_dir())
                if target.is_dir() else []}.get(self.kind, [])  # fmt: skip
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            if self.kind == "bundle":
                self.rng.choice((self.edit, self.edit, self.plant_pickle))(target)
            elif runs:
                run = self.rng.choice(runs)
                usual = (self.obstruct,) * 8 + (self.edit,) * 4
                self.rng.choice((*usual, self.damage, self.damage, self.set_aside, self.set_aside, self.rename,
                                 self.plant_module, self.plant_pickle, self.list_elsewhere))(
                    target if runs != [target] and self.rng.random() < 0.3 else run)  # fmt: skip
            elif self.item.is_dir():
                self.rng.choice((self.obstruct, self.fill, self.link_folders, self.name_oddly))(target)
            else:
                self.rng.choice((self.craft, self.craft, self.damage, self.obstruct))(target)
        if self.kind == "bundle":
            self.pack(target)

    # Attacks on a path.

    def existing(self, folder: Path) -> list[Path]:
        """What lies below a folder, without following links; the folder itself if it is a file."""
        found = [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]
        return sorted(found) or [folder]

    def obstruct(self, folder: Path, name: str = "") -> None:
        """Puts something else where a command reads, writes, replaces or removes."""
        if folder.is_dir():
            path = folder / (name or self.rng.choice(NAMES)) if name or self.rng.random() < 0.6 else self.rng.choice(
                self.existing(folder))  # fmt: skip
            if not name and self.rng.random() < 0.25:
                path = path.with_name(f".{path.name}.tmp")
        else:
            path = folder
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        if self.item.parent not in path.parent.resolve().parents and path.parent.resolve() != self.item.parent:
            return  # below a link of an earlier attack
        there, moved = os.path.lexists(path), self.outside / f"moved{self.moved}"
        original: Path | None = None
        if there:
            self.moved += 1
            original = path.rename(moved)
        file = original if original and original.is_file() and not original.is_symlink() else self.victim
        kinds = {
            "a link to its original": lambda: path.symlink_to(original or self.victim),
            "a relative link": lambda: path.symlink_to(os.path.relpath(original or self.victim, path.parent)),
            "a link to a file": lambda: path.symlink_to(self.victim),
            "a link to a folder": lambda: path.symlink_to(self.rng.choice((self.outside, self.outside / "photos"))),
            "a hard link": lambda: os.link(file, path),
            "a pipe": lambda: os.mkfifo(path),
            "a pipe with a writer": lambda: self.hold(path, "the pipe inside"),
            "a link to a pipe": lambda: path.symlink_to(self.outside / "pipe"),
            "a socket": lambda: os.mknod(path, stat.S_IFSOCK | 0o600),
            "a link to a device": lambda: path.symlink_to(self.device()),
            "a folder": lambda: shutil.copytree(self.base / "images", path),
            "a file": lambda: path.write_bytes(self.rng.choice((b"", b"{}", b"\xff" * 99))),
            "a dangling link": lambda: path.symlink_to(self.outside / "new"),
            "a link to itself": lambda: path.symlink_to(path),
            "a link to its parent": lambda: path.symlink_to("."),
        }
        kind = self.rng.choice(tuple(kinds))
        kinds[kind]()
        self.words.append(f"{path.relative_to(self.folder)} is {kind}")

    def device(self) -> str:
        kind = self.rng.choice(("/dev/full", "/dev/tty", "/dev/stdin", "terminal"))
        if kind != "terminal":
            return kind
        ours, theirs = pty.openpty()
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
        self.held += [("the terminal", ours), ("", theirs)]
        return os.ttyname(theirs)

    def set_aside(self, run: Path) -> None:
        """Damages the latest checkpoint, so that `train` moves it to `damaged`, which is obstructed."""
        steps = self.steps(run)
        if steps:
            (steps[-1] / "manifest.json").write_text("{}")
            self.words.append(f"checkpoint {steps[-1].name} is damaged")
            self.obstruct(run, self.rng.choice(("damaged", f"damaged/{steps[-1].name}")))
            if not self.kind == "sweep":
                self.command = COMMANDS["run"][USES.index(("train", *TINY, "--workdir=ITEM"))]

    def steps(self, run: Path) -> list[Path]:
        folder = run / "checkpoints"
        found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=lambda path: int(path.name))

    # Attacks on contents.

    def hostile(self, old: object) -> Any:
        """A value that names code, a place or nonsense, perhaps inside of a spec."""
        rng = self.rng
        call = rng.choice((f"os:system('touch {self.mark}')", "stranger:run", "stranger:run()", "os:abort",
                           f"subprocess:call(('touch', '{self.mark}'))", f"builtins:open('{self.mark}', 'w')"))  # fmt: skip
        address, odd = rng.choice(self.addresses), rng.choice(ODD).replace("MARK", str(self.mark))
        where = rng.choice((address, address, odd))
        inner = rng.choice((f"norm={call!r}", f"activation={call!r}", f"widths={call!r}", f"block={call!r}"))
        source = rng.choice((f"folder({where!r})", f"arrays({where!r})", f"table({where!r})", "tfds('mnist')",
                             f"tfds('someone:digits', data_dir={where!r})", f"tfds('mnist', data_dir={where!r})"))  # fmt: skip
        return rng.choice((
            call, call, f"{old}|{call}", f"mlp({inner})", f"resnet_cifar({inner})", f"sgd(momentum={call!r})", where,
            f"distill({where!r})", source, source, f"{source}/test", f"{call}/test", [call], {call: call}, odd, -1, None,
            True, 1e308, float("nan"), [[]] * 3, f"chain({call})", f"warmup({call!r})", f"test|{call}",
        ))  # fmt: skip

    def edit(self, run: Path) -> None:
        """Sets values of a JSON file to hostile ones; often its digests are made to match."""
        records = [p for p in self.existing(run) if p.suffix in (".json", ".jsonl") and p.is_file()
                   and not p.is_symlink()]  # fmt: skip
        own = [run / "config.json"] * 8 if (run / "config.json").is_file() else []
        if not (files := [*own, *records, *(p for p in records if p.parent == run), *self.metadata(run)]):
            return
        file = self.rng.choice(files)
        with contextlib.suppress(ValueError):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            row = self.rng.randrange(len(lines) or 1)
            value = json.loads(lines[row])
            for container, key in self.rng.sample(leaves := list(walk(value)), min(len(leaves), self.rng.choice((1, 3)))):
                container[key] = self.hostile(container[key])
                self.words.append(f"{file.relative_to(run)}: {key} = {container[key]!r:.200}")
            if self.rng.random() < 0.1 and isinstance(value, dict):
                value[str(self.hostile("x"))] = self.hostile("")
            lines[row] = json.dumps(value)
            file.write_text("\n".join(lines) + "\n")
        if self.rng.random() < 0.8:
            self.seal(run)

    def metadata(self, run: Path) -> list[Path]:
        return [path for step in self.steps(run) for path in step.rglob("_*METADATA") if path.is_file()]

    def seal(self, run: Path) -> None:
        """Makes the digests of a run's records and the manifests of its checkpoints match its files."""
        from imgclf_jax.core import json_files
        from imgclf_jax.run.provenance import facts_digest

        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            provenance = json.loads((run / "provenance.json").read_text())
            provenance["facts_sha256"] = facts_digest(provenance)
            for name in ("config", "result"):
                if (run / f"{name}.json").is_file():
                    provenance[f"{name}_sha256"] = json_files.digest((run / f"{name}.json").read_bytes())
            (run / "provenance.json").write_text(json.dumps(provenance))
        for step in self.steps(run):
            files = [p for p in step.rglob("*") if stat.S_ISREG(p.lstat().st_mode) and p.name != "manifest.json"]
            entries = {str(p.relative_to(step)): [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files}
            if stat.S_ISREG(os.lstat(step).st_mode) or not (step / "manifest.json").is_symlink():
                with contextlib.suppress(OSError):
                    fresh(step / "manifest.json").write_text(json.dumps(entries))

    def damage(self, item: Path) -> None:
        """Flips bits of a file, cuts it short or empties it."""
        files = [p for p in self.existing(item) if stat.S_ISREG(p.lstat().st_mode) and p.stat().st_nlink == 1]
        if not files:
            return
        file = self.rng.choice(files)
        content = bytearray(file.read_bytes()) or bytearray(1)
        for _ in range(self.rng.choice((1, 4, 40))):
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        file.write_bytes(content[: self.rng.choice((0, 9, len(content) // 2, len(content), len(content)))])
        self.words.append(f"{file.name} is damaged")
        if item.is_dir() and self.rng.random() < 0.5:
            self.seal(item)

    def list_elsewhere(self, run: Path) -> None:
        """A manifest that lists files elsewhere."""
        for step in self.steps(run):
            names = [self.rng.choice((*self.addresses, *ODD, "../../../outside/pipe")) for _ in range(3)]
            fresh(step / "manifest.json").write_text(json.dumps({name: [9, zlib.crc32(b"precious\n")] for name in names}))
            self.words.append(f"the manifest of {step.name} lists {names}")

    def rename(self, run: Path) -> None:
        """Names a checkpoint or a file otherwise."""
        if not (found := [*self.steps(run), *(p for p in self.existing(run) if not p.is_symlink())]):
            return
        path = self.rng.choice(found)
        name = self.rng.choice(("-1", "٣", "0012", "1e9", "9" * 40, "removed-..", "replaced-12", "replaced-..", "removed-",
                                "replaced-x", "12.orbax-checkpoint-tmp", *ODD)).replace("/", "_")  # fmt: skip
        with contextlib.suppress(OSError):
            path.rename(path.with_name(name))
            self.words.append(f"{path.name} is named {name!r}")

    def plant_module(self, run: Path) -> None:
        """Modules that commands may look for, in a run that is the current directory."""
        for name in ("stranger", "matplotlib", "torch", "onnx", "jax2onnx", "onnxruntime", "gcsfs", "sitecustomize", "optax",
                     "jax", "config", "digits", "faults", "pyarrow", "imgclf_jax", "usercustomize"):  # fmt: skip
            with contextlib.suppress(OSError):
                (run / f"{name}.py").write_text(f"open({str(self.mark)!r}, 'w')\n\n\ndef run(*a, **k):\n    pass\n")
        self.words.append("modules in the run, the current directory")
        self.out = run / "out"
        self.out.mkdir(exist_ok=True)

    def plant_pickle(self, run: Path) -> None:
        path = run / self.rng.choice((*NAMES[1:9], "config.json", "metrics.jsonl", "features.npz"))
        with contextlib.suppress(OSError):
            self.pickled(path, self.rng.choice(("npz", "pickle", "zip")))

    def pickled(self, path: Path, how: str) -> None:
        fresh(path)
        content, buffer = pickle.dumps(Harm(self.mark), self.rng.choice((0, 2, 4))), io.BytesIO()
        array = np.array([Harm(self.mark)] * 4, dtype=object)
        if how == "npz":
            names = ("x_train", "y_train", "x_test", "names", "labels", "probabilities", "ids", "class_names")
            np.savez(buffer, **dict.fromkeys(names, array))  # type: ignore[arg-type]
        elif how == "zip":
            with zipfile.ZipFile(buffer, "w") as packed:
                packed.writestr("archive/data.pkl", content)
                packed.writestr("archive/version", "3\n")
                packed.writestr("archive/data/0", bytes(64))
        elif how == "legacy":
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                buffer.write(pickle.dumps(value, 2))
            buffer.write(content + pickle.dumps([], 2))
        path.write_bytes(buffer.getvalue() or content)
        self.words.append(f"{path.name} is a pickle of code ({how})")

    def craft(self, file: Path) -> None:
        """A weights file, an archive of arrays or a table that was made by hand."""
        rng = self.rng
        if file.suffix == ".csv":
            rows = [str(rng.choice((*self.addresses, *ODD, "a/0.png", "../data.npz"))) for _ in range(9)]
            file.write_text("file,label\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows)), errors="replace")
            self.words.append(f"a table of {rows}")
        elif file.suffix == ".safetensors" and rng.random() < 0.6:
            entry = {"dtype": rng.choice(("F32", "O", self.hostile(""))), "shape": rng.choice(([4, 4], [-1], [2**40], "x")),
                     "data_offsets": rng.choice(([0, 64], [-9, 9], [0, 2**62], None))}  # fmt: skip
            header = json.dumps({str(rng.choice((*ODD, self.hostile("")))): entry, "__metadata__": {"a": self.hostile("")}})
            length = rng.choice((len(header.encode()), 2**63, 2**40, 0))
            file.write_bytes(length.to_bytes(8, "little") + header.encode() + bytes(64))
            self.words.append(f"header of {length}: {header:.200}")
        elif file.suffix == ".npz" and rng.random() < 0.5:
            header = f"{{'descr': __import__('os').system('touch {self.mark}'), 'fortran_order': False, 'shape': (1,)}}"
            with zipfile.ZipFile(file, "w") as packed:
                for name in ("x_train.npy", "../../outside/victim.npy", str(self.mark), "y_train.npy", "y_train.npy"):
                    packed.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
            self.words.append("an archive with code in its headers")
        else:
            self.pickled(file, "npz" if file.suffix == ".npz" else rng.choice(("pickle", "zip", "legacy", "npz")))

    def pack(self, run: Path) -> None:
        """Packs the bundle, perhaps with members that it must not have."""
        names = ("config.json", "provenance.json", "digests.jsonl", "metrics.jsonl", "result.json")
        with zipfile.ZipFile(self.item, "w") as packed:
            for name in names:
                if (run / name).is_file():
                    packed.write(run / name, name)
            if self.rng.random() < 0.4:
                name = self.rng.choice(("../x", "../../outside/victim", str(self.mark), "stranger.py", "config.json",
                                        "requirements.txt", "C:\\x", "tb/", *ODD[:8]))  # fmt: skip
                member = zipfile.ZipInfo(name.encode(errors="replace").decode())
                member.external_attr = self.rng.choice((0o644, stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644)) << 16
                packed.writestr(member, str(self.victim))
                self.words.append(f"a member {name!r}")
        if self.rng.random() < 0.2:
            self.rng.choice((self.damage, self.obstruct))(self.item)

    def fill(self, folder: Path) -> None:
        """Puts pipes, devices and links in a class folder."""
        for i in range(self.rng.choice((1, 2, 5))):
            self.obstruct(folder, f"{self.rng.choice('ab')}/{i}.png")
        target = self.rng.choice((str(self.outside), "/dev", "/etc", "/dev/fd", "..", str(self.folder), "/proc/self/cwd"))
        (folder / "a" / "more").symlink_to(target)
        self.words.append(f"a/more is a link to {target}")

    def link_folders(self, folder: Path) -> None:
        """Eleven folders that link to each other: 11! paths."""
        below = [folder / self.rng.choice("ab") / f"d{i}" for i in range(11)]
        for one in below:
            one.mkdir(parents=True, exist_ok=True)
        for one in below:
            for other in below:
                with contextlib.suppress(FileExistsError):
                    (one / other.name).symlink_to(os.path.relpath(other, one))
        self.words.append("11 folders link to each other")

    def name_oddly(self, folder: Path) -> None:
        for name in self.rng.sample([name for name in ODD if "/" not in name and name not in (".", "..")], 6):
            with contextlib.suppress(OSError):
                shutil.copyfile(folder / "a/0.png", folder / "a" / f"{name}.png")
                shutil.copytree(folder / "a", folder / name)
        self.words.append("odd names")

    # The command.

    def argv(self) -> list[str]:
        data = {"data.npz": "arrays", "labels.csv": "table"}.get(self.kind, "folder") + f"({str(self.item)!r})"
        replaced = {"'ITEM'": repr(str(self.item)), "ITEM": str(self.item), "IMAGES": str(self.base / "images"),
                    "RUN": str(self.base / "run"), "OUT": str(self.out), "DATA": data}  # fmt: skip
        return [re.sub("|".join(replaced), lambda found: replaced[found[0]], word) for word in self.command]

    def environment(self, port: int) -> dict[str, str]:
        trap = f"http://127.0.0.1:{port}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), trap)
        return {**proxies, "HOME": str(self.outside / "home"), "TMPDIR": str(self.folder / "tmp"),
                "AWS_ENDPOINT_URL": trap, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                "TENSORSTORE_GCS_HTTP_URL": trap, "STORAGE_EMULATOR_HOST": trap, "GCE_METADATA_HOST": trap[7:],
                "KERAS_HOME": str(self.folder / "tmp")}  # fmt: skip

    def snapshot(self) -> dict[str, tuple[Any, ...]]:
        """Everything in the folder but the item, the outputs and temporary files: types, modes, times, contents."""
        free, found = {self.item, self.folder / "out", self.folder / "tmp"}, {}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(parent, name) not in free]
            for path in (Path(parent, name) for name in (*folders, *files)):
                if path not in free and path.name != "log":
                    about = path.lstat()
                    content = os.readlink(path) if path.is_symlink() else ""
                    if stat.S_ISREG(about.st_mode):
                        content = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[str(path.relative_to(self.folder))] = (about.st_mode, about.st_mtime_ns, content)
        return found

    def play(self, port: int, trap: socket.socket, root: Path) -> list[tuple[str, str]]:
        """Attacks the copy and runs the command; the faults as pairs of a kind and a description."""
        self.prepare()
        before, log, events = self.snapshot(), self.folder / "tmp" / "log", self.folder / "tmp" / "events"
        events.touch()
        cwd = self.item if self.out != self.folder / "out" and self.item.is_dir() else self.folder / "out"
        pid = os.fork()
        if not pid:
            run_command(self.argv(), cwd, self.environment(port), log, events, root)
        fault, status = watch(pid, log if self.command[0] == "serve" else None)
        faults, after, text = [], self.snapshot(), log.read_text(errors="replace")
        faults += [(fault, f"the status is {status}")] if fault else []
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                what = "appeared" if name not in before else "is gone" if name not in after else "has changed"
                faults.append(("code" if name == "outside/mark" else "outside", f"{name} {what}"))
        for name, held in self.held:
            with contextlib.suppress(BlockingIOError, OSError):
                if name and (read := os.read(held, 1000)):
                    faults.append(("outside", f"{name} got {read!r:.60}"))
            os.close(held)
        with contextlib.suppress(BlockingIOError):
            while True:
                trap.accept()[0].close()
                faults.append(("network", "a connection"))
        faults += [tuple(line.split(" ", 1)) for line in sorted(set(events.read_text().splitlines()))]
        if not fault and os.WIFSIGNALED(status):
            faults.append(("crash", f"signal {os.WTERMSIG(status)}"))
        if "Traceback (most recent call last)" in text:
            faults.append(("traceback", text.strip().splitlines()[-1][:200]))
        return faults


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """The leaves of a JSON value, as pairs of a container and a key."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from walk(inner)


def fresh(path: Path) -> Path:
    """Removes the name, so that writing to the path follows no link."""
    if path.is_symlink() or path.exists():
        path.unlink()
    return path


def observe(events: Path) -> None:
    """Writes a line to `events` for each name that is looked up, connection, program and foreign name in a pickle."""
    file = os.open(events, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: Sequence[Any]) -> None:
        if event not in OBSERVED:
            return
        kind = "network" if event.startswith("socket") else "code"
        if event == "pickle.find_class" and arguments[0] not in FOREIGN:
            return
        if event == "subprocess.Popen" and (os.path.basename(str(arguments[0])) in PROGRAMS or "launch.py" in str(arguments)):
            return
        if event == "socket.getaddrinfo" and arguments[0] in ("127.0.0.1", "localhost"):
            return
        if event == "socket.connect" and not isinstance(arguments[1], tuple):
            return
        os.write(file, f"{kind} {event} {arguments[:2]!r:.150}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def run_command(argv: list[str], cwd: Path, environment: dict[str, str], log: Path, events: Path, root: Path) -> None:
    """Runs a command line in this process, a fork, and ends it."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(log if number else os.devnull, flags, 0o644), number)
    os.dup2(1, 2)
    observe(events)
    sys.argv = [str(root / "launch.py"), *argv]
    from imgclf_jax.cli.main import run_and_exit

    run_and_exit("launch.py", [sys.executable, sys.argv[0]])


def usage(group: int) -> tuple[float, int, bool]:
    """CPU seconds and bytes of memory of a process group, and whether any of it computes or waits for a disk now."""
    seconds, size, busy = 0, 0, False
    for folder in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            values = Path("/proc", str(int(folder)), "stat").read_text().rpartition(")")[2].split()
            if int(values[2]) == group:
                seconds += sum(map(int, values[11:15]))
                size, busy = size + int(values[21]), busy or values[0] in "RD"
    return seconds / os.sysconf("SC_CLK_TCK"), size * os.sysconf("SC_PAGE_SIZE"), busy


def watch(pid: int, server_log: Path | None = None) -> tuple[str, int]:
    """Waits for a process, at most until a fault; a server is asked to stop once it serves. The fault, and the status."""
    fault, asked, seen = "", False, time.monotonic()
    last = 0.0
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.05)
        seconds, size, busy = usage(pid)
        if busy or seconds > last + 0.1:
            seen, last = time.monotonic(), seconds
        fault = "hang" if time.monotonic() - seen > ASLEEP else "endless" if seconds > CPU or size > MEMORY else ""
        if server_log and not asked and "http://127.0.0.1" in server_log.read_text(errors="replace"):
            asked, seen = True, time.monotonic()
            os.kill(pid, signal.SIGTERM)
        if fault:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return fault, done[1]


def load(root: Path, cache: Path) -> None:
    """Imports the package of `root` and JAX, computes nothing and starts no thread, so that this process can fork."""
    os.environ.update(XDG_CACHE_HOME=str(cache), JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    sys.path.insert(0, str(root))
    import imgclf_jax
    from imgclf_jax.run import environment

    if root not in Path(imgclf_jax.__file__).parents:
        raise SystemExit(f"imgclf_jax is {imgclf_jax.__file__}, not in {root}")
    environment.prepare(True)
    for module in pkgutil.walk_packages(imgclf_jax.__path__, "imgclf_jax."):
        with contextlib.suppress(ImportError):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


def prepare(base: Path, root: Path) -> None:
    """What the rounds copy: a run, one that was stopped, a sweep, images, arrays, a table and weights."""
    rng = np.random.default_rng(0)
    rows = ["file,label"]
    for number in range(24):
        file = base / "images" / "ab"[number % 2] / f"{number // 2}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).save(file)
        rows.append(f"{file},{'ab'[number % 2]}")
    (base / "labels.csv").write_text("\n".join(rows) + "\n")
    arrays = {"x_train": rng.integers(0, 256, (32, 12, 12, 1), dtype=np.uint8), "y_train": np.arange(32) % 4}
    np.savez(base / "data.npz", **arrays)  # type: ignore[arg-type]
    (base / "events").touch()
    for argv in (("train", f"--workdir={base}/run", *TINY), ("evaluate", f"--workdir={base}/run"),
                 ("export", f"{base}/weights.safetensors", f"--workdir={base}/run"),
                 ("compare", "--test", f"{base}/run"),
                 ("sweep", f"--workdir={base}/sweep", *TINY, "--sweep=seed=0..1")):  # fmt: skip
        if not (pid := os.fork()):
            run_command(list(argv), base, {}, base / "log", base / "events", root)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"{' '.join(argv)} failed: {(base / 'log').read_text()}")
    shutil.copyfile(base / "weights.safetensors", base / "weights.pth")
    shutil.copytree(base / "run", base / "cut")
    (base / "cut" / "result.json").unlink()
    shutil.rmtree(max((base / "cut" / "checkpoints").iterdir(), key=lambda path: int(path.name)))


def work(first: int, step: int, until: float, rounds: int, base: Path, root: Path, keep: bool, results: Any) -> None:
    """Plays every `step`-th round, and puts (seed, command, attacks, faults) of each into `results`, at the end None."""
    os.nice(5)
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        port, seed, folder = trap.getsockname()[1], first, base.parent / f"round{os.getpid()}"
        while time.monotonic() < until and seed < rounds:
            one = Round(seed, base, folder, port)
            faults = one.play(port, trap, root)
            results.put((seed, f"{one.kind}: {' '.join(one.command)}", one.words, faults))
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            folder, seed = (folder.with_name(f"round{seed + step}") if keep else folder), seed + step
    results.put(None)


def attack(seconds: float, seed: int, rounds: int, jobs: int, root: Path, folder: Path, keep: bool) -> int:
    """Plays rounds until the time is over; prints each fault; the number of faults."""
    base = folder / "base"
    base.mkdir()
    load(root, folder / "cache")
    prepare(base, root)
    context = multiprocessing.get_context("fork")
    results, began, last = context.SimpleQueue(), time.monotonic(), seed + rounds if rounds else sys.maxsize
    print(f"prepared in {folder}", flush=True)
    workers = [context.Process(target=work, args=(seed + i, jobs, began + seconds, last, base, root, keep, results))
               for i in range(jobs)]  # fmt: skip
    for worker in workers:
        worker.start()
    count, played, running, told = collections.Counter[str](), collections.Counter[str](), jobs, began
    while running:
        if (result := results.get()) is None:
            running -= 1
            continue
        number, command, words, faults = result
        played[command.split()[1]] += 1
        count.update({kind for kind, _ in faults})
        for kind, what in faults:
            print(f"{kind.upper()}: --seed {number}: {command:.150}; {'; '.join(words)}: {what}", flush=True)
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{told - began:.0f} s: {played.total()} rounds, {dict(count)}", flush=True)
    for worker in workers:
        worker.join()
    kinds = ("outside", "code", "network", "hang", "endless", "crash", "traceback")
    print(f"{played.total()} rounds in {time.monotonic() - began:.0f} s: "
          f"{', '.join(f'{count[kind]} {kind}' for kind in kinds)}; {dict(sorted(played.items()))}")  # fmt: skip
    return count.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, default=0, help="how many at most")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once")
    parser.add_argument("--root", type=Path, default=ROOT, help="the clone whose code is attacked")
    parser.add_argument("--keep", action="store_true", help="keep the files of all rounds")
    parser.add_argument("--serve", action="store_true", help="attack a server as its clients")
    args = parser.parse_args()
    folder, root = Path(tempfile.mkdtemp(prefix="attack")), args.root.resolve()
    if args.serve:
        return min(1, attack_server(args.seconds, args.seed, root, folder, TINY))
    return min(1, attack(args.seconds, args.seed, args.rounds, args.jobs, root, folder, args.keep))


if __name__ == "__main__":
    sys.exit(main())
