"""The train state and the two pure functions that training and evaluation consist of."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from imgclf_jax import metrics
from imgclf_jax.augment import mixing, tta
from imgclf_jax.core import platform, rng, tree
from imgclf_jax.losses import Link, Loss, Task, link_of
from imgclf_jax.models.frozen import Frozen
from imgclf_jax.optim import weight_averages
from imgclf_jax.optim.optimizers import promoting, seed_keys
from imgclf_jax.optim.weight_averages import Average

Batch = dict[str, jax.Array]
Augment = Callable[..., jax.Array]  # (key, images uint8[b, h, w, c]) → f32[b, h, w, c]
Gradient = Callable[..., Any]  # (params, model_state, batch, key) → ((loss, (model_state, logits)), grads)
Window = dict[str, jax.Array]  # sums over the steps since the last log, and the first of them that was not finite


class TrainState(struct.PyTreeNode):
    """All that training is a function of: with the config, it determines every later state."""

    seed: jax.Array  # u32[]; a value and not a constant of the program, so one compilation serves all seeds
    step: jax.Array  # i32[], steps done
    params: Any
    model_state: Any  # every other linen collection, such as batch_stats
    opt_state: Any
    ema: Any = None  # (params, model_state), averaged over the steps; None without an average

    @property
    def evaluated(self) -> tuple[Any, Any]:
        """(params, model_state) that evaluation and prediction use: the averages, where there are any."""
        return (self.params, self.model_state) if self.ema is None else self.ema


def init_state(
    model: Any,  # a Classifier
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
    average: Average = weight_averages.NONE,
    images: jax.Array | None = None,
    weights: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state at step 0; `image_shape` is (h, w, c). Pure, so it can be jitted or evaluated for its shape.

    `images` f32[n, h, w, c] are for a backbone with a function `init_on_images(params, images) -> params`.
    `weights` are taken instead of random ones, by name: {"params/head/bias": …, "batch_stats/…": …}.
    """
    zeros = jnp.zeros((1, *image_shape), jnp.float32)
    variables = dict(model.init(rng.key(seed, "init"), zeros, train=False))
    if images is not None:
        backbone = model.backbone.init_on_images(variables["params"]["backbone"], images)
        variables["params"] = {**variables["params"], "backbone": backbone}
    if weights:
        variables = tree.replace(variables, weights)
    params = variables.pop("params")
    return TrainState(
        seed=jnp.uint32(seed),
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=seed_keys(optimizer.init(params), seed),
        ema=average.init((params, variables)),
    )


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def make_inputs(augment: Augment, mix: mixing.Mix | None = None) -> Callable[[jax.Array, jax.Array, Batch], Batch]:
    """`inputs(seed u32[], step i32[], batch)`: what a step gives the model and the loss, see `make_train_step`.

    That is {"image": f32[b, h, w, c], "label": i32[b]}. With `mix` image i has the share `weight` f32[b] of its own
    label, and the rest of `other` i32[b]. In place of labels it may be "target" f32[b, k], mixed.
    """

    def inputs(seed: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        known = (seed, batch["id"], batch["epoch"]) if "id" in batch else ()
        images = augment(rng.key(seed, "augment", step), batch["image"], *known)  # [b, h, w, c] f32
        wanted: Batch = {name: values for name, values in batch.items() if name in ("label", "target")}
        if mix is None:
            return {"image": images, **wanted}
        return mixing.mixed_batch(wanted, *mix(rng.key(seed, "mix", step), images))

    return inputs


def make_train_step(
    model: nn.Module | Frozen,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Augment,
    average: Average = weight_averages.NONE,
    mix: mixing.Mix | None = None,
    accumulate: int = 1,
    over_devices: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    task: Task = Task.CLASSES,
) -> Callable[[TrainState, Batch], tuple[TrainState, Window]]:
    """`train_step(state, batch) -> (state, window)`, where batch is {"image": uint8[b, h, w, c], "label": i32[b]}.

    For another `task` than CLASSES it has "target" f32[b, k] in place of labels. `correct` is by `metrics.correct`, and
    0 in a regression.

    Where `augment` wants them, the batch has `id` and `epoch` i32[b] as well. With `mix` the loss is that of mixed
    images, and `correct` counts the labels of the greater weight.

    With `accumulate` the gradient is the mean over that many parts of the batch, computed one after the other. It is
    that of the whole batch, but for layers with batch statistics, which see a part at a time, and for dropout's draws.
    `over_devices` is applied to the gradient function of a microbatch: sharded parameters are gathered in it.

    The window is of this one step. Its sums are `loss`, `correct` and `examples` over the batch, `grad_norm` (before
    clipping), `param_norm` (after the update), `learning_rate` and `steps`. Its `nonfinite_step` is the step's number
    if the loss or a norm is not finite, else `metrics.NO_STEP`.
    """
    inputs = make_inputs(augment, mix)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Window]:
        whole = inputs(state.seed, state.step, batch)

        def loss_fn(params: Any, model_state: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
            logits, model_state = model.apply(
                {"params": params, **model_state},
                part["image"],
                train=True,
                mutable=list(model_state),
                rngs={"dropout": key},
            )
            logits = _at_least_float32(logits)  # [b / accumulate, classes]
            losses = mixing.batch_loss(loss, logits, part)  # [b / accumulate]
            return jnp.mean(losses), (dict(model_state), logits)

        gradient = _accumulated(over_devices(jax.value_and_grad(loss_fn, has_aux=True)), accumulate)
        key = rng.key(state.seed, "dropout", state.step)
        (mean_loss, (model_state, logits)), grads = gradient(state.params, state.model_state, whole, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        (params, model_state), ema = average.update(state.ema, (params, model_state), state.step)

        grad_norm = optax.tree.norm(grads)
        param_norm = optax.tree.norm(params)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        window = {
            "steps": jnp.int32(1),
            "examples": jnp.int32(len(logits)),
            "correct": _count_correct(logits, whole, link_of(loss), task),
            "loss": mean_loss * len(logits),
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": jnp.asarray(promoting(schedule)(state.step), jnp.float32),
            "nonfinite_step": jnp.where(finite, jnp.int32(metrics.NO_STEP), state.step),
        }
        state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema)
        return state, window

    return train_step


def _count_correct(logits: jax.Array, batch: Batch, link: Link, task: Task) -> jax.Array:
    """i32[]: how many examples are predicted right; of mixed images by their dominant label or mixed target."""
    wanted = batch["label"] if task is Task.CLASSES else batch["target"]
    if "weight" in batch:
        wanted = mixing.main_labels(wanted, batch["weight"])
    right = metrics.correct(logits, wanted, link, task)
    return jnp.int32(0) if right is None else jnp.sum(right, dtype=jnp.int32)


def _accumulated(gradient: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """`gradient(params, model_state, batch, key) -> ((loss, (model_state, logits)), grads)`, by parts of the batch."""
    if parts == 1:
        return gradient

    def mean_gradient(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        def add(carry: tuple[Any, Any], part: tuple[jax.Array, Batch]) -> Any:
            total, model_state = carry
            out, grads = gradient(params, model_state, part[1], jax.random.fold_in(key, part[0]))
            loss, (model_state, logits) = out
            return (jax.tree.map(jnp.add, total, grads), model_state), (loss, logits)

        # Part i is every example whose number is i modulo `parts`: a share of what each device holds.
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        unroll = platform.current() == "cpu"  # there XLA's own convolution is a hundred times slower in a loop
        carry = (jax.tree.map(jnp.zeros_like, params), model_state)
        (total, model_state), (losses, logits) = jax.lax.scan(add, carry, (jnp.arange(parts), split), unroll=unroll)
        logits = logits.swapaxes(0, 1).reshape(-1, logits.shape[-1])  # [b, classes]
        return (jnp.mean(losses), (model_state, logits)), jax.tree.map(lambda g: g / parts, total)

    return mean_gradient


def zero_window() -> Window:
    """The window of no step."""
    counts = {name: jnp.int32(0) for name in ("steps", "examples", "correct")}
    values = {name: jnp.float32(0) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}
    return {**counts, **values, "nonfinite_step": jnp.int32(metrics.NO_STEP)}


def join_windows(a: Window, b: Window) -> Window:
    """The sums of both windows, and the earlier of their steps that were not finite."""
    return {k: jnp.minimum(a[k], b[k]) if k == "nonfinite_step" else a[k] + b[k] for k in a}


def make_logits(model: nn.Module, augment: Augment, views: tta.Views) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """`logits(params, model_state, images uint8[b, h, w, c]) -> [b, classes]`, the mean over the views."""

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:  # uint8[b, h, w, c] → f32[b, classes]
        def of_view(images: jax.Array) -> jax.Array:
            out: Any = model.apply({"params": params, **model_state}, images, train=False)
            return _at_least_float32(out)

        return tta.mean_logits(views, of_view, augment(None, images))

    return logits


def several(train_step: Callable[..., Any], num_seeds: int) -> Callable[..., Any]:
    """A train step for `num_seeds` states at once, [num_seeds, …], and their batches side by side (see `stream`)."""
    if num_seeds == 1:
        return train_step

    def step(states: TrainState, batch: Batch) -> tuple[TrainState, Window]:
        own = jax.tree.map(lambda x: x.reshape(-1, num_seeds, *x.shape[1:]), batch)
        result: tuple[TrainState, Window] = jax.vmap(train_step, (0, 1))(states, own)
        return result

    return step


def make_eval_step(
    model: nn.Module,
    loss: Loss,
    augment: Augment,
    views: tta.Views = tta.NONE,
    num_seeds: int = 1,
    with_predictions: bool = False,
    task: Task = Task.CLASSES,
) -> Callable[[Any, Any, Batch], tuple[metrics.Sums, metrics.AnyPredictions | None]]:
    """`eval_step(params, model_state, batch) -> (sums, predictions)`; the batch's `mask` bool[b] is False for padding.

    With several seeds, params and model_state are [num_seeds, …]. The sums are then [num_seeds + 1, …]: those of each
    seed, and last those of the ensemble, whose probabilities are the mean of the seeds' probabilities. The predictions
    are None unless `with_predictions`.
    """
    logits_of, link = make_logits(model, augment, views), link_of(loss)

    def eval_step(params: Any, model_state: Any, batch: Batch) -> tuple[metrics.Sums, metrics.AnyPredictions | None]:
        wanted, mask = batch["label" if task is Task.CLASSES else "target"], batch["mask"]

        def sums_of(logits: jax.Array) -> metrics.Sums:
            return metrics.task_sums(logits, wanted, loss(logits, wanted), link, mask, task)

        if num_seeds == 1:
            logits = logits_of(params, model_state, batch["image"])  # [b, classes]
            sums = sums_of(logits)
        else:
            each = jax.vmap(logits_of, (0, 0, None))(params, model_state, batch["image"])  # [num_seeds, b, classes]
            logits = jnp.concatenate([each, link.ensemble(each)[None]])
            sums = jax.vmap(sums_of)(logits)
        if not with_predictions:
            return sums, None
        return sums, metrics.predict(logits, wanted, link, mask, task)

    return eval_step
