"""Holds each shipped method and gradient function, and a user's own method, to what this project promises of a run.

    uv run python tests/methods_check.py
    uv run python tests/methods_check.py --only sam own --checks ways tools

The checks, on small runs with batch statistics:
    ways       cadences, chunk sizes, placement, and a resume from the middle: one digest
    killed     three SIGKILLs at random moments, resumed each time: one digest, the same records
    seeds      three seeds in one program: the mean of the losses of three single runs, to 1e-4
    accumulate two microbatches: resumed, one digest
    devices    eight devices, `fsdp`, and two processes of two devices: the loss of one device, to 1e-4
    reproduce  "The same, bit for bit"
    tools      each command after training: its status, and the sentence where that is not 0
    chips      `dryrun`; needs the compilers: `uv run --extra tpu`, `--extra cuda-compiler`, and `--chips=KIND`

Prints a line for each check; exit status 1 if one fails. A command that refuses in one sentence has not failed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digests
import jax
import jax.numpy as jnp
import numpy as np
import processes_check
import resume_check
from flax import linen as nn
from PIL import Image
from prototypes import Prototypes

import launch
from imgclf_jax.methods import Loss, Method

ROOT = Path(__file__).parent.parent
STEPS, SAVED = 11, 4
BASE = {
    "data.source": "digits", "preprocess": "decode(1)|resize(12)", "augment": "pad_crop(1)|normalize",
    "model": "smooth_net:Smooth()", "batch_size": "16", "tensorboard": "False", "schedule": "cosine(1e-2)",
    "total": f"{STEPS} steps", "checkpoint_every": f"{SAVED} steps", "checkpoint.keep": str(STEPS),
    "log_every": "1 steps", "eval_every": "5 steps", "data.eval.test": "test[:50]",
}  # fmt: skip
UNLABELED = {"data.train": "train[:400]", "data.extra.unlabeled": "train[400:]|batch_size(32)"}
SPECS: dict[str, dict[str, str]] = {
    "supervised": {},
    "sam": {"gradient": "sam(0.05)"},
    "asam": {"gradient": "asam(0.5)"},
    "pgd": {"gradient": "pgd(eps='8/255', steps=2, step_size='4/255')"},
    "pgd|sam": {"gradient": "pgd(eps='8/255', steps=2, step_size='4/255')|sam(0.05)"},
    "distill": {"method": "distill('{teacher}')"},
    "distill features": {"method": "distill('{teacher}', features=0.01, width=64)"},
    "simclr": {"method": "simclr(width=16)"},
    "supcon": {"method": "supcon(width=16)"},
    "fixmatch": {"method": "fixmatch(threshold=0.2)", **UNLABELED},
    "mean_teacher": {"method": "mean_teacher()", **UNLABELED},
    "lora": {"method": "lora(rank=2)"},
    "own": {"method": "methods_check:prototypes", **UNLABELED},
}
WAYS: tuple[dict[str, str], ...] = (
    {"steps_per_call": "1"},
    {"log_every": "5 steps", "eval_every": "7 steps", "steps_per_call": "3"},
    {"log_every": "", "eval_every": "", "data.placement": "device"},
)
TOOLS = (
    "evaluate", "predict {image}", "features --output={out}.npz", "probe --k=1 --draws=2",
    "explain {image} --output={out}-explained", "report", "export {out}.stablehlo", "export {out}.safetensors",
    "compare {work} {work}", "show-batch --output={out}.png",
)  # fmt: skip


def prototypes(problem: Any, weight: float = 0.1) -> Method:
    """A user's method that uses all a method may: state, two streams, inputs, metrics, an evaluation, fixed arrays.

    Labeled images learn their class and lie near its prototype, in a noisy view; unlabeled ones near any prototype.
    """

    def inputs(key: jax.Array, batch: Any, augment: Any) -> Any:
        assert {"image", "label", "id", "epoch", "step", "unlabeled"} <= batch.keys()
        first, second, noise = jax.random.split(key, 3)
        noisy = augment(second, batch["image"]) + 0.1 * jax.random.normal(noise, batch["image"].shape)
        return {**batch, "image": augment(first, batch["image"]), "noisy": noisy}

    def loss(model: Any, batch: Any, fixed: Any) -> Loss:
        logits = model.head(model.features(batch["image"], train=True))
        means, projected = model.means.value, model.project(model.features(batch["noisy"], train=True))
        own = jax.nn.one_hot(batch["label"], problem.classes)
        counts = own.sum(0)[:, None]
        seen = jnp.where(counts > 0, own.T @ projected / jnp.maximum(counts, 1), means)
        model.means.value = jax.lax.stop_gradient(0.9 * means + 0.1 * seen)
        distance = jnp.sum((projected - means[batch["label"]]) ** 2, -1)
        others = model.project(model.features(batch["unlabeled"]["image"], train=True))
        nearest = jnp.mean(jnp.min(jnp.sum((others[:, None] - means) ** 2, -1), -1))
        values = problem.supervised(logits, batch) + weight * (distance + nearest)
        return Loss(values, logits, {"nearest": nearest, "distance": distance, "fixed": jnp.mean(fixed["offset"])})

    def model(backbone: nn.Module, problem: Any) -> nn.Module:
        return Prototypes(backbone, problem.classes, head_init=problem.head_init)

    def evaluate(model: Any, batch: Any, fixed: Any) -> dict[str, jax.Array]:
        projected = model.project(model.features(batch["image"]))
        return {"spread": jnp.sum((projected - model.means.value[batch["label"]]) ** 2, -1) + fixed["offset"][0]}

    return Method(loss, inputs, model, evaluate, fixed=lambda: {"offset": np.arange(3, dtype=np.float32)})


class Check:
    """One spec in its own folder; each method returns (passed, observation)."""

    def __init__(self, name: str, folder: Path, teacher: Path):
        self.folder = folder / name.replace("|", "_").replace(" ", "_")
        self.keys = {**BASE, **{k: v.format(teacher=teacher) for k, v in SPECS[name].items()}}
        self.whole = self.folder / "whole"

    def flags(self, **more: str) -> tuple[str, ...]:
        return tuple(f"--config.{key}={value}" for key, value in {**self.keys, **more}.items())

    def train(self, workdir: Path, **more: str) -> str:
        """The digest of a run's parameters, trained or resumed."""
        status, said = run("train", f"--workdir={workdir}", *self.flags(**more))
        assert status == 0, said
        return str(json.loads((workdir / "result.json").read_text())["params_sha256"])

    def loss(self, workdir: Path) -> float:
        """The mean training loss of the last three logged steps."""
        return float(np.mean(list(processes_check.records(workdir, "train/loss").values())[-3:]))

    def ways(self, **more: str) -> tuple[bool, str]:
        found = {self.train(self.folder / f"way{i}{len(more)}", **way, **more) for i, way in enumerate(WAYS)}
        resumed = self.folder / f"resumed{len(more)}"
        digests.copy_until(self.folder / f"way0{len(more)}", resumed, SAVED)
        found.add(self.train(resumed, **WAYS[1], **more))
        return len(found) == 1, f"{len(WAYS)} ways and a resume: {', '.join(sorted(x[:8] for x in found))}"

    def accumulate(self) -> tuple[bool, str]:
        return self.ways(accumulate="2")

    def killed(self) -> tuple[bool, str]:
        more = {"total": "300 steps", "checkpoint_every": "20 steps", "log_every": "5 steps", "eval_every": "100 steps"}
        flags = self.flags(**more, **{"checkpoint.keep": "2"})
        resume_check.finish(self.folder / "alone", flags)
        with contextlib.redirect_stdout(io.StringIO()):
            found = resume_check.kill_repeatedly(self.folder / "killed", flags, 3, random.Random(str(self.folder.name)))
        whole, killed = (resume_check.outcome(self.folder / name) for name in ("alone", "killed"))
        return whole == killed, f"killed after the checkpoints {found}: {whole[0][:8]}, {killed[0][:8]}"

    def seeds(self) -> tuple[bool, str]:
        self.train(self.folder / "seeds", num_seeds="3")
        for seed in range(3):
            self.train(self.folder / f"seed{seed}", seed=str(seed))
        together, single = self.loss(self.folder / "seeds"), [self.loss(self.folder / f"seed{i}") for i in range(3)]
        return close(together, np.mean(single)), f"{together:.7f}, single runs {np.mean(single):.7f}"

    def devices(self) -> tuple[bool, str]:
        single = self.loss(self.folder / "way00") if (self.folder / "way00").exists() else None
        if single is None:
            self.train(self.folder / "way00", **WAYS[0])
            single = self.loss(self.folder / "way00")
        found = {}
        for name, processes, count, mesh in (("8", 1, 8, ""), ("fsdp", 1, 8, "fsdp=-1"), ("2x2", 2, 2, "")):
            more = {"mesh": mesh} if mesh else {}
            processes_check.run(self.folder / name, processes, count, self.flags(**more))
            found[name] = self.loss(self.folder / name)
        return all(close(x, single) for x in found.values()), f"one device {single:.7f}, " + ", ".join(
            f"{k} {v:.7f}" for k, v in found.items()
        )

    def reproduce(self) -> tuple[bool, str]:
        if not self.whole.exists():
            self.train(self.whole)
        status, said = run("reproduce", str(self.whole), "--trust")
        return status == 0 and "bit for bit" in said, said.strip().splitlines()[-1] if said.strip() else ""

    def tools(self) -> tuple[bool, str]:
        if not self.whole.exists():
            self.train(self.whole)
        image = self.folder / "new.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)).save(image)
        rows = []
        for tool in TOOLS:
            words = tool.format(image=image, out=self.folder / "out", work=self.whole).split()
            trust = ["--trust"] if words[0] not in ("compare",) else []
            work = [] if words[0] == "compare" else [f"--workdir={self.whole}"]
            status, said = run(*words, *work, *trust)
            lines = [line for line in said.strip().splitlines() if line.strip()]
            good = status == 0 or (status == 1 and "Traceback" not in said)
            rows.append((good, f"{tool.split()[0]} {status}" + (f": {lines[-1]}" if status else "")))
        rows.append(self.serve(image))
        return all(good for good, _ in rows), "\n        ".join(["", *(text for _, text in rows)])

    def serve(self, image: Path) -> tuple[bool, str]:
        words = [sys.executable, str(ROOT / "launch.py"), "serve", f"--workdir={self.whole}", "--port=0", "--trust"]
        log = self.folder / "serve.log"
        with open(log, "w") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, cwd=ROOT, env=environment())
        try:
            end = time.time() + 120
            while time.time() < end and process.poll() is None and "http://" not in log.read_text():
                time.sleep(0.2)
            if process.poll() is not None:
                said = log.read_text()
                last = said.strip().splitlines()[-1]
                return "Traceback" not in said, f"serve {process.returncode}: {last}"
            address = log.read_text().split("http://")[1].split()[0].rstrip(".,;/")
            request = urllib.request.Request(
                f"http://{address}/predict", image.read_bytes(), {"Content-Type": "image/png"}
            )
            answer = urllib.request.urlopen(request, timeout=60).read().decode()
            return "probability" in answer, f"serve answers {answer[:60]}"
        finally:
            process.terminate()
            process.wait(30)

    def chips(self, kind: str) -> tuple[bool, str]:
        # In a process of its own: what the compilers read has to be set before JAX is imported.
        words = (sys.executable, str(ROOT / "launch.py"), "dryrun", f"--chips={kind}", f"--workdir={self.folder}")
        flags = ("--config.matmul_precision=bfloat16", *self.flags(batch_size="64"))
        variables = {name: value for name, value in environment().items() if name != "JAX_PLATFORMS"}
        ran = subprocess.run((*words, *flags), cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        lines = [line for line in ran.stdout.splitlines() if "compiled in" in line]
        return ran.returncode == 0, " ".join(lines) if ran.returncode == 0 else (ran.stdout + ran.stderr).strip()[-300:]


def close(a: float, b: float) -> bool:
    """Whether two losses are equal up to the rounding of a few steps."""
    return bool(abs(a - b) <= 1e-4 * abs(b))


def run(*words: str) -> tuple[int, str]:
    """(exit status, output) of a command, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = launch.main([str(word) for word in words])
        except SystemExit as e:
            status = int(e.code or 0)
    return status, out.getvalue()


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}


def main() -> int:
    checks = ["ways", "killed", "seeds", "accumulate", "devices", "reproduce", "tools"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--checks", nargs="*", default=checks, choices=checks)
    parser.add_argument("--chips", default="", help="such as v5e:2x4: compile for these instead")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        # A model that ships: a teacher whose model is code of its own is refused.
        Check("supervised", Path(folder) / "of", teacher).train(teacher, model="resnet_cifar(8)")
        for name in args.only:
            check = Check(name, Path(folder), teacher)
            todo: list[tuple[str, Callable[[], tuple[bool, str]]]] = [(c, getattr(check, c)) for c in args.checks]
            if args.chips:
                todo = [(args.chips, lambda check=check: check.chips(args.chips))]
            for what, function in todo:
                began = time.perf_counter()
                try:
                    passed, seen = function()
                except (AssertionError, OSError, subprocess.SubprocessError) as e:
                    passed, seen = False, str(e)[-500:]
                failures += not passed
                seconds = time.perf_counter() - began
                print(f"{name:18}{what:12}{'ok' if passed else 'FAILED':8}{seconds:5.0f} s  {seen}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.modules["methods_check"] = sys.modules["__main__"]  # for the spec of `prototypes`
    sys.exit(main())
