"""Mean teacher: the model agrees with the average of its own weights, on labeled and on unlabeled images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Batch, Loss, Method, Problem
from imgclf_jax.methods.fixmatch import STREAM, check_task, in_one_pass, unlabeled
from imgclf_jax.models.classifier import Classifier

_NONE = -1  # no step's


class Averaged(Classifier):
    """A Classifier and, as the state `teacher`, an exponential moving average of its parameters.

    The teacher has running statistics of its own, from its own passes. `updated` is the step it was last updated in.
    """

    def setup(self) -> None:
        super().setup()
        self.average: Any = self.variable("teacher", "average", dict)
        self.updated = self.variable("teacher", "updated", lambda: jnp.int32(_NONE))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        logits = super().__call__(images, train)
        if self.is_initializing():
            self.average.value = self.student
        return logits

    @property
    def student(self) -> dict[str, Any]:
        """The variables of the plain Classifier: parameters and, if it has any, running statistics."""
        return {
            collection: {name: value for name, value in variables.items() if name in ("backbone", "head")}
            for collection, variables in self.variables.items()
            if collection not in ("teacher", "losses", "metrics", "intermediates")
        }

    def update_teacher(self, step: jax.Array, decay: float) -> None:
        """Moves the average towards the parameters, once a step, of which `step` i32[] is the number.

        At step 0 the teacher becomes the student. Further microbatches of a step do not change it.
        """
        keep = jnp.minimum(1 - 1 / (step.astype(jnp.float32) + 1), decay)
        keep = jnp.where(self.updated.value == step, 1.0, keep)
        student, teacher = jax.lax.stop_gradient(self.student), self.average.value

        def moved(old: jax.Array, new: jax.Array) -> jax.Array:
            weight = keep.astype(old.dtype)
            return jnp.where(step == 0, new, weight * old + (1 - weight) * new)

        params = jax.tree.map(moved, teacher["params"], student["params"])
        self.average.value = {**teacher, "params": params}
        self.updated.value = step

    def teach(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The teacher's logits [b, num_classes], to which no gradient flows back; in training it keeps statistics."""
        backbone = self.backbone.clone(parent=None)
        plain = Classifier(backbone, self.num_classes, self.dtype, self.head_init, parent=None)
        teacher = self.average.value
        if not train:
            out: Any = plain.apply(teacher, images, train=False)
            return jax.lax.stop_gradient(out)
        rngs = {"dropout": self.make_rng("dropout"), "params": self.make_rng("params")}
        state = [collection for collection in teacher if collection != "params"]
        logits, changed = plain.apply(teacher, images, train=True, mutable=[*state], rngs=rngs)
        self.average.value = jax.lax.stop_gradient({**teacher, **changed})
        return jax.lax.stop_gradient(logits)


def mean_teacher(problem: Problem, decay: float = 0.999, weight: float = 100.0, ramp: str = "25%") -> Method:
    """supervised + weight(step) * consistency, of Tarvainen and Valpola 2017 (arXiv:1703.01780).

    The consistency is the squared distance between the softmax of student and teacher, the mean over classes and over
    all images: the labeled ones and those of `data.extra.unlabeled`, if the run has this stream. Student and teacher
    see different draws of the key `augment` and of dropout. The teacher is the average of the student's parameters with
    the decay min(1 - 1 / (step + 1), decay), updated once a step before it is used, as in the authors' code, and is the
    student itself at step 0. The weight rises to `weight` over the duration `ramp` as exp(-5 (1 - step / ramp)²). Its
    default is the authors' for CIFAR-10; with few labels less may be better.

    Evaluation, prediction and export use the student; evaluation also reports `teacher_accuracy`. To use averaged
    weights everywhere, set the key `ema`. The labels of the stream are not read. Raises UserError for numbers out of
    range, for a loss that is not of the softmax, and for a stream of images of another shape.
    """
    if not 0 <= decay < 1 or not 0 <= weight < float("inf"):
        raise UserError(f"method: mean_teacher has decay={decay}, weight={weight}; decay is 0 or more and below 1, "
                        "weight 0 or more")  # fmt: skip
    check_task("mean_teacher", problem)
    up = problem.steps(ramp)

    def inputs(key: jax.Array, batch: Batch, augment: Callable[..., jax.Array]) -> Batch:
        keys = jax.random.split(key, 4)
        out = {**batch, "image": augment(keys[0], batch["image"]), "second_view": augment(keys[1], batch["image"])}
        if STREAM in batch:
            stream = unlabeled("mean_teacher", batch)
            first, second = (augment(k, stream["image"], stream) for k in keys[2:])
            out[STREAM] = {"image": first, "second_view": second}
        return out

    def loss(model: Any, batch: Batch, fixed: Any) -> Loss:
        step = batch["step"][0]
        model.update_teacher(step, decay)
        streams = [batch, batch[STREAM]] if STREAM in batch else [batch]
        student = in_one_pass(lambda x: model(x, train=True), [stream["image"] for stream in streams])
        teacher = in_one_pass(lambda x: model.teach(x, train=True), [stream["second_view"] for stream in streams])
        consistency = jnp.mean(squared_distance(jnp.concatenate(student), jnp.concatenate(teacher)))
        scale = weight * ramp_up(step, up)
        return Loss(problem.supervised(student[0], batch) + scale * consistency, student[0],
                    {"consistency": consistency, "consistency_weight": scale})  # fmt: skip

    def evaluate(model: Any, batch: Batch, fixed: Any) -> Mapping[str, jax.Array]:
        wanted = batch["label"] if "label" in batch else jnp.argmax(batch["target"], -1)
        return {"teacher_accuracy": (jnp.argmax(model.teach(batch["image"]), -1) == wanted).astype(jnp.float32)}

    def model(backbone: nn.Module, problem: Problem) -> nn.Module:
        return Averaged(backbone, problem.classes, head_init=problem.head_init)

    return Method(loss, inputs=inputs, model=model, evaluate=evaluate)


def squared_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean over classes of the squared distance of the softmax of two logits [n, classes]: [n]."""
    return jnp.mean((jax.nn.softmax(student) - jax.nn.softmax(teacher)) ** 2, -1)


def ramp_up(step: jax.Array, steps: int) -> jax.Array:
    """exp(-5 (1 - step / steps)²) up to 1, f32[] (Laine and Aila 2016, arXiv:1610.02242)."""
    done = jnp.minimum(step.astype(jnp.float32) / steps, 1.0) if steps else jnp.float32(1)
    return jnp.exp(-5.0 * (1 - done) ** 2)
