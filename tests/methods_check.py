"""What each shipped method and gradient function, and a user's own method, must keep of the promises of a run."""

import contextlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from cases import noise, rewind
from flax import linen as nn
from PIL import Image

import launch
from imgclf_jax.methods import Loss, Method
from imgclf_jax.models.classifier import Classifier

STEPS, SAVED = 11, 4
BASE = {
    "data.source": "digits", "preprocess": "decode(1)|resize(12)", "augment": "pad_crop(1)|normalize",
    "model": "launched:Smooth()", "batch_size": "16", "tensorboard": "False", "schedule": "cosine(1e-2)",
    "total": f"{STEPS} steps", "checkpoint_every": f"{SAVED} steps", "checkpoint.keep": str(STEPS),
    "log_every": "1 steps", "eval_every": "5 steps", "data.eval.test": "test[:50]",
}  # fmt: skip
UNLABELED = {"data.train": "train[:400]", "data.extra.unlabeled": "train[400:]|batch_size(32)"}
SPECS: dict[str, dict[str, str]] = {
    "supervised": {},
    "clip_per_example": {"gradient": "clip_per_example", "model": "mlp(widths=(8,), dropout=0.1)"},
    "sam": {"gradient": "sam(0.05)"},
    "asam": {"gradient": "asam(0.5)"},
    "pgd": {"gradient": "pgd(eps='8/255', steps=2, step_size='4/255')"},
    "pgd|sam": {"gradient": "pgd(eps='8/255', steps=2, step_size='4/255')|sam(0.05)"},
    "distill": {"method": "distill('{teacher}')"},
    "simclr": {"method": "simclr(width=16)"},
    "supcon": {"method": "supcon(width=16)"},
    "fixmatch": {"method": "fixmatch(threshold=0.2)", **UNLABELED},
    "mean_teacher": {"method": "mean_teacher()", **UNLABELED},
    "lora": {"method": "lora(rank=2)"},
    "own": {"method": "methods_check:prototypes", **UNLABELED},
}
WAYS: tuple[dict[str, str], ...] = (
    {},
    {"log_every": "5 steps", "eval_every": "7 steps"},
    {"log_every": "", "eval_every": "", "data.placement": "device"},
)
TOOLS = (
    "evaluate", "predict {image}", "features --output={out}.npz", "probe --k=1 --draws=2",
    "explain {image} --output={out}-explained", "report", "export {out}.stablehlo", "export {out}.safetensors",
    "compare {work} {work}", "show-batch --output={out}.png",
)  # fmt: skip


class Prototypes(Classifier):
    """A Classifier with a projector and, as its state, a running mean of the projections of each class."""

    def setup(self) -> None:
        super().setup()
        self.projector = nn.Dense(6)
        self.means = self.variable("prototypes", "means", jnp.zeros, (self.num_classes, 6))

    def init_more(self, features: jax.Array) -> None:
        self.project(features)

    def project(self, features: jax.Array) -> jax.Array:
        """f32[b, 6], from features [b, d] in the precision of the run."""
        out: jax.Array = self.projector(features.astype(jnp.float32))
        return out


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
    """The checks of one spec, in its own folder, on small runs with batch statistics."""

    def __init__(self, name: str, folder: Path, teacher: Path):
        self.folder = folder / name.replace("|", "_").replace(" ", "_")
        self.keys = {**BASE, **{k: v.format(teacher=teacher) for k, v in SPECS[name].items()}}

    def flags(self, **more: str) -> tuple[str, ...]:
        return tuple(f"--config.{key}={value}" for key, value in {**self.keys, **more}.items())

    def train(self, workdir: Path, **more: str) -> str:
        """The digest of a run's parameters, trained or resumed."""
        status, said = run("train", f"--workdir={workdir}", *self.flags(**more))
        assert status == 0, said
        return str(json.loads((workdir / "result.json").read_text())["params_sha256"])

    def loss(self, name: str) -> float:
        """The mean training loss of the last three logged steps."""
        return float(np.mean(list(launched.records(self.folder / name, "train/loss").values())[-3:]))

    def ways(self, **more: str) -> None:
        """Cadences, placement, and a resume from the middle: one digest."""
        found = [self.train(self.folder / f"way{i}", **{**way, **more}) for i, way in enumerate(WAYS)]
        resumed = Path(shutil.copytree(self.folder / "way0", self.folder / "resumed"))
        rewind(resumed, SAVED)
        assert {*found, self.train(resumed, **{**WAYS[1], **more})} == {found[0]}

    def killed(self) -> None:
        """Three SIGKILLs at random moments, resumed each time: one digest, the same records."""
        more = {"total": "300 steps", "checkpoint_every": "20 steps", "log_every": "5 steps", "eval_every": "100 steps"}
        flags = self.flags(**more, **{"checkpoint.keep": "2"})
        launched.finish(self.folder / "alone", flags)
        launched.kill_repeatedly(self.folder / "killed", flags, 3, random.Random(str(self.folder.name)))
        assert launched.outcome(self.folder / "killed") == launched.outcome(self.folder / "alone")

    def seeds(self) -> None:
        """Three seeds in one program: the mean of the losses of three single runs."""
        self.train(self.folder / "seeds", num_seeds="3")
        for seed in range(3):
            self.train(self.folder / f"seed{seed}", seed=str(seed))
        assert self.loss("seeds") == pytest.approx(np.mean([self.loss(f"seed{i}") for i in range(3)]), rel=1e-4)

    def devices(self) -> None:
        """Eight devices, `fsdp`, and two processes of two devices: the loss of one device."""
        self.train(self.folder / "1", **WAYS[0])
        for name, processes, count, more in (("8", 1, 8, {}), ("fsdp", 1, 8, {"mesh": "fsdp=-1"}), ("2x2", 2, 2, {})):
            launched.finish(self.folder / name, self.flags(**more), processes, count)
            assert self.loss(name) == pytest.approx(self.loss("1"), rel=1e-4), name

    def reproduce(self) -> None:
        self.train(self.folder / "run")
        status, said = run("reproduce", str(self.folder / "run"), "--trust")
        assert status == 0, said
        assert "bit for bit" in said

    def tools(self) -> dict[str, int]:
        """Runs each command after training; gives its status, which is 1 with a sentence where it refuses."""
        workdir, image, statuses = self.folder / "run", self.folder / "new.png", {}
        self.train(workdir)
        Image.fromarray(noise(12, 12)).save(image)
        for tool in TOOLS:
            words = tool.format(image=image, out=self.folder / "out", work=workdir).split()
            status, said = run(*words, *([] if words[0] == "compare" else [f"--workdir={workdir}", "--trust"]))
            assert status in (0, 1), said
            assert "Traceback" not in said
            statuses[tool] = status
        return statuses


def run(*words: str) -> tuple[int, str]:
    """(exit status, output) of a command, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return launch.main(list(words)), out.getvalue()
