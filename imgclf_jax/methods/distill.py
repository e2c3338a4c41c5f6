"""Knowledge distillation: the student learns from a trained network's logits and, if asked, from its features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import SIGMOID, SOFTMAX, at_least_float32
from imgclf_jax.methods import Batch, Loss, Method, Problem, Teacher
from imgclf_jax.models.classifier import Classifier


class Student(Classifier):
    """A Classifier with a linear map, the regressor, of its features to the `width` features of the teacher."""

    width: int = 0

    def setup(self) -> None:
        super().setup()
        self.regressor = nn.Dense(self.width)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = self.features(images, train)
        if self.is_initializing():
            self.regressor(features)
        logits: jax.Array = self.head(features)
        return logits


def distill(
    problem: Problem, teacher: str, alpha: float = 0.5, temperature: float = 4.0, features: float = 0.0, width: int = 0
) -> Method:
    """(1 - alpha) * supervised + alpha * T² * KL(teacher || student), both of logits / T.

    With the loss 'softmax' the divergence is that of the softmax's distributions (Hinton et al. 2015,
    arXiv:1503.02531); with 'sigmoid' it is the sum over the classes of those of their Bernoulli distributions.
    `teacher` is a work directory, read in training only.

    With `features` > 0, features * ||t - r(s)||² / 2 is added, equation 3 of FitNets (Romero et al. 2015,
    arXiv:1412.6550): t f32[b, width] are the teacher's features, s the student's, and r is a trained linear map.

    Raises UserError for numbers out of range, for a loss without probabilities, and for a teacher of another kind of
    loss, or of other classes, images, normalization or width.
    """
    if not 0 <= alpha <= 1 or not 0 < temperature < float("inf") or not 0 <= features < float("inf"):
        raise UserError(f"method: distill has alpha={alpha}, temperature={temperature}, features={features}; alpha is "
                        "0 to 1, temperature above 0, features 0 or more")  # fmt: skip
    if bool(features) != (width > 0):
        raise UserError(f"method: distill has features={features} and width={width}; give both, width being the number "
                        "of the teacher's features, or neither")  # fmt: skip
    divergence = _DIVERGENCES.get(problem.link)
    if divergence is None:
        raise UserError("method: distill compares probabilities of the links SOFTMAX and SIGMOID, and the loss of this "
                        "run has another; use a loss such as 'softmax' or 'sigmoid'")  # fmt: skip
    known = problem.load(teacher)

    def loss(model: Any, batch: Batch, fixed: Any) -> Loss:
        seen = model.features(batch["image"], train=True)  # [b, d]
        logits = at_least_float32(model.head(seen))  # [b, classes]
        kl = temperature**2 * divergence(known.apply(fixed, batch["image"]) / temperature, logits / temperature)  # [b]
        values, metrics = (1 - alpha) * problem.supervised(logits, batch) + alpha * kl, {"distillation": kl}
        if features:
            gap = known.features(fixed, batch["image"]) - model.regressor(seen).astype(jnp.float32)  # [b, width]
            metrics["features"] = jnp.sum(gap**2, -1) / 2
            values = values + features * metrics["features"]
        return Loss(values, logits, metrics)

    def student(backbone: nn.Module, problem: Problem) -> nn.Module:
        return Student(backbone, problem.classes, head_init=problem.head_init, width=width)

    return Method(loss, model=student if features else None, fixed=lambda: _checked(known, problem, teacher, width))


def _softmax_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)), f32[b], of logits f32[b, classes]."""
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def _sigmoid_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """The sum over the classes of KL(Bernoulli(sigmoid(teacher)) || Bernoulli(sigmoid(student))), f32[b]."""
    yes = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
    no = jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
    return jnp.sum(yes + no, -1)


_DIVERGENCES = {SOFTMAX: _softmax_kl, SIGMOID: _sigmoid_kl}


def _checked(known: Teacher, problem: Problem, run: str, width: int) -> Any:
    """The teacher's variables. Raises UserError if it cannot teach this problem."""
    if known.class_names != problem.class_names:
        raise UserError(f"method: the teacher {run} knows {known.classes} classes ({', '.join(known.class_names[:3])}, "
                        f"…), and this run has {problem.classes} ({', '.join(problem.class_names[:3])}, …); train both "
                        "on the same classes")  # fmt: skip
    if known.link != problem.link:
        raise UserError(f"method: the teacher {run} was trained with another kind of loss, so its logits are other "
                        "probabilities; train both with softmax losses, or both with sigmoid losses")  # fmt: skip
    image = jax.ShapeDtypeStruct((1, *problem.image_shape), jnp.float32)
    found = jax.eval_shape(known.features, known.variables, image).shape[-1]
    if width not in (0, found):
        raise UserError(f"method: the teacher {run} has {found} features, and distill has width={width}; give "
                        f"width={found}")  # fmt: skip
    return known.variables
