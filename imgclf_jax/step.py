"""The train state and the two pure functions that training and evaluation consist of."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct, traverse_util
from flax.core import DenyList

from imgclf_jax import methods, metrics
from imgclf_jax.augment import mixing, tta
from imgclf_jax.core import rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import SOFTMAX, Link, Loss, Task, at_least_float32, link_of
from imgclf_jax.methods import Method, gradients
from imgclf_jax.methods.gradients import Gradient
from imgclf_jax.methods.supervised import from_logits
from imgclf_jax.models.frozen import Frozen, apply_function
from imgclf_jax.optim import weight_averages
from imgclf_jax.optim.optimizers import promoting, seed_keys
from imgclf_jax.optim.weight_averages import Average

Batch = dict[str, Any]  # of arrays, and of dicts of arrays for further streams
Augment = Callable[..., jax.Array]  # (key, images uint8[b, h, w, c]) → f32[b, h, w, c]
Window = dict[str, jax.Array]  # sums over the steps since the last log, and the first of them that was not finite
SOWN = ("losses", "metrics")  # collections that a step reads and that are no state


class TrainState(struct.PyTreeNode):
    """All that training is a function of: with the config, it determines every later state."""

    seed: jax.Array  # u32[]; a value and not a constant of the program, so one compilation serves all seeds
    step: jax.Array  # i32[], steps done
    params: Any
    model_state: Any  # every other linen collection, such as batch_stats
    opt_state: Any
    ema: Any = None  # (params, model_state) to evaluate, such as averages over the steps; None: those that are trained

    @property
    def evaluated(self) -> tuple[Any, Any]:
        """(params, model_state) that evaluation and prediction use: `ema`, where there is one."""
        return (self.params, self.model_state) if self.ema is None else self.ema


def init_state(
    model: Any,  # a Classifier
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
    average: Average = weight_averages.NONE,
    images: jax.Array | None = None,
    weights: Mapping[str, jax.Array] | None = None,
    head: bool = True,
) -> TrainState:
    """The state at step 0; `image_shape` is (h, w, c). Pure, so it can be jitted or evaluated for its shape.

    `images` f32[n, h, w, c] are for a backbone with a function `init_on_images(params, images) -> params`.
    `weights` are taken instead of random ones, by name: {"params/head/bias": …, "batch_stats/…": …}. Without `head` the
    model's head has no parameters, for methods that train none.
    """
    zeros = jnp.zeros((1, *image_shape), jnp.float32)
    kept = DenyList(("intermediates", *SOWN))
    variables = dict(model.init(rng.key(seed, "init"), zeros, train=False, mutable=kept))
    if not head:
        variables["params"] = {name: value for name, value in variables["params"].items() if name != "head"}
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


def make_inputs(
    augment: Augment, mix: mixing.Mix | None = None, method: Method | None = None
) -> Callable[[jax.Array, jax.Array, Batch], Batch]:
    """`inputs(seed u32[], step i32[], batch)`: what a step gives the loss of its method, see `make_train_step`.

    That is {"image": f32[b, h, w, c], "label": i32[b]}. With `mix` image i keeps the share `weight` f32[b] of its own
    label, and the rest is of `other` i32[b]; a "target" f32[b, k] is mixed. With a `method`, what its `inputs` makes of
    the batch: see `Method`.
    """

    def inputs(seed: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        def augmented(key: jax.Array, images: jax.Array, stream: Batch = batch) -> jax.Array:
            known = (seed, stream["id"], stream["epoch"]) if "id" in stream else ()
            return augment(key, images, *known)  # [b, h, w, c] f32

        if method is not None and method.inputs is not None:
            steps = jnp.broadcast_to(step, batch["image"].shape[0])
            return method.inputs(rng.key(seed, "inputs", step), {**batch, "step": steps}, augmented)
        out = {**batch, "image": augmented(rng.key(seed, "augment", step), batch["image"])}
        for name, stream in batch.items():
            if isinstance(stream, dict):  # of `data.extra`
                key = rng.fold(rng.key(seed, "augment", step), name)
                out[name] = {**stream, "image": augmented(key, stream["image"], stream)}
        return mixing.mix_batch(mix, rng.key(seed, "mix", step), out)

    return inputs


def make_train_step(
    model: nn.Module | Frozen,
    method: Method | Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Augment,
    average: Average = weight_averages.NONE,
    mix: mixing.Mix | None = None,
    accumulate: int = 1,
    shard: Callable[..., Callable[..., Any]] = lambda function, **_: function,
    gradient: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    task: Task = Task.CLASSES,
    link: Link = SOFTMAX,
) -> Callable[..., tuple[TrainState, Window]]:
    """`train_step(state, batch, fixed=None) -> (state, window)`, where batch is {"image": uint8[b, h, w, c], …}.

    `method` is a `Method`, or the loss of the logits and the labels, as in supervised learning. `gradient` wraps the
    gradient function of the whole batch, see `methods.gradients`. Batches have "label" i32[b], or "target" f32[b, k];
    "id" and "epoch" i32[b] where `augment` or the method wants them.

    With `accumulate` microbatches the gradient is the mean of theirs: that of the whole batch, except for layers with
    batch statistics, which see one microbatch at a time, and for dropout's draws. `shard` wraps the gradient function
    of a microbatch: it gathers sharded parameters.

    The window is of this one step. Its sums are `loss`, `examples` and `correct` over the batch, `grad_norm`
    (before clipping), `param_norm` (after the update), `learning_rate` and `steps`, and those of the method and of what
    modules sow into "metrics", times the examples. `nonfinite_step` is the step's number if the loss or a norm is not
    finite, else `metrics.NO_STEP`. `correct` follows from `task` and `link`, and for a mixed image from its dominant
    label. It is missing in regression, and for a method without logits.
    """
    learned = method if isinstance(method, Method) else from_logits(functools.partial(mixing.batch_loss, method))
    inputs = make_inputs(augment, mix, learned)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(params: Any, model_state: Any, part: Batch, key: jax.Array, fixed: Any) -> tuple[jax.Array, Any]:
        apply = apply_function(learned.loss, model, mutable=[*model_state, *SOWN])
        rngs = {"dropout": key, "params": rng.fold(key, "params")}  # other streams of modules are drawn from "params"
        out, changed = apply({"params": params, **model_state}, part, fixed, rngs=rngs)
        losses, sown = (changed.get(name, {}) for name in SOWN)
        model_state = {name: value for name, value in changed.items() if name not in SOWN}
        loss = functools.reduce(jnp.add, map(jnp.mean, jax.tree.leaves(losses)), _mean_loss(out))
        return loss, (model_state, (out.logits, _named_metrics(out.metrics, sown)))

    def image_gradient(params: Any, model_state: Any, part: Batch, key: jax.Array, fixed: Any) -> jax.Array:
        def loss_of_images(images: jax.Array) -> jax.Array:
            return loss_fn(params, model_state, {**part, "image": images}, key, fixed)[0] * len(images)

        return jax.grad(loss_of_images)(part["image"])

    def train_step(state: TrainState, batch: Batch, fixed: Any = None) -> tuple[TrainState, Window]:
        examples = batch["image"].shape[0]
        whole = inputs(state.seed, state.step, batch)
        grad_fn = shard(jax.value_and_grad(loss_fn, has_aux=True), returns_gradients=True)
        take_gradient = gradient(Gradient(
            gradients.accumulated(lambda *args: grad_fn(*args, fixed), accumulate),
            gradients.accumulated_images(lambda *args: shard(image_gradient)(*args, fixed), accumulate),
        ))  # fmt: skip
        key = rng.key(state.seed, "dropout", state.step)
        (mean_loss, (model_state, (logits, named))), grads = take_gradient(state.params, state.model_state, whole, key)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params,
            **take_gradient.extra_arguments(mean_loss, grads, state.model_state, whole, key),
        )  # fmt: skip
        params = optax.apply_updates(state.params, updates)
        (params, model_state), ema = average.update(state.ema, (params, model_state), state.step, opt_state)

        grad_norm = optax.tree.norm(grads)
        param_norm = optax.tree.norm(params)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        sums = {
            "steps": jnp.int32(1),
            "examples": jnp.int32(examples),
            **_count_correct(logits, whole, link, task),
            "loss": mean_loss * examples,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": jnp.asarray(promoting(schedule)(state.step), jnp.float32),
            **{name: value * examples for name, value in named.items()},
            "nonfinite_step": jnp.where(finite, jnp.int32(metrics.NO_STEP), state.step),
        }
        state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema)
        return state, sums

    return train_step


def _mean_loss(out: Any) -> jax.Array:
    """The mean of a method's losses. Raises UserError for what is not a `Loss`, or not one number an example."""
    if not isinstance(out, methods.Loss):
        raise UserError(f"the method's loss returns a {type(out).__name__}; return imgclf_jax.methods.Loss(values)")
    if jnp.ndim(out.values) != 1:
        raise UserError(f"the method's Loss has values of the shape {list(jnp.shape(out.values))}; return one number "
                        "per example, f32[b]")  # fmt: skip
    return jnp.mean(out.values)


def _named_metrics(named: Mapping[str, jax.Array], sown: Any) -> Window:
    """The means f32[] of a method's metrics by name, and of those that modules sow, by their paths."""
    by_path: dict[str, list[jax.Array]] = {}
    for path, value in traverse_util.flatten_dict(sown, sep="/").items():
        by_path[path] = list(value) if isinstance(value, tuple) else [value]  # `sow` appends to a tuple
    found = {**{name: [value] for name, value in named.items()}, **by_path}
    for name, values in found.items():
        if name in _OWN_METRICS:
            raise UserError(f"a metric is called {name!r}, which every step has; rename it")
        if bad := [jnp.shape(x) for x in values if jnp.ndim(x) > 1]:
            raise UserError(f"the metric {name!r} has the shape {list(bad[0])}; give f32[] or one number per example, "
                            "f32[b]")  # fmt: skip
    means = {name: [jnp.mean(jnp.asarray(x).astype(jnp.float32)) for x in values] for name, values in found.items()}
    return {name: jnp.mean(jnp.stack(each)) for name, each in means.items()}


def _count_correct(logits: jax.Array | None, batch: Batch, link: Link, task: Task) -> Window:
    """{"correct": how many examples are predicted right}; {} where there is no such number."""
    wanted = batch.get("label" if task is Task.CLASSES else "target")
    if logits is None or wanted is None or len(logits) != len(wanted):
        return {}
    if "weight" in batch:
        wanted = mixing.main_labels(wanted, batch["weight"])
    correct = metrics.correct(logits, wanted, link, task)
    return {} if correct is None else {"correct": jnp.sum(correct, dtype=jnp.int32)}


OF_STEPS = ("grad_norm", "param_norm", "learning_rate")  # sums over steps; the others are over examples
_OWN_METRICS = (*OF_STEPS, "steps", "examples", "correct", "loss", "nonfinite_step", "accuracy", "images_per_second",
                "input_wait")  # fmt: skip


def zero_window(like: Window) -> Window:
    """An empty window, of these names, shapes and dtypes."""
    return {
        name: jnp.full(x.shape, metrics.NO_STEP if name == "nonfinite_step" else 0, x.dtype) for name, x in like.items()
    }


def join_windows(a: Window, b: Window) -> Window:
    """The sums of both, and the earlier of their steps that were not finite."""
    return {k: jnp.minimum(a[k], b[k]) if k == "nonfinite_step" else a[k] + b[k] for k in a}


def make_logits(model: nn.Module, augment: Augment, views: tta.Views) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """`logits(params, model_state, images uint8[b, h, w, c]) -> [b, classes]`, the mean over the views."""

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:  # uint8[b, h, w, c] → f32[b, classes]
        def of_view(images: jax.Array) -> jax.Array:
            out: Any = model.apply({"params": params, **model_state}, images, train=False)
            return at_least_float32(out)

        return tta.mean_logits(views, of_view, augment(None, images))

    return logits


def several(train_step: Callable[..., Any], num_seeds: int) -> Callable[..., Any]:
    """A train step for `num_seeds` states at once, [num_seeds, …], and their batches side by side (see `stream`).

    The method's `fixed` arrays serve all seeds.
    """
    if num_seeds == 1:
        return train_step

    def step(states: TrainState, batch: Batch, *fixed: Any) -> tuple[TrainState, Window]:
        own = jax.tree.map(lambda x: x.reshape(-1, num_seeds, *x.shape[1:]), batch)
        result: tuple[TrainState, Window] = jax.vmap(train_step, (0, 1, *[None] * len(fixed)))(states, own, *fixed)
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
    method: Method | None = None,
) -> Callable[..., tuple[metrics.Sums, metrics.AnyPredictions | None]]:
    """`eval_step(params, model_state, batch, *fixed) -> (sums, predictions)`; `mask` bool[b] is False for padding.

    With several seeds, params and model_state are [num_seeds, …]. The sums are then [num_seeds + 1, …]: those of each
    seed, and last those of the ensemble, whose probabilities are the mean of the seeds' probabilities. The predictions
    are None unless `with_predictions`. The values of `method.evaluate` have sums of their own; an ensemble has none.
    """
    logits_of, link = make_logits(model, augment, views), link_of(loss)

    def own_sums(params: Any, model_state: Any, batch: Batch, *fixed: Any) -> metrics.Sums:
        if method is None or method.evaluate is None:
            return {}
        given = {**batch, "image": augment(None, batch["image"])}
        variables = {"params": params, **model_state}
        values = nn.apply(method.evaluate, model)(variables, given, *(fixed or (None,)))
        return {metrics.OWN + name: jnp.sum(jnp.where(batch["mask"], x, 0.0)) for name, x in values.items()}

    def eval_step(
        params: Any, model_state: Any, batch: Batch, *fixed: Any
    ) -> tuple[metrics.Sums, metrics.AnyPredictions | None]:
        wanted, mask = batch["label" if task is Task.CLASSES else "target"], batch["mask"]

        def sums_of(logits: jax.Array) -> metrics.Sums:
            return metrics.task_sums(logits, wanted, loss(logits, wanted), link, mask, task)

        several = (0, 0, None, *[None] * len(fixed))
        own = own_sums if num_seeds == 1 else jax.vmap(own_sums, several)
        sums = own(params, model_state, batch, *fixed)
        if num_seeds > 1:
            sums = {name: jnp.append(values, jnp.nan) for name, values in sums.items()}
        if method is not None and not method.predicts:
            examples = jnp.sum(mask, dtype=jnp.int32)
            return {"examples": jnp.broadcast_to(examples, (num_seeds + 1,) if num_seeds > 1 else ()), **sums}, None
        if num_seeds == 1:
            logits = logits_of(params, model_state, batch["image"])  # [b, classes]
            sums |= sums_of(logits)
        else:
            each = jax.vmap(logits_of, (0, 0, None))(params, model_state, batch["image"])  # [num_seeds, b, classes]
            logits = jnp.concatenate([each, link.ensemble(each)[None]])
            sums |= jax.vmap(sums_of)(logits)
        if not with_predictions:
            return sums, None
        return sums, metrics.predict(logits, wanted, link, mask, task)

    return eval_step
