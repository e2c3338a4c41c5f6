"""The train state and the two pure functions that training and evaluation consist of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from imgclf_jax import metrics, rng
from imgclf_jax.losses import Loss
from imgclf_jax.optim import promoting

Batch = dict[str, jax.Array]
Augment = Callable[..., jax.Array]  # (key, images uint8[b, h, w, c]) → f32[b, h, w, c]


class TrainState(struct.PyTreeNode):
    """All that training is a function of: with the config, it determines every later state."""

    seed: jax.Array  # u32[]; a value and not a constant of the program, so one compilation serves all seeds
    step: jax.Array  # i32[], steps done
    params: Any
    model_state: Any  # every other linen collection, such as batch_stats
    opt_state: Any


def init_state(
    model: Any,  # a Classifier
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
    images: jax.Array | None = None,
) -> TrainState:
    """The state at step 0; `image_shape` is (h, w, c). Pure, so it can be jitted or evaluated for its shape.

    `images` f32[n, h, w, c] are for a backbone with a function `init_on_images(params, images) -> params`.
    """
    zeros = jnp.zeros((1, *image_shape), jnp.float32)
    variables = dict(model.init(rng.key(seed, "init"), zeros, train=False))
    params = variables.pop("params")
    if images is not None:
        params = {**params, "backbone": model.backbone.init_on_images(params["backbone"], images)}
    return TrainState(
        seed=jnp.uint32(seed),
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
    )


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def make_train_step(
    model: nn.Module,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Augment,
) -> Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]:
    """`train_step(state, batch) -> (state, sums)`, where batch is {"image": uint8[b, h, w, c], "label": i32[b]}.

    The sums are of this one step: `loss`, `correct` and `examples` over the batch, `grad_norm` (before clipping),
    `param_norm` (after the update), `learning_rate` and `steps`; `nonfinite_step` is the step's number if the loss or
    a norm is not finite.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, metrics.Sums]:
        images = augment(rng.key(state.seed, "augment", state.step), batch["image"])  # [b, h, w, c] f32
        labels = batch["label"]  # [b]

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            logits, model_state = model.apply(
                {"params": params, **state.model_state},
                images,
                train=True,
                mutable=list(state.model_state),
                rngs={"dropout": rng.key(state.seed, "dropout", state.step)},
            )
            logits = _at_least_float32(logits)  # [b, classes]
            return jnp.mean(loss(logits, labels)), (dict(model_state), logits)

        (mean_loss, (model_state, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        grad_norm = optax.tree.norm(grads)
        param_norm = optax.tree.norm(params)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        sums = {
            "steps": jnp.int32(1),
            "examples": jnp.int32(labels.size),
            "correct": jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32),
            "loss": mean_loss * labels.size,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": jnp.asarray(promoting(schedule)(state.step), jnp.float32),
            "nonfinite_step": jnp.where(finite, jnp.int32(metrics.NO_STEP), state.step),
        }
        state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
        return state, sums

    return train_step


def zero_sums() -> metrics.Sums:
    """The sums of no step."""
    counts = {name: jnp.int32(0) for name in ("steps", "examples", "correct")}
    values = {name: jnp.float32(0) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}
    return {**counts, **values, "nonfinite_step": jnp.int32(metrics.NO_STEP)}


def add_sums(a: metrics.Sums, b: metrics.Sums) -> metrics.Sums:
    """The sums of both; of `nonfinite_step` the earlier."""
    return {k: jnp.minimum(a[k], b[k]) if k == "nonfinite_step" else a[k] + b[k] for k in a}


def make_eval_step(model: nn.Module, loss: Loss, augment: Augment) -> Callable[[Any, Any, Batch], metrics.Sums]:
    """`eval_step(params, model_state, batch) -> sums`; the batch has `mask` bool[b], False for padding."""

    def eval_step(params: Any, model_state: Any, batch: Batch) -> metrics.Sums:
        logits: Any = model.apply({"params": params, **model_state}, augment(None, batch["image"]), train=False)
        logits = _at_least_float32(logits)
        return metrics.classification_sums(logits, batch["label"], loss(logits, batch["label"]), batch["mask"])

    return eval_step


def make_predict_step(model: nn.Module, augment: Augment) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """`predict_step(params, model_state, images uint8[b, h, w, c]) -> probabilities f32[b, classes]`."""

    def predict_step(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params, **model_state}, augment(None, images), train=False)
        return jax.nn.softmax(logits.astype(jnp.float32), -1)

    return predict_step
