"""Opens strangers' files with every command under a seeded plan of attacks, and lets hostile clients loose on `serve`.

    uv run python tests/attack.py --seconds 3600                # runs, sweeps, bundles, weights and data
    uv run python tests/attack.py --seconds 3600 --names        # each name in a run as a link, a pipe, …, in order
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
- broken: an attack itself failed

With `--serve` they are: slow, refused (for a polite client), memory, traceback, and an end that takes too long.
"""

import argparse
import atexit
import collections
import contextlib
import gc
import hashlib
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import random
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from attack_clients import attack_server
from attacked import OBSTACLES, READ, TOUCHED, Attacked
from PIL import Image

ROOT = Path(__file__).parent.parent
ASLEEP, CPU, MEMORY = 5.0, 45.0, 4 << 30  # seconds, seconds and bytes that make a fault
SHARED = ("--config.preprocess=decode(1)", "--config.augment=", "--config.model=mlp(widths=(32,))",
          "--config.schedule=constant(1e-2)", "--config.total=12 steps", "--config.batch_size=16",
          "--config.checkpoint_every=4 steps", "--config.eval_every=6 steps", "--config.log_every=4 steps",
          "--config.checkpoint.best=test/accuracy", "--config.checkpoint.keep=3")  # fmt: skip
TINY = ("--config.data.source=fake(64, (12, 12, 1), 4)", *SHARED)
USES = tuple((command, *words, "--workdir=ITEM") for command, *words in (
    ("evaluate",), ("evaluate", "--predictions=ITEM/predictions.csv"), ("evaluate", "--checkpoints=all"),
    ("predict", "IMAGES"), ("features", "--output=OUT/f.npz"), ("probe",),
    ("explain", "IMAGES/a/0.png", "--output=OUT/explained"), ("report",), ("show-batch",), ("export", "OUT/x.onnx"),
    ("export", "OUT/x.stablehlo"), ("export", "OUT/x.safetensors"), ("export", "OUT/x.savedmodel"),
    ("serve", "--port=0"), ("dryrun", *TINY, "--chips=cpu:1"),
))  # fmt: skip
TRAINS = (("train", *TINY, "--workdir=ITEM"), ("train", *TINY, "--workdir=ITEM", "--config.total=16 steps", "--extend",
          "--profile=13:15"))  # fmt: skip
WEIGHTS = tuple((*words, *TINY, "--config.init_from=ITEM") for words in (
    ("evaluate",), ("predict", "IMAGES"), ("train", "--workdir=OUT/new"), ("find-lr", "--steps=4"), ("probe",),
    ("export", "OUT/x.safetensors"), ("features", "--output=OUT/f.npz"), ("serve", "--port=0"), ("config",),
))  # fmt: skip
DATA = tuple((*words, "--config.data.source=DATA", *SHARED, "--config.data.eval.test=train") for words in (
    ("train", "--workdir=OUT/new"), ("show-batch", "--output=OUT/b.png"), ("find-lr", "--steps=4"),
    ("sweep", "--workdir=OUT/sweep", "--sweep=seed=0..1", "--print"), ("dryrun", "--chips=cpu:1"),
))  # fmt: skip
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "run": (*USES, *TRAINS, *WEIGHTS, ("compare", "ITEM"), ("compare", "--test", "--html=OUT/c.html", "ITEM"),
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
               "--config.data.eval.new=DATA/train")),
    "data.npz": DATA, "labels.csv": DATA,
}  # fmt: skip
# For --names: a kind, a command, a name in the copy, and what is there instead.
CASES = [
    (kind, command, name, obstacle)
    for kind, command in (("cut", TRAINS[0]), *(("run", command) for command in (TRAINS[1], *USES)),
                          *(("run", command) for command in COMMANDS["run"] if command[0] in ("compare", "status")),
                          ("sweep", COMMANDS["sweep"][-1]))
    if command[0] in TOUCHED or command == USES[0]
    for touched in dict.fromkeys(TOUCHED.get(command[0], READ) + (READ if command == USES[0] else ()))
    for name in ((touched, re.sub(r"([^/]+)$", r".\1.tmp", touched)) if "." in touched else (touched,))
    for obstacle in OBSTACLES
]  # fmt: skip
FOREIGN = {"posix", "os", "nt", "subprocess", "shutil", "runpy", "sys", "builtins", "stranger"}  # modules in a pickle
PROGRAMS = {"git", "fc-match", "nvidia-smi"}  # that the package starts
OBSERVED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "os.system", "os.exec",
            "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class")  # fmt: skip


class Round:
    """One attacked copy, and one command that opens it: `seed` decides both; it is a number of CASES if `names`."""

    def __init__(self, seed: int, names: bool, base: Path, folder: Path, trap: socket.socket):
        rng, case = random.Random(seed), None
        if names:
            kind, self.command, *case = CASES[seed]
        else:
            kind = rng.choice(("run",) * 8 + ("images",) * 2 + tuple(COMMANDS))
            self.command = rng.choice(TRAINS if kind == "run" and rng.random() < 0.25 else COMMANDS[kind])
        self.base, self.folder, self.trap, port = base, folder, trap, trap.getsockname()[1]
        task = self.command[0] if "ITEM" in self.command or "--workdir=ITEM" in self.command else ""
        self.address = f"127.0.0.1:{port}"
        self.copy = Attacked(rng, kind, task, base, folder, port, case)
        if self.copy.inside and kind == "run" and rng.random() < 0.5:  # these look for packages that may be missing
            self.command = rng.choice([use for use in USES if "OUT/x.onnx" in use])

    def argv(self) -> list[str]:
        item, out = str(self.copy.item), self.copy.item / "out" if self.copy.inside else self.folder / "out"
        data = {"data.npz": "arrays", "labels.csv": "table"}.get(self.copy.kind, "folder") + f"({item!r})"
        words = {"'ITEM'": repr(item), "ITEM": item, "IMAGES": str(self.base / "images"), "RUN": str(self.base / "run"),
                 "OUT": str(out), "DATA": data}  # fmt: skip
        return [re.sub("|".join(words), lambda found: words[found[0]], word) for word in self.command]

    def environment(self) -> dict[str, str]:
        """All network addresses lead to the trap, and the home directory is outside of what commands may touch."""
        proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST",
                   "TENSORSTORE_GCS_HTTP_URL")  # fmt: skip
        return {**dict.fromkeys(proxies, f"http://{self.address}"), "GCE_METADATA_HOST": self.address,
                "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "HOME": str(self.folder / "outside" / "home"),
                "TMPDIR": str(self.folder / "tmp"), "KERAS_HOME": str(self.folder / "tmp")}  # fmt: skip

    def snapshot(self) -> dict[str, tuple[Any, ...]]:
        """Types, modes, times and contents of all that is in the folder, except the copy, the outputs and `tmp`."""
        free, found = {self.copy.item, self.folder / "out", self.folder / "tmp"}, {}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(parent, name) not in free]
            for path in (Path(parent, name) for name in (*folders, *files)):
                if path not in free:
                    about = path.lstat()
                    content = os.readlink(path) if path.is_symlink() else ""
                    if stat.S_ISREG(about.st_mode):
                        content = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[str(path.relative_to(self.folder))] = (about.st_mode, about.st_mtime_ns, content)
        return found

    def play(self, root: Path) -> list[tuple[str, str]]:
        """Runs the command; the faults as pairs of a kind and a description."""
        before, log, events = self.snapshot(), self.folder / "tmp" / "log", self.folder / "tmp" / "events"
        events.touch()
        if not (pid := os.fork()):
            cwd = self.copy.item if self.copy.inside else self.folder / "out"
            run_command(self.argv(), cwd, self.environment(), log, events, root)
        fault, status = watch(pid, log if self.command[0] == "serve" else None)
        text, after = log.read_text(errors="replace"), self.snapshot()
        faults = [(fault, f"status {status}")] if fault else []
        if not fault and os.WIFSIGNALED(status):
            faults.append(("crash", f"signal {os.WTERMSIG(status)}"))
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        inner = [a for a, b in itertools.pairwise([*changed, ""]) if not b.startswith(f"{a}/")]  # not their folders
        for name in inner[:3]:
            what = "appeared" if name not in before else "is gone" if name not in after else "has changed"
            more = f", and {len(inner) - 3} more" if inner[3:] else ""
            faults.append(("code" if name == "outside/mark" else "outside", f"{name} {what}{more}"))
        for name, held in self.copy.held:
            with contextlib.suppress(OSError):  # BlockingIOError: nothing was written
                if name and (read := os.read(held, 1000)):
                    faults.append(("outside", f"{name} got {read!r:.60}"))
            os.close(held)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.trap.accept()[0].close()
                faults.append(("network", "a connection"))
        for line in sorted(set(events.read_text().splitlines())):
            kind, _, what = line.partition(" ")
            faults.append((kind, what))
        if "Traceback (most recent call last)" in text:
            faults.append(("traceback", text.strip().splitlines()[-1][:200]))
        return list(dict.fromkeys(faults))


def observe(events: Path) -> None:
    """Writes a line to `events` for each name that is looked up, connection, program and foreign name in a pickle."""
    file = os.open(events, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: Sequence[Any]) -> None:
        if event not in OBSERVED:
            return
        first, words = arguments[0], str(arguments[:2])
        harmless = {
            "pickle.find_class": first not in FOREIGN,
            "socket.getaddrinfo": first in ("127.0.0.1", "localhost"),
            "socket.connect": not isinstance(arguments[-1], tuple),  # to a socket on the disk
        }.get(event, Path(str(first)).name in PROGRAMS or "launch.py', 'train'" in words)
        if not harmless:
            kind = "network" if event.startswith("socket") else "code"
            os.write(file, f"{kind} {event} {words:.150}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def run_command(
    argv: list[str], cwd: Path, environment: dict[str, str], log: Path, events: Path, root: Path
) -> NoReturn:
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

    status: Any = 1
    try:
        run_and_exit("launch.py", [sys.executable, sys.argv[0]])
    except SystemExit as end:
        status = end.code
    finally:  # what the interpreter does at its end, but for freeing memory; no caller's `finally` runs in the fork
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def usage(pid: int) -> tuple[float, int, bool]:
    """CPU seconds and bytes of a process and its children, and whether a thread computes or waits for a disk."""
    todo, seconds, size, busy = [pid], 0, 0, False
    while todo:
        folder = Path("/proc", str(todo.pop()))
        with contextlib.suppress(OSError):
            values = (folder / "stat").read_text().rpartition(")")[2].split()
            seconds, size = seconds + sum(map(int, values[11:15])), size + int(values[21])
            for task in (folder / "task").iterdir():
                busy |= (task / "stat").read_text().rpartition(") ")[2][0] in "RD"
                todo += map(int, (task / "children").read_text().split())
    return seconds / os.sysconf("SC_CLK_TCK"), size * os.sysconf("SC_PAGE_SIZE"), busy


def watch(pid: int, server_log: Path | None = None) -> tuple[str, int]:
    """Waits for a process until a fault, and asks a server to stop once it serves; the fault and the status."""
    fault, asked, seen, last = "", False, time.monotonic(), 0.0
    while not fault and not (done := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.1)
        seconds, size, busy = usage(pid)
        if busy or seconds > last + 0.1:
            seen, last = time.monotonic(), seconds
        fault = "hang" if time.monotonic() - seen > ASLEEP else "endless" if seconds > CPU or size > MEMORY else ""
        if server_log and server_log.exists() and not asked and "at http://" in server_log.read_text(errors="replace"):
            asked, seen = True, time.monotonic()
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # also what it has left behind
    return fault, (os.waitpid(pid, 0) if fault else done)[1]


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


def work(args: argparse.Namespace, first: int, until: float, base: Path, results: Any) -> None:
    """Plays every `jobs`-th round; puts (seed, command, attacks, faults) of each into `results`, at the end None."""
    os.nice(5)
    last = min(args.seed + (args.rounds or sys.maxsize), len(CASES) if args.names else sys.maxsize)
    try:
        with socket.create_server(("127.0.0.1", 0)) as trap:
            trap.setblocking(False)
            while time.monotonic() < until and first < last:
                folder = base.parent / f"round{first}"
                try:
                    one = Round(first, args.names, base, folder, trap)
                    words = [word for word in one.command if word not in TINY]
                    played = (f"{one.copy.kind}: {' '.join(words)}", one.copy.words, one.play(args.root))
                except Exception as e:  # of the attack's own; the next round goes on
                    played = ("an attack", [], [("broken", f"{type(e).__name__}: {e}")])
                results.put((first, *played))
                if not args.keep:
                    shutil.rmtree(folder, ignore_errors=True)
                first += args.jobs
    finally:
        results.put(None)


def attack(args: argparse.Namespace, folder: Path) -> int:
    """Plays rounds until the time is over; prints each fault; the number of faults."""
    base = folder / "base"
    base.mkdir()
    load(args.root, folder / "cache")
    prepare(base, args.root)
    context, began, jobs = multiprocessing.get_context("fork"), time.monotonic(), args.jobs
    results = context.SimpleQueue()
    print(f"prepared in {folder}", flush=True)
    workers = [
        context.Process(target=work, args=(args, args.seed + i, began + args.seconds, base, results))
        for i in range(jobs)
    ]
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
        count["broken"] += bool(worker.exitcode)
    kinds = ("outside", "code", "network", "hang", "endless", "crash", "traceback", "broken")
    print(f"{played.total()} rounds in {time.monotonic() - began:.0f} s: "
          f"{', '.join(f'{count[kind]} {kind}' for kind in kinds)}; {dict(sorted(played.items()))}")  # fmt: skip
    return count.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, default=0, help="how many at most")
    parser.add_argument("--names", action="store_true", help="each name that commands touch with each obstacle instead")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once")
    parser.add_argument("--root", type=Path, default=ROOT, help="the clone whose code is attacked")
    parser.add_argument("--keep", action="store_true", help="keep the files of all rounds")
    parser.add_argument("--serve", action="store_true", help="attack a server as its clients")
    args = parser.parse_args()
    folder, args.root = Path(tempfile.mkdtemp(prefix="attack")), args.root.resolve()
    if args.serve:
        return min(1, attack_server(args.seconds, args.seed, args.root, folder, TINY))
    return min(1, attack(args, folder))


if __name__ == "__main__":
    sys.exit(main())
