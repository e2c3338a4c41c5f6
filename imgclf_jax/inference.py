"""What a trained model computes of images: probabilities, logits and features. Pure functions, as in `step.py`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax import step
from imgclf_jax.augment import tta
from imgclf_jax.losses import SOFTMAX, Link

Outputs = Literal["predict", "logits", "features"]

# (params, model_state, images uint8[b, h, w, c]) → f32[b, …]
Inference = Callable[[Any, Any, jax.Array], jax.Array]


def make_predict_step(
    model: nn.Module, augment: step.Augment, views: tta.Views = tta.NONE, num_seeds: int = 1, link: Link = SOFTMAX
) -> Inference:
    """`predict_step(params, model_state, images uint8[b, h, w, c]) -> probabilities f32[b, classes]`.

    `link` is the loss's. With several seeds, params and model_state are [num_seeds, …], and the result is the mean of
    the seeds' probabilities.
    """
    logits_of = step.make_logits(model, augment, views)

    def probabilities(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        return link.probabilities(logits_of(params, model_state, images).astype(jnp.float32))

    def predict_step(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        if num_seeds == 1:
            return probabilities(params, model_state, images)
        return jnp.mean(jax.vmap(probabilities, (0, 0, None))(params, model_state, images), 0)

    return predict_step


def make_logits_step(
    model: nn.Module, augment: step.Augment, views: tta.Views = tta.NONE, num_seeds: int = 1
) -> Inference:
    """`logits_step(params, model_state, images uint8[b, h, w, c]) -> f32[b, classes]`, the mean over the views.

    With several seeds, params and model_state are [num_seeds, …], and the result is [num_seeds, b, classes].
    """
    logits_of = step.make_logits(model, augment, views)

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        return logits_of(params, model_state, images).astype(jnp.float32)

    return logits if num_seeds == 1 else jax.vmap(logits, (0, 0, None))


def backbone_features(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """The features [b, d] of normalized images f32[b, h, w, c], in evaluation."""

    def backbone(model: Any, images: jax.Array) -> Any:
        return model.backbone(images, train=False)

    out: jax.Array = nn.apply(backbone, model)(variables, images)
    return out


def make_features_step(model: nn.Module, augment: step.Augment, num_seeds: int = 1) -> Inference:
    """`features_step(params, model_state, images uint8[b, h, w, c]) -> f32[b, d]`: what the head is given.

    They are of the image as it is, without the views of test time. With several seeds, params and model_state are
    [num_seeds, …], and the result is [num_seeds, b, d].
    """

    def features(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        return backbone_features(model, {"params": params, **model_state}, augment(None, images)).astype(jnp.float32)

    return features if num_seeds == 1 else jax.vmap(features, (0, 0, None))
