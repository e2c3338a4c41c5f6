"""SimCLR and SupCon: contrastive pretraining of a backbone, without and with labels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree
from imgclf_jax.methods import Batch, Loss, Method, Problem
from imgclf_jax.models.classifier import Classifier


def simclr(problem: Problem, temperature: float = 0.5, width: int = 128, hidden: int = 0) -> Method:
    """Pretrains the backbone with NT-Xent, equation 1 of Chen et al. 2020 (arXiv:2002.05709); labels are not read.

    Each image is augmented twice by the key `augment`, with different draws of random ops and the same of by-example
    ops, such as `flip_alternating`. A projector of two dense layers, with `hidden` units (0: the backbone's number of
    features) and `width` outputs, is used in training only; no head is trained. Negatives come from the global batch on
    any number of devices, but from one microbatch with `accumulate`. `contrastive_accuracy` is the fraction of views
    whose most similar view in the batch is of the same image.
    """
    return _contrastive(lambda batch: jnp.arange(len(batch["image"])), temperature, width, hidden)


def supcon(problem: Problem, temperature: float = 0.1, width: int = 128, hidden: int = 0) -> Method:
    """Pretrains the backbone with L_out, equation 2 of Khosla et al. 2020 (arXiv:2004.11362).

    As `simclr`, but the positives of a view are all other views of its class in the batch, at least the second view of
    the same image. `contrastive_accuracy` is the fraction of views whose most similar view is of the same class.
    """
    return _contrastive(lambda batch: batch["label"], temperature, width, hidden)


def _contrastive(classes: Callable[[Batch], jax.Array], temperature: float, width: int, hidden: int) -> Method:
    """A method that attracts the views of images with equal `classes(batch)` i32[b]; see `contrast`."""

    def inputs(key: jax.Array, batch: Batch, augment: Callable[..., jax.Array]) -> Batch:
        first, second = (augment(k, batch["image"]) for k in jax.random.split(key))
        return {**batch, "image": first, "second_view": second}

    def loss(model: Any, batch: Batch, fixed: PyTree) -> Loss:
        if len(batch["image"]) < 2:
            raise UserError("a batch of a single image contrasts nothing; raise batch_size or lower accumulate")
        # The views of an image are adjacent, so they stay on its device and in its BatchNorm group.
        views = jnp.stack([batch["image"], batch["second_view"]], 1)  # [b, 2, h, w, c]
        z = model.projector(model.features(views.reshape(-1, *views.shape[2:]), train=True))  # [2b, width]
        values, nearest = contrast(z, jnp.repeat(classes(batch), 2), temperature)
        return Loss(values.reshape(-1, 2).mean(1), metrics={"contrastive_accuracy": nearest})

    make = functools.partial(Contrastive, width=width, hidden=hidden)
    model = lambda backbone, problem: make(backbone, problem.classes, head_init=problem.head_init)  # noqa: E731
    return Method(loss, inputs, model, predicts=False)


def contrast(z: jax.Array, classes: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """The contrastive loss f32[n] of each vector of `z` [n, d], and whether its nearest vector is positive, f32[n].

    Equation 2 (L_out) of Khosla et al. 2020 (arXiv:2004.11362) with cosine similarity. Positives are the other vectors
    of equal `classes` i32[n]; with one positive each it is NT-Xent. Without positives the loss is 0.
    """
    squared = jnp.sum(z * z, -1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))  # a zero vector stays zero, with a finite gradient
    others = ~jnp.eye(len(z), dtype=bool)
    positive = (classes[:, None] == classes) & others
    similarity = jnp.where(others, z @ z.T / temperature, -jnp.inf)  # [n, n]
    losses = jax.nn.logsumexp(similarity, -1, keepdims=True) - similarity
    count = jnp.maximum(jnp.sum(positive, -1), 1).astype(losses.dtype)
    values = jnp.sum(jnp.where(positive, losses, 0.0), -1) / count
    best = jnp.max(jnp.where(positive, similarity, -jnp.inf), -1)
    nearest = best > jnp.max(jnp.where(positive, -jnp.inf, similarity), -1)  # False for NaN and for ties
    return values, nearest.astype(jnp.float32)


class Contrastive(Classifier):
    """A Classifier with a projector: one hidden layer with ReLU, and `width` outputs."""

    width: int = 128
    hidden: int = 0  # 0: the number of features

    def setup(self) -> None:
        super().setup()
        self.projector = Projector(self.width, self.hidden, self.dtype)

    def init_more(self, features: jax.Array) -> None:
        self.projector(features)


class Projector(nn.Module):
    """An MLP with one hidden ReLU layer, [b, d] → [b, width], as in section 2.1 of the paper."""

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = nn.Dense(self.hidden or features.shape[-1], dtype=self.dtype, name="hidden")(features)
        return nn.Dense(self.width, dtype=self.dtype, use_bias=False, name="out")(nn.relu(x))
