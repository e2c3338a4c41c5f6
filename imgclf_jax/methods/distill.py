"""Knowledge distillation from a teacher's logits."""

from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree
from imgclf_jax.losses import SIGMOID, SOFTMAX
from imgclf_jax.methods import Batch, Loss, Method, Problem


def distill(problem: Problem, teacher: str, alpha: float = 0.5, temperature: float = 4.0) -> Method:
    """Distillation: (1 - alpha) * supervised + alpha * T² * KL(teacher || student), both at temperature T.

    `teacher` is a work directory, read in training only. With softmax losses the divergence is between softmax
    distributions (Hinton et al. 2015, arXiv:1503.02531); with sigmoid losses it is summed over the Bernoulli
    distributions of the classes. Raises UserError for a loss without probabilities, and if the teacher's loss, classes,
    images or normalization do not match.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"method: distill(alpha={alpha}): alpha must be 0 to 1")
    if not (divergence := _DIVERGENCES.get(problem.link)):
        raise UserError("method: distill needs a loss with probabilities, such as 'softmax' or 'sigmoid'")
    trained = problem.load(teacher)

    def loss(model: Any, batch: Batch, fixed: PyTree) -> Loss:
        logits = dtypes.upcast(model(batch["image"], train=True))  # [b, classes]
        teacher_logits = trained.apply(fixed, batch["image"])
        kl = temperature**2 * divergence(teacher_logits / temperature, logits / temperature)  # [b]
        return Loss((1 - alpha) * problem.supervised(logits, batch) + alpha * kl, logits, {"distillation": kl})

    def fixed() -> PyTree:
        if trained.class_names != problem.class_names:
            raise UserError(f"method: the teacher {teacher} knows {trained.classes} classes "
                            f"({', '.join(trained.class_names[:3])}, …), but this run has {problem.classes} "
                            f"({', '.join(problem.class_names[:3])}, …); train both on the same classes")  # fmt: skip
        if trained.link != problem.link:
            raise UserError(f"method: the teacher {teacher} was trained with another kind of loss, so its logits mean "
                            "other probabilities; train both with softmax, or both with sigmoid")  # fmt: skip
        return trained.variables

    return Method(loss, fixed=fixed)


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
