"""FixMatch: semi-supervised learning from confident pseudo-labels of unlabeled images."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree
from imgclf_jax.losses import SOFTMAX
from imgclf_jax.methods import Batch, Loss, Method, Problem

STREAM = "unlabeled"  # the key below `data.extra`


def fixmatch(
    problem: Problem, threshold: float = 0.95, weight: float = 1.0,
    strong: str = "pad_crop(2)|randaugment(2, 10)|cutout(8, fill=128)",
) -> Method:  # fmt: skip
    """FixMatch: supervised + weight * unlabeled, equations 3 and 4 of Sohn et al. 2020 (arXiv:2001.07685).

    Each image of the stream `data.extra.unlabeled`, whose labels are not read, has two views: weakly augmented by the
    key `augment`, and augmented by the ops `strong` followed by the run's normalization. If the largest probability of
    the weak view reaches `threshold`, its class is the pseudo-label of the strong view; the cross-entropy is averaged
    over all images of the stream, including those below the threshold. No gradient reaches the weak view. Labeled
    images and both views go through the model in one pass, so batch statistics cover all of them, as in the authors'
    code. The default `strong` suits images of about 28 by 28 pixels that must not be mirrored.

    Metrics: `mask_rate` is the fraction of unlabeled images at or above the threshold, `unlabeled_loss` the second term
    without its weight. Raises UserError for a threshold out of range, a loss other than softmax, or no such stream.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"method: fixmatch(threshold={threshold}): must be 0 to 1")
    check_link("fixmatch", problem)
    strongly = problem.build_augment("|".join(filter(None, (strong, problem.normalization))))

    def inputs(key: jax.Array, batch: Batch, augment: Callable[..., jax.Array]) -> Batch:
        if STREAM not in batch:
            raise UserError(f"method: fixmatch reads the stream data.extra.{STREAM}, which this run lacks; set it, as "
                            f"in data.extra.{STREAM}='train[10%:]|batch_size(448)'")  # fmt: skip
        stream = batch[STREAM]
        labeled_key, weak_key, strong_key = jax.random.split(key, 3)
        # Per-example ops need a seed, which methods do not have; with 0 the draws differ by example only.
        known = (jnp.uint32(0), stream["id"], stream["epoch"]) if "id" in stream else ()
        images = stream["image"]
        views = {"weak": augment(weak_key, images, stream), "strong": strongly(strong_key, images, *known)}
        return {**batch, "image": augment(labeled_key, batch["image"]), STREAM: views}

    def loss(model: Any, batch: Batch, fixed: PyTree) -> Loss:
        views = batch[STREAM]
        images = [batch["image"], views["weak"], views["strong"]]
        logits, weak, strong = forward_together(lambda x: model(x, train=True), images)
        values, mask = pseudo_label_losses(weak, strong, threshold)
        unlabeled_loss = jnp.mean(values)
        return Loss(problem.supervised(logits, batch) + weight * unlabeled_loss, logits,
                    {"mask_rate": jnp.mean(mask), "unlabeled_loss": unlabeled_loss})  # fmt: skip

    return Method(loss, inputs=inputs)


def pseudo_label_losses(weak: jax.Array, strong: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """Returns the terms of equation 4, f32[n], and a mask f32[n], 1 for images at or above the threshold.

    `weak` and `strong` are logits [n, classes]. If the weak logits of an image are NaN, so is its loss.
    """
    probabilities = jax.lax.stop_gradient(jax.nn.softmax(weak))
    greatest = jnp.max(probabilities, -1)
    mask = greatest >= threshold
    log_q = jax.nn.log_softmax(strong)
    losses = -jnp.take_along_axis(log_q, jnp.argmax(probabilities, -1)[:, None], -1)[:, 0]
    # An infinite loss below the threshold counts as 0, but 0 * NaN stays NaN, so that the run stops.
    return jnp.where(mask, losses, 0 * greatest), mask.astype(jnp.float32)


def check_link(name: str, problem: Problem) -> None:
    """Raises UserError unless the run predicts a single class by softmax."""
    if problem.link is not SOFTMAX:
        raise UserError(f"method: {name} compares softmax probabilities; use a single-label loss such as 'softmax'")


def forward_together(forward: Callable[[jax.Array], jax.Array], batches: Sequence[jax.Array]) -> list[jax.Array]:
    """Runs `forward` once on several batches of images [n_i, h, w, c]; returns the logits [n_i, classes] of each.

    The batches are interleaved, so that each device and each BatchNorm group sees the same mixture of them.
    """
    parts = math.gcd(*(len(images) for images in batches))
    split = [images.reshape(parts, -1, *images.shape[1:]) for images in batches]  # [parts, n_i / parts, h, w, c]
    together = jnp.concatenate(split, 1)
    out = dtypes.upcast(forward(together.reshape(-1, *together.shape[2:])))
    by_part = out.reshape(parts, -1, *out.shape[1:])
    ends = [sum(x.shape[1] for x in split[:i]) for i in range(1, len(split))]
    return [x.reshape(-1, *x.shape[2:]) for x in jnp.split(by_part, ends, 1)]
