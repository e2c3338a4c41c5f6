"""Knowledge distillation from a teacher's logits and, optionally, its features."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree
from imgclf_jax.losses import SIGMOID, SOFTMAX
from imgclf_jax.methods import Batch, Loss, Method, Problem, Teacher
from imgclf_jax.models.classifier import Classifier


class Student(Classifier):
    """A Classifier with a linear regressor from its features to the teacher's `width` features."""

    width: int = 0

    def setup(self) -> None:
        super().setup()
        self.regressor = nn.Dense(self.width)

    def init_more(self, features: jax.Array) -> None:
        self.regressor(dtypes.upcast(features))


def distill(
    problem: Problem, teacher: str, alpha: float = 0.5, temperature: float = 4.0, features: float = 0.0, width: int = 0
) -> Method:
    """Distillation: (1 - alpha) * supervised + alpha * T² * KL(teacher || student), both at temperature T.

    - `teacher` is a work directory, read in training only.
    - `features` > 0 adds features * ||t - r(s)||² / 2, equation 3 of FitNets (Romero et al. 2015, arXiv:1412.6550),
      where t f32[b, width] are the teacher's features, s the student's, and r is a trained linear map.

    With softmax losses the divergence is between softmax distributions (Hinton et al. 2015, arXiv:1503.02531); with
    sigmoid losses it is summed over the Bernoulli distributions of the classes. Raises UserError for numbers out of
    range, for a loss without probabilities, and if the teacher's loss, classes, images, normalization or width do not
    match.
    """
    if not 0 <= alpha <= 1 or not 0 < temperature < float("inf") or not 0 <= features < float("inf"):
        raise UserError(f"method: distill(alpha={alpha}, temperature={temperature}, features={features}): alpha must "
                        "be 0 to 1, temperature above 0, features 0 or more")  # fmt: skip
    if bool(features) != (width > 0):
        raise UserError(f"method: distill(features={features}, width={width}): set both, with width the number of the "
                        "teacher's features, or neither")  # fmt: skip
    divergence = _DIVERGENCES.get(problem.link)
    if divergence is None:
        raise UserError("method: distill compares softmax or sigmoid probabilities, but the loss of this run has "
                        "neither; use a loss such as 'softmax' or 'sigmoid'")  # fmt: skip
    trained = problem.load(teacher)

    def loss(model: Student, batch: Batch, fixed: PyTree) -> Loss:
        student_features = model.features(batch["image"], train=True)  # [b, d]
        logits = dtypes.upcast(model.head(student_features))  # [b, classes]
        teacher_logits = trained.apply(fixed, batch["image"])
        kl = temperature**2 * divergence(teacher_logits / temperature, logits / temperature)  # [b]
        values, metrics = (1 - alpha) * problem.supervised(logits, batch) + alpha * kl, {"distillation": kl}
        if features:
            teacher_features = trained.features(fixed, batch["image"])  # [b, width]
            gap = teacher_features - model.regressor(dtypes.upcast(student_features))
            metrics["features"] = jnp.sum(gap**2, -1) / 2
            values = values + features * metrics["features"]
        return Loss(values, logits, metrics)

    def student(backbone: nn.Module, problem: Problem) -> nn.Module:
        return Student(backbone, problem.classes, head_init=problem.head_init, width=width)

    return Method(
        loss, model=student if features else None, fixed=lambda: _check_teacher(trained, problem, teacher, width)
    )


def _softmax_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) f32[b] from logits f32[b, classes]."""
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def _sigmoid_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(Bernoulli(sigmoid(teacher)) || Bernoulli(sigmoid(student))), summed over the classes: f32[b]."""
    yes = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
    no = jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
    return jnp.sum(yes + no, -1)


_DIVERGENCES = {SOFTMAX: _softmax_kl, SIGMOID: _sigmoid_kl}


def _check_teacher(teacher: Teacher, problem: Problem, run: str, width: int) -> jax.ShapeDtypeStruct:
    """Returns the teacher's variables. Raises UserError if it does not fit this problem."""
    if teacher.class_names != problem.class_names:
        raise UserError(f"method: the teacher {run} knows {teacher.classes} classes "
                        f"({', '.join(teacher.class_names[:3])}, …), but this run has {problem.classes} "
                        f"({', '.join(problem.class_names[:3])}, …); train both on the same classes")  # fmt: skip
    if teacher.link != problem.link:
        raise UserError(f"method: the teacher {run} was trained with another kind of loss, so its logits mean "
                        "different probabilities; train both with softmax losses, or both with sigmoid "
                        "losses")  # fmt: skip
    image = jax.ShapeDtypeStruct((1, *problem.image_shape), jnp.float32)
    teacher_width = jax.eval_shape(teacher.features, teacher.variables, image).shape[-1]
    if width not in (0, teacher_width):
        raise UserError(f"method: the teacher {run} has {teacher_width} features, but distill has width={width}; set "
                        f"width={teacher_width}")  # fmt: skip
    return teacher.variables
