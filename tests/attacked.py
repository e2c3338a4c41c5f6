"""Copies of strangers' files (a run, a bundle, weights, data), attacked by a seeded plan: see attack.py."""

import contextlib
import fcntl
import io
import json
import os
import pickle
import pty
import random
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_RECORDS = ("config.json", "provenance.json", "metrics.jsonl", "digests.jsonl", "result.json")
# What a command reads, writes, replaces or removes in a run, from `strace` of all commands; N is the latest step.
READ = (*_RECORDS, "checkpoints", "checkpoints/N", "checkpoints/N/manifest.json", "checkpoints/N/metrics/metrics",
         "checkpoints/N/default", "checkpoints/N/default/_METADATA", "checkpoints/N/default/d", "requirements.txt",
         "checkpoints/N/_CHECKPOINT_METADATA", "checkpoints/N/default/manifest.ocdbt")  # fmt: skip
TOUCHED = {
    "train": (*_RECORDS, "lock", "lock", "lock", "parameters.txt", "tb", "profile",
              "profile/plugins", "profile/plugins/profile", "checkpoints", "checkpoints/8", "checkpoints/12",
              "checkpoints/16", "checkpoints/12.orbax-checkpoint-tmp", "checkpoints/12.orbax-checkpoint-tmp/default",
              "checkpoints/16.orbax-checkpoint-tmp-7", "checkpoints/removed-4", "checkpoints/removed-8", "damaged",
              "checkpoints/replaced-12", "checkpoints/replaced-8"),
    "report": ("report.html",), "show-batch": ("batch-0.png",), "dryrun": ("dryrun-cpu-1.json",),
    "evaluate": ("predictions.csv",), "status": (*READ, "lock"),
    "compare": ("predictions.npz", "predictions.csv", "predictions.jsonl"),
    "sweep": ("lock", "seed=0", "seed=0.log", "seed=1.log", "seed=1/lock", "seed=1/result.json"),
}  # fmt: skip
OBSTACLES = ("a link to its original", "a link to a file", "a link to a folder", "a hard link", "a dangling link",
             "a pipe", "a pipe with a writer", "a link to a pipe", "a link to a device", "a folder")  # fmt: skip
_MORE = ("a relative link", "a socket", "a file", "a link to itself", "a link to its parent")
_ODD = ("a\nb", "'", '"', "*", "?[a]", "-rf", "--trust", "\x1b]0;x\x07", "\x1b[2J", "\udcff\udcfe", "\u202e", "~",
        "$HOME", "$(touch MARK)", "`touch MARK`", "%s{}", " ", "..", "../../outside/photos", "é" * 60)  # fmt: skip
_MODULES = ("stranger", "matplotlib", "torch", "onnx", "jax2onnx", "onnxruntime", "gcsfs", "sitecustomize", "jax",
            "optax", "usercustomize", "config", "digits", "imgclf_jax", "keras", "numpy")  # fmt: skip


class Harm:
    """Its pickle runs a shell command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


class Attacked:
    """A copy of `kind` from `base`, below `folder`, for a command to open. `words` says how it was attacked.

    `task` is the command if it works in the copy, else "". A `case`, a name and one of OBSTACLES, is the only attack.
    `outside` is what no command may touch. `held` are the names and descriptors of pipes and terminals that
    nothing may be written to. Code that runs makes the file `mark`. `inside`: the copy is the current directory.
    """

    def __init__(
        self, rng: random.Random, kind: str, task: str, base: Path, folder: Path, port: int,
        case: tuple[str, str] | None = None,
    ):  # fmt: skip
        self.rng, self.kind, self.task, self.base, self.folder = rng, kind, task, base, folder
        self.outside, self.mark, self.victim = folder / "outside", folder / "outside/mark", folder / "outside/victim"
        self.words: list[str] = []
        self.held: list[tuple[str, int]] = []
        self.moved, self.inside = 0, False
        for name in ("outside/home", "outside/0", "outside/12/metrics", "outside/photos/8", "outside/photos/12",
                     "place", "out", "tmp"):  # fmt: skip
            (folder / name).mkdir(parents=True)
        for file in (
            "victim",
            "photos/8/a.png",
            "photos/12/a.png",
            "photos/keep.txt",
            "12/metrics/metrics",
            "home/.profile",
        ):
            (self.outside / file).write_text("precious\n")
        self._hold(self.outside / "pipe", "the pipe outside")
        self.places = (f"http://127.0.0.1:{port}/x", "gs://evil/x", "s3://evil/x.npz", f"https://127.0.0.1:{port}",
                       "hdfs://127.0.0.1/x", f"file://{self.victim}", str(self.victim), "../../outside/photos",
                       str(self.outside / "pipe"), str(self.outside / "photos"), "/dev/full", "~/.profile")  # fmt: skip
        name = rng.choice((kind,) * 8 + ("a b", "x*y?", "lr=[0.1]", "é漢")).removesuffix(Path(kind).suffix)
        self.item = folder / "place" / (name + Path(kind).suffix)
        self._make(case)

    def _make(self, case: tuple[str, str] | None) -> None:
        sources = {"run": ("run",) if case else ("run", "cut"), "bundle": ("run",)}
        source = self.base / self.rng.choice(sources.get(self.kind, (self.kind,)))
        target = self.item if self.kind != "bundle" else self.folder / "tmp" / "unpacked"
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        if case:
            if case[0].startswith("damaged"):
                self._break_latest(target)
            self.obstruct(target, *case)
            return
        own = (self.set_aside,) * 2 if self.task == "train" else ()
        whole = (self.obstruct,) * 9 + (self.name_code,) * 5 + (self.edit,) * 3 + (self.damage,) * 2 + own
        attacks: dict[str, tuple[Any, ...]] = {
            "run": (*whole, self.rename, self.plant_modules, self.plant_pickle, self.list_elsewhere),
            "bundle": (self.name_code, self.name_code, self.edit, self.plant_pickle, lambda _: None),
            "images": (self.obstruct, self.fill, self.name_oddly) * 3 + (self.link_folders,),
        }
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            at = target
            if self.kind == "sweep" and self.rng.random() < 0.6:
                at = self.rng.choice((target / "seed=0", target / "seed=1"))
            kind = "run" if self.kind == "sweep" else self.kind
            with contextlib.suppress(OSError):  # an earlier attack is in the way
                self.rng.choice(attacks.get(kind, (self.craft, self.craft, self.damage, self.obstruct)))(at)
        if self.kind == "bundle":
            self._pack(target)

    def _hold(self, path: Path, name: str) -> None:
        """Makes a named pipe that has a reader and a writer, so that opening it succeeds and reading it waits."""
        os.mkfifo(path)
        self.held.append((name, os.open(path, os.O_RDWR | os.O_NONBLOCK)))

    def _device(self) -> str:
        kind = self.rng.choice(("/dev/full", "/dev/tty", "/dev/stdin", "terminal"))
        if kind != "terminal":
            return kind
        ours, theirs = pty.openpty()
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
        self.held += [("the terminal", ours), ("", theirs)]
        return os.ttyname(theirs)

    # Attacks on names.

    def obstruct(self, item: Path, name: str = "", kind: str = "") -> None:
        """Puts an obstacle where a command reads, writes, replaces or removes."""
        rng, steps, given = self.rng, _steps(item), bool(kind)
        name = name or rng.choice(TOUCHED.get(self.task, READ) if rng.random() < 0.75 else READ)
        path = item / name.replace("N", steps[-1].name if steps else "8") if item.is_dir() else item
        if not given and item != path and (rng.random() < 0.1 or (self.kind == "images" and "/" not in name)):
            path = rng.choice(_below(item))
        if not given and rng.random() < 0.25:
            path = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if (self.folder / "place").resolve() not in (path.parent / "x").resolve().parents:
            return  # below a link of an earlier attack
        original: Path | None = None
        if os.path.lexists(path):
            self.moved += 1
            original = path.rename(self.outside / f"moved{self.moved}")
        regular = original and stat.S_ISREG(original.lstat().st_mode)
        kinds = {
            "a link to its original": lambda: path.symlink_to(original or self.victim),
            "a relative link": lambda: path.symlink_to(os.path.relpath(original or self.victim, path.parent)),
            "a link to a file": lambda: path.symlink_to(self.victim),
            "a link to a folder": lambda: path.symlink_to(rng.choice((self.outside, self.outside / "photos"))),
            "a hard link": lambda: os.link(original if original and regular else self.victim, path),
            "a pipe": lambda: os.mkfifo(path),
            "a pipe with a writer": lambda: self._hold(path, ""),
            "a link to a pipe": lambda: path.symlink_to(self.outside / "pipe"),
            "a socket": lambda: os.mknod(path, stat.S_IFSOCK | 0o600),
            "a link to a device": lambda: path.symlink_to(self._device()),
            "a folder": lambda: shutil.copytree(self.base / "images", path),
            "a file": lambda: path.write_bytes(rng.choice((b"", b"{}", b"\xff" * 99))),
            "a dangling link": lambda: path.symlink_to(self.outside / "new"),
            "a link to itself": lambda: path.symlink_to(path),
            "a link to its parent": lambda: path.symlink_to("."),
        }
        kind = kind or rng.choice((*OBSTACLES, *_MORE))
        kinds[kind]()
        self.words.append(f"{path.relative_to(self.folder / 'place')} is {kind}")

    def set_aside(self, run: Path) -> None:
        """Damages the latest checkpoint, which `train` then moves to `damaged`, and obstructs that."""
        if steps := self._break_latest(run):
            self.obstruct(run, self.rng.choice(("damaged", f"damaged/{steps[-1].name}")))

    def _break_latest(self, run: Path) -> list[Path]:
        if steps := _steps(run):
            _fresh(steps[-1] / "manifest.json").write_text("{}")
            self.words.append(f"checkpoint {steps[-1].name} is damaged")
        return steps

    def rename(self, run: Path) -> None:
        """Gives a checkpoint or a file an odd name."""
        path = self.rng.choice([*_steps(run) * 4, *_below(run)])
        name = self.rng.choice(("-1", "٣", "0012", "1e9", "9" * 40, "removed-..", "replaced-12", "replaced-..", "x",
                                "replaced-x", "12.orbax-checkpoint-tmp", *_ODD)).replace("/", "_")  # fmt: skip
        with contextlib.suppress(OSError):
            path.rename(path.with_name(name))
            self.words.append(f"{path.name} is named {name!r}")

    def fill(self, folder: Path) -> None:
        """Puts pipes, devices and links in a class folder."""
        for i in range(self.rng.choice((1, 2, 5))):
            self.obstruct(folder, f"{self.rng.choice('ab')}/{i}.png")
        target = self.rng.choice(
            (str(self.outside), "/dev", "/etc", "/dev/fd", "..", str(self.folder), "/proc/self/cwd")
        )
        _fresh(folder / "a" / "more").symlink_to(target)
        self.words.append(f"a/more is a link to {target}")

    def link_folders(self, folder: Path) -> None:
        """Eleven folders that link to each other have 11! paths."""
        below = [folder / self.rng.choice("ab") / f"d{i}" for i in range(11)]
        for one in below:
            one.mkdir(parents=True, exist_ok=True)
            for other in below:
                with contextlib.suppress(FileExistsError):
                    (one / other.name).symlink_to(os.path.relpath(other, one))
        self.words.append("11 folders link to each other")

    def name_oddly(self, folder: Path) -> None:
        """Images and class folders with odd names."""
        for name in self.rng.sample([name for name in _ODD if "/" not in name and name not in (".", "..")], 6):
            with contextlib.suppress(OSError):
                shutil.copyfile(self.base / "images/a/0.png", folder / "a" / f"{name}.png")
                shutil.copytree(self.base / "images/a", folder / name)
        self.words.append("odd names")

    # Attacks on contents.

    def hostile(self, old: object) -> Any:
        """A value that names code, a place or nonsense, perhaps inside of a spec."""
        rng = self.rng
        call = rng.choice((f"os:system('touch {self.mark}')", "stranger:run", "stranger:run()", "os:abort",
                           f"subprocess:call(('touch', '{self.mark}'))", "this:c",
                           f"builtins:open('{self.mark}', 'w')"))  # fmt: skip
        place, odd = rng.choice(self.places), rng.choice(_ODD).replace("MARK", str(self.mark))
        where = rng.choice((place, place, odd))
        inner = rng.choice((f"norm={call!r}", f"activation={call!r}", f"widths={call!r}", f"norm={call!r}"))
        source = rng.choice((f"folder({where!r})", f"arrays({where!r})", f"table({where!r})", "tfds('mnist')",
                             f"tfds('a:b', data_dir={where!r})", f"tfds('mnist', data_dir={where!r})"))  # fmt: skip
        return rng.choice((
            call, call, f"{old}|{call}", f"mlp({inner})", f"resnet_cifar({inner})", f"sgd(momentum={call!r})", where,
            f"distill({where!r})", source, source, f"{source}/test", f"{call}/test", [call], {call: call}, odd, -1,
            None, True, 1e308, float("nan"), [[]] * 3, f"chain({call})", f"warmup({call!r})", f"test|{call}",
        ))  # fmt: skip

    def name_code(self, run: Path) -> None:
        """Has one key of config.json name code or a place, in a form that the key takes."""
        if not _is_regular(file := run / "config.json"):
            return
        place = self.rng.choice((*self.places[:4], str(self.outside / "pipe")))
        call = f"os:system('touch {self.mark}')"
        if self.rng.random() < 0.3:
            call = self.rng.choice(("stranger:run", f"subprocess:call(('touch', '{self.mark}'))", "stranger:Net()"))
        source = self.rng.choice((call, f"arrays({place!r})", f"folder({place!r})", f"table({place!r})", "tfds('a:b')",
                                  "tfds('mnist')", f"tfds('mnist', data_dir={place!r})"))  # fmt: skip
        after, inside = f"decode(1)|{call}", f"activation={call!r}"
        forms: dict[str, tuple[Any, ...]] = dict.fromkeys(
            ("data.sampling", "mix", "tta", "augment", "loss", "schedule", "gradient", "writers", "metrics"), (call,)
        ) | {
            "model": (call, f"mlp({inside})", f"resnet_cifar({inside})", f"resnet(norm={call!r})"),
            "data.source": (source,), "data.eval": ({"test": f"{source}/test"},),
            "data.extra": ({"more": f"{source}/train"},), "preprocess": (after,), "preprocess_eval": (after,),
            "optimizer": (call, f"sgd(momentum={call!r})"), "method": (call, f"distill({place!r})"),
            "init_from": (place,),
        }  # fmt: skip
        key = self.rng.choice(tuple(forms))
        value = self.rng.choice(forms[key])
        with contextlib.suppress(ValueError, KeyError, TypeError):
            config = json.loads(file.read_text())
            container = config["data"] if key.startswith("data.") else config
            container[key.removeprefix("data.")] = value
            _fresh(file).write_text(json.dumps(config))
            self.words.append(f"{key} = {value!r}")
            self.seal(run)

    def edit(self, run: Path) -> None:
        """Sets values of a JSON file to hostile ones; often its digests are made to match."""
        records = [path for path in _below(run) if path.suffix in (".json", ".jsonl") or path.name.endswith("METADATA")]
        own = [path for path in records if path.parent == run]
        configs = [path for path in records if path.name == "config.json"]
        if not (files := [path for path in (*records, *own * 3, *configs * 12) if _is_regular(path)]):
            return
        file = self.rng.choice(files)
        text = file.read_text(errors="replace")
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        with contextlib.suppress(ValueError, IndexError):
            row = self.rng.randrange(len(lines))
            leaves = list(_walk(value := json.loads(lines[row])))
            for container, key in self.rng.sample(leaves, min(len(leaves), self.rng.choice((1, 1, 3)))):
                container[key] = self.hostile(container[key])
                self.words.append(f"{file.relative_to(run)}: {key} = {container[key]!r:.200}")
            if self.rng.random() < 0.1 and isinstance(value, dict):
                value[str(self.hostile("x"))] = self.hostile("")
            lines[row] = json.dumps(value)
            _fresh(file).write_text("\n".join(lines) + "\n")
        if self.rng.random() < 0.8:
            self.seal(run)

    def seal(self, run: Path) -> None:
        """Makes the manifests of a run's checkpoints match their files."""
        for step in _steps(run):
            files = [path for path in _below(step) if _is_regular(path) and path.name != "manifest.json"]
            entries = {str(p.relative_to(step)): [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files}
            if _is_regular(step / "manifest.json"):
                _fresh(step / "manifest.json").write_text(json.dumps(entries))

    def damage(self, item: Path) -> None:
        """Flips bits of a file, cuts it short or empties it."""
        if not (files := [path for path in _below(item) if _is_regular(path)]):
            return
        file = self.rng.choice(files)
        content = bytearray(file.read_bytes()) or bytearray(1)
        for _ in range(self.rng.choice((1, 4, 40))):
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        _fresh(file).write_bytes(content[: self.rng.choice((0, 9, len(content) // 2, len(content), len(content)))])
        self.words.append(f"{file.relative_to(item.parent)} is damaged")
        if item.is_dir() and self.rng.random() < 0.5:
            self.seal(item)

    def list_elsewhere(self, run: Path) -> None:
        """Lists files elsewhere in the manifests."""
        for step in _steps(run):
            names = [self.rng.choice((*self.places, *_ODD, "../../../../outside/pipe")) for _ in range(3)]
            listed = {name: [9, zlib.crc32(b"precious\n")] for name in names}
            _fresh(step / "manifest.json").write_text(json.dumps(listed))
            self.words.append(f"the manifest of {step.name} lists {names}")

    def plant_modules(self, run: Path) -> None:
        """Modules that commands may look for; the run is the current directory."""
        for name in _MODULES:
            with contextlib.suppress(OSError):
                (run / f"{name}.py").write_text(f"open({str(self.mark)!r}, 'w')\n\n\ndef run(*a, **k):\n    pass\n")
        self.inside = True
        self.words.append("modules in the current directory")

    def plant_pickle(self, run: Path) -> None:
        self._pickle(
            run / self.rng.choice((*TOUCHED.get(self.task, ()), *_RECORDS)), self.rng.choice(("npz", "zip", ""))
        )

    def _pickle(self, path: Path, form: str) -> None:
        """Writes a pickle that runs code: a plain one, or in an .npz file or a file of PyTorch, new or "legacy"."""
        content, buffer = pickle.dumps(Harm(self.mark), self.rng.choice((0, 2, 4))), io.BytesIO()
        if form == "npz":
            names = ("x_train", "y_train", "x_test", "names", "labels", "probabilities", "ids", "class_names")
            np.savez(buffer, **dict.fromkeys(names, np.array([Harm(self.mark)] * 4, object)))  # type: ignore[arg-type]
        elif form == "zip":
            with zipfile.ZipFile(buffer, "w") as packed:
                for name, data in (("data.pkl", content), ("version", b"3\n"), ("data/0", bytes(64))):
                    packed.writestr(f"archive/{name}", data)
        elif form == "legacy":
            buffer.write(b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})))
            buffer.write(content + pickle.dumps([], 2))
        with contextlib.suppress(OSError):
            _fresh(path).write_bytes(buffer.getvalue() or content)
            self.words.append(f"{path.name} is a pickle of code {form}")

    def craft(self, file: Path) -> None:
        """Writes a weights file, an archive of arrays or a table by hand."""
        rng, mark = self.rng, str(self.mark)
        if file.suffix == ".csv":
            rows = [str(rng.choice((*self.places, *_ODD, "a/0.png", "../data.npz"))) for _ in range(9)]
            text = "file,label\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows))
            _fresh(file).write_bytes(text.encode(errors="surrogateescape"))
            self.words.append(f"a table of {rows}")
        elif file.suffix == ".safetensors" and rng.random() < 0.6:
            entry = {"dtype": rng.choice(("F32", "O", self.hostile(""))), "shape": rng.choice(([4], [-1], [2**40], 9)),
                     "data_offsets": rng.choice(([0, 64], [-9, 9], [0, 2**62], None))}  # fmt: skip
            header = json.dumps(
                {str(rng.choice((*_ODD, self.hostile("")))): entry, "__metadata__": {"a": self.hostile("")}}
            )
            length = rng.choice((len(header.encode()), len(header.encode()), 2**63, 2**40, 0))
            _fresh(file).write_bytes(length.to_bytes(8, "little") + header.encode() + bytes(64))
            self.words.append(f"a header of {length} bytes: {header:.200}")
        elif file.suffix == ".npz" and rng.random() < 0.5:
            header = f"{{'descr': __import__('os').system('touch {mark}'), 'fortran_order': False, 'shape': (1,)}}"
            array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
            with zipfile.ZipFile(_fresh(file), "w") as packed:
                for name in ("x_train.npy", "../../outside/victim.npy", mark, "y_train.npy"):
                    packed.writestr(name, array)
            self.words.append("an archive with code in its headers")
        else:
            self._pickle(file, "npz" if file.suffix == ".npz" else rng.choice(("", "zip", "legacy", "npz")))

    def _pack(self, run: Path) -> None:
        """Packs the bundle, perhaps with a member that no bundle has."""
        with zipfile.ZipFile(self.item, "w") as packed:
            for name in (*_RECORDS[:4], "result.json"):
                packed.write(run / name, name)
            if self.rng.random() < 0.4:
                name = self.rng.choice(("../x", "../../outside/victim", str(self.mark), "stranger.py", "tb/",
                                        "requirements.txt", "C:\\x", *_ODD[:8]))  # fmt: skip
                member = zipfile.ZipInfo(name)
                member.external_attr = self.rng.choice((0o644, stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644)) << 16
                packed.writestr(member, str(self.victim))
                self.words.append(f"a member {name!r}")
        if self.rng.random() < 0.2:
            self.rng.choice((self.damage, self.obstruct))(self.item)


def _below(item: Path) -> list[Path]:
    """What lies below a folder, without following links; [item] if there is nothing."""
    found = [Path(parent, name) for parent, folders, files in os.walk(item) for name in (*folders, *files)]
    return sorted(found, key=os.fsencode) or [item]


def _is_regular(path: Path) -> bool:
    """Whether it is a file, no link and no hard link, below no link: a copy, not its original outside."""
    with contextlib.suppress(OSError):
        about = path.lstat()
        return stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and path.parent.resolve() == path.parent
    return False


def _steps(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()
             ] if folder.is_dir() and not folder.is_symlink() else []  # fmt: skip
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=lambda path: int(path.name))


def _walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """The entries of a JSON value, as pairs of a container and a key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _walk(inner)


def _fresh(path: Path) -> Path:
    """Removes the name, so that writing to the path follows no link."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    return path
