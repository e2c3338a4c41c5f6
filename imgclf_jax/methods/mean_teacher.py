"""Mean teacher: consistency between the model and the moving average of its weights."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import rng
from imgclf_jax.core.typing import PyTree
from imgclf_jax.methods import Batch, Loss, Method, Problem
from imgclf_jax.methods.fixmatch import STREAM, check_link, forward_together
from imgclf_jax.models.classifier import Classifier

_NEVER = -1  # the step of the last update before the first one


class Averaged(Classifier):
    """A Classifier with a teacher, the exponential moving average of its parameters, in the collection `teacher`.

    The teacher begins with the student's running statistics and then has its own. `updated` is its last update's step.
    """

    def setup(self) -> None:
        super().setup()
        self.average: nn.Variable[dict[str, PyTree]] = self.variable("teacher", "average", dict)
        self.updated = self.variable("teacher", "updated", lambda: jnp.int32(_NEVER))

    def init_more(self, features: jax.Array) -> None:
        self.head(features)  # the last of the student's parameters
        self.average.value = self.student

    @property
    def student(self) -> dict[str, PyTree]:
        """The variables of the plain Classifier: parameters and running statistics."""
        return {
            collection: {name: value for name, value in variables.items() if name in ("backbone", "head")}
            for collection, variables in self.variables.items()
            if collection not in ("teacher", "losses", "metrics", "intermediates")
        }

    def update_teacher(self, step: jax.Array, decay: float) -> None:
        """Moves the teacher towards the student, once per `step` i32[]; later microbatches of the step have no effect.

        At the first step the teacher becomes the student, which may have begun from other weights than the teacher.
        """
        keep = jnp.where(self.updated.value == step, 1.0, jnp.minimum(1 - 1 / (step.astype(jnp.float32) + 1), decay))
        student, teacher = jax.lax.stop_gradient(self.student), self.average.value
        first = self.updated.value == _NEVER

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            weight = keep.astype(old.dtype)
            return jnp.where(first, new, weight * old + (1 - weight) * new)

        params = jax.tree.map(average, teacher["params"], student["params"])
        begun = jax.tree.map(lambda old, new: jnp.where(first, new, old), teacher, student)
        self.average.value = {**begun, "params": params}
        self.updated.value = step

    def teach(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The teacher's logits [b, num_classes], without gradient; in training, updates its running statistics."""
        plain = Classifier(self.backbone.clone(parent=None), self.num_classes, self.dtype, self.head_init, parent=None)
        teacher = self.average.value
        if not train:
            out: PyTree = plain.apply(teacher, images, train=False)
            return jax.lax.stop_gradient(out)
        rngs = {"dropout": self.make_rng("dropout"), **rng.init_streams(self.make_rng("params"))}
        state = [collection for collection in teacher if collection != "params"]
        logits, changed = plain.apply(teacher, images, train=True, mutable=state, rngs=rngs)
        self.average.value = jax.lax.stop_gradient({**teacher, **changed})
        return jax.lax.stop_gradient(logits)


def mean_teacher(problem: Problem, decay: float = 0.999, weight: float = 100.0, ramp: str = "25%") -> Method:
    """Mean teacher: supervised + weight(step) * consistency (Tarvainen and Valpola 2017, arXiv:1703.01780).

    The consistency is the mean squared difference between the softmax of student and teacher, over classes and over all
    images: labeled ones, and those of the stream `data.extra.unlabeled` if there is one, whose labels are not read.
    Student and teacher see different draws of dropout and of random ops, and the same of by-example ops, such as
    `flip_alternating`. The teacher averages the student's parameters with the decay min(1 - 1 / (step + 1), decay),
    updated once per step before it is used, as in the authors' code. The weight ramps up to `weight` over the duration
    `ramp` as exp(-5 (1 - step / ramp)²). Its default is the authors' for CIFAR-10; few labels may need a smaller one.

    Evaluation, prediction and export use the student; evaluation also reports `teacher_accuracy`. To use averaged
    weights everywhere, set the key `ema`. Raises UserError for a loss other than softmax.
    """
    check_link("mean_teacher", problem)
    ramp_steps = problem.steps(ramp)

    def inputs(key: jax.Array, batch: Batch, augment: Callable[..., jax.Array]) -> Batch:
        keys = jax.random.split(key, 4)
        out = {**batch, "image": augment(keys[0], batch["image"]), "second_view": augment(keys[1], batch["image"])}
        if STREAM in batch:
            first, second = (augment(k, batch[STREAM]["image"], batch[STREAM]) for k in keys[2:])
            out[STREAM] = {"image": first, "second_view": second}
        return out

    def loss(model: Averaged, batch: Batch, fixed: PyTree) -> Loss:
        step = batch["step"][0]
        model.update_teacher(step, decay)
        streams = [batch, batch[STREAM]] if STREAM in batch else [batch]
        student = forward_together(lambda x: model(x, train=True), [stream["image"] for stream in streams])
        teacher = forward_together(lambda x: model.teach(x, train=True), [stream["second_view"] for stream in streams])
        consistency = jnp.mean(squared_distance(jnp.concatenate(student), jnp.concatenate(teacher)))
        scale = weight * ramp_up(step, ramp_steps)
        return Loss(problem.supervised(student[0], batch) + scale * consistency, student[0],
                    {"consistency": consistency, "consistency_weight": scale})  # fmt: skip

    def evaluate(model: Averaged, batch: Batch, fixed: PyTree) -> Mapping[str, jax.Array]:
        labels = batch["label"] if "label" in batch else jnp.argmax(batch["target"], -1)
        return {"teacher_accuracy": (jnp.argmax(model.teach(batch["image"]), -1) == labels).astype(jnp.float32)}

    model = lambda backbone, _: Averaged(backbone, problem.classes, head_init=problem.head_init)  # noqa: E731
    return Method(loss, inputs, model, evaluate)


def squared_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The squared difference of the softmax of two logits [n, classes], averaged over classes: [n]."""
    return jnp.mean((jax.nn.softmax(student) - jax.nn.softmax(teacher)) ** 2, -1)


def ramp_up(step: jax.Array, steps: int) -> jax.Array:
    """The ramp exp(-5 (1 - step / steps)²), then 1, f32[] (Laine and Aila 2016, arXiv:1610.02242)."""
    done = jnp.minimum(step.astype(jnp.float32) / steps, 1.0) if steps else jnp.float32(1)
    return jnp.exp(-5.0 * (1 - done) ** 2)
