"""The train state, and the pure functions of training, evaluation and inference."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct, traverse_util
from flax.core import DenyList

from imgclf_jax import methods, metrics
from imgclf_jax.augment import mixing, tta
from imgclf_jax.core import dtypes, rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, Function, ModelState, Params, PyTree, Variables
from imgclf_jax.losses import SOFTMAX, Link, Loss, Task, link_of
from imgclf_jax.methods import Method, gradients
from imgclf_jax.methods.gradients import Gradient
from imgclf_jax.methods.supervised import from_logits
from imgclf_jax.models.frozen import Frozen, apply_function
from imgclf_jax.optim import weight_averages
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.optim.weight_averages import Average

type Augment = Callable[..., jax.Array]  # (key, images uint8[b, h, w, c]) → f32[b, h, w, c]
Outputs = Literal["predict", "ranked", "logits", "features"]
type Inference = Callable[[Params, ModelState, jax.Array], jax.Array]  # images uint8[b, h, w, c] → f32[b, …]
SOWN = ("losses", "metrics")  # collections that a step reads, and that are not part of the state
PER_STEP = ("grad_norm", "param_norm", "learning_rate")  # summed over steps; all others over examples
NONFINITE_STEP = "nonfinite_step"  # the number of the first such step, not a sum
_OWN_METRICS = (*PER_STEP, NONFINITE_STEP, "steps", "examples", "correct", "loss", "skipped", "accuracy",
                "exact_match", "images_per_second", "input_wait")  # fmt: skip


class TrainState(struct.PyTreeNode):
    """Everything that changes in training. Together with the config it determines every later state."""

    seed: jax.Array  # u32[]; an argument of the program, not a constant, so that one compilation serves all seeds
    step: jax.Array  # i32[], steps done
    skipped: jax.Array  # i32[], how many of them changed nothing: see `make_train_step`
    params: Params
    model_state: ModelState
    opt_state: optax.OptState
    # (params, model_state) to evaluate, such as their EMA; None: evaluate the trained ones
    eval_variables: tuple[Params, ModelState] | None = None

    @property
    def evaluated(self) -> tuple[Params, ModelState]:
        """(params, model_state) for evaluation and inference: `eval_variables` if there are any."""
        return (self.params, self.model_state) if self.eval_variables is None else self.eval_variables


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
    """The state at step 0 for images of `image_shape` (h, w, c). Pure, so it works under `jit` and `eval_shape`.

    - `images` f32[n, h, w, c] are for a backbone that has `init_on_images(params, images) -> params`.
    - `weights` replace random initial values, by path: {"params/head/bias": …, "batch_stats/…": …}.
    - Without `head`, for a method that trains none, the head has no parameters.
    """
    zeros = jnp.zeros((1, *image_shape), jnp.float32)
    kept = DenyList(("intermediates", *SOWN))
    variables = dict(model.init(rng.init_streams(rng.key(seed, "init")), zeros, train=False, mutable=kept))
    if not head:
        variables["params"] = {name: value for name, value in variables["params"].items() if name != "head"}
    if images is not None:
        backbone = model.backbone.init_on_images(variables["params"]["backbone"], images)
        variables["params"] = {**variables["params"], "backbone": backbone}
    if weights:
        variables = tree.map_named(weights.get, variables)  # by default a leaf stays
    params = variables.pop("params")
    return TrainState(
        seed=jnp.uint32(seed),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        eval_variables=average.init((params, variables)),
    )


def make_inputs(
    augment: Augment, mix: mixing.Mix | None = None, method: Method | None = None
) -> Callable[[jax.Array, jax.Array, Batch], Batch]:
    """Returns `inputs(seed u32[], step i32[], batch)`: the batch that a method's loss gets, see `make_train_step`.

    By default it is {"image": f32[b, h, w, c], "label": i32[b], …}, augmented and mixed (see `mixing.mix_batch`). A
    `method` with `inputs` of its own replaces all of this: see `Method`.
    """

    def inputs(seed: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        def augmented(key: jax.Array, images: jax.Array, stream: Batch = batch) -> jax.Array:
            known = (seed, stream["id"], stream["epoch"]) if "id" in stream else ()
            return augment(key, images, *known)  # [b, h, w, c] f32

        if method is not None and method.inputs is not None:
            given = {**batch, "step": jnp.broadcast_to(step, batch["image"].shape[0])}
            with _listing(given):
                return method.inputs(rng.key(seed, "inputs", step), given, augmented)
        out = {**batch, "image": augmented(rng.key(seed, "augment", step), batch["image"])}
        for name, stream in batch.items():
            if isinstance(stream, dict):  # of `data.extra`
                key = rng.fold(rng.key(seed, "augment", step), name)
                out[name] = {**stream, "image": augmented(key, stream["image"], stream)}
        return mixing.mix_batch(mix, rng.key(seed, "mix", step), out)

    return inputs


def make_train_step(
    model: nn.Module | Frozen, method: Method | Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
    augment: Augment, average: Average = weight_averages.NONE, mix: mixing.Mix | None = None, accumulate: int = 1,
    shard: Callable[[PyTree], PyTree] = lambda tree: tree,
    gradient: Callable[[Gradient], Gradient] = lambda gradient: gradient, task: Task = Task.CLASSES,
    link: Link = SOFTMAX, skip_nonfinite: bool = False,
) -> Callable[..., tuple[TrainState, metrics.Sums]]:  # fmt: skip
    """Returns `train_step(state, batch, fixed=None) -> (state, sums)`.

    A batch is {"image": uint8[b, h, w, c], "label": i32[b] or "target": f32[b, k]}, with "id" and "epoch" i32[b] where
    `augment` or the method needs them.

    - `method` is a `Method`, or a loss of logits and labels for supervised learning.
    - `accumulate` is the number of gradient-accumulation microbatches. The gradient is the mean of theirs, which is
      that of the whole batch but for BatchNorm statistics and dropout masks.
    - `shard` constrains gradients and updates to the shardings of their parameters.
    - `gradient` wraps the gradient function of the whole batch: see `methods.gradients`.
    - With `skip_nonfinite`, a step whose loss, gradient norm or parameter norm is not finite adds one to the state's
      `step` and `skipped`, and changes nothing else. Its sums are zero, but for `skipped`.

    The sums over the batch are `loss`, `examples`, `correct` (absent without logits; by the dominant label of a mixed
    example), the method's metrics and those that modules sow into "metrics". Once a step there are `steps`, `grad_norm`
    (before clipping), `param_norm` (after the update), `learning_rate`, and `nonfinite_step`, the number of this step
    if the loss or a norm is not finite, else `metrics.NO_STEP`.
    """
    learned = method if isinstance(method, Method) else from_logits(functools.partial(mixing.batch_loss, method))
    inputs = make_inputs(augment, mix, learned)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(
        params: Params, model_state: ModelState, part: Batch, key: jax.Array, fixed: PyTree
    ) -> tuple[jax.Array, Any]:
        apply = apply_function(learned.loss, model, mutable=[*model_state, *SOWN])
        rngs = {"dropout": key, **rng.init_streams(rng.fold(key, "params"))}  # other streams are drawn from these
        with _listing(part):
            out, changed = apply({"params": params, **model_state}, part, fixed, rngs=rngs)
        sown_losses, sown_metrics = (changed.get(name, {}) for name in SOWN)
        updated = {name: value for name, value in changed.items() if name not in SOWN}
        _refuse_difference("a step changes the model's state", updated, model_state, with_dtype=True)
        return _mean_loss(out, sown_losses, part), (updated, (out.logits, _named_metrics(out.metrics, sown_metrics)))

    def train_step(state: TrainState, batch: Batch, fixed: PyTree = None) -> tuple[TrainState, metrics.Sums]:
        examples = batch["image"].shape[0]
        whole = inputs(state.seed, state.step, batch)

        def grad_fn(*args: PyTree) -> PyTree:
            out, grads = jax.value_and_grad(loss_fn, has_aux=True)(*args, fixed)
            return out, shard(grads)

        def image_gradient(params: Params, model_state: ModelState, part: Batch, key: jax.Array) -> jax.Array:
            def loss_of_images(images: jax.Array) -> jax.Array:
                return loss_fn(params, model_state, {**part, "image": images}, key, fixed)[0] * len(images)

            return jax.grad(loss_of_images)(part["image"])

        plain = Gradient(grad_fn, image_gradient)
        if accumulate > 1:
            gradients.check_examples(whole, batch, accumulate)
            plain = gradients.accumulate(plain, accumulate)
        take_gradient = gradient(plain)
        key = rng.key(state.seed, "dropout", state.step)
        (mean_loss, (model_state, (logits, named))), grads = take_gradient(state.params, state.model_state, whole, key)
        _refuse_difference("gradients that do not fit the parameters", grads, state.params)
        count = state.step - state.skipped  # of updates so far, as in the optimizer's own state
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=mean_loss)
        _refuse_difference("updates of the optimizer that do not fit the parameters", updates, state.params)
        params = optax.apply_updates(state.params, shard(updates))
        (params, model_state), evaluated = average.update(state.eval_variables, (params, model_state), count, opt_state)

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
            "learning_rate": jnp.asarray(promoting(schedule)(count), jnp.float32),
            **{name: value * examples for name, value in named.items()},
            NONFINITE_STEP: jnp.where(finite, jnp.int32(metrics.NO_STEP), state.step),
        }
        new = state.replace(
            step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, eval_variables=evaluated
        )
        if skip_nonfinite:
            new = optax.tree.where(finite, new, state.replace(step=new.step, skipped=state.skipped + 1))
            sums = optax.tree.where(finite, sums, zero_sums(sums)) | {"skipped": (~finite).astype(jnp.int32)}
        return new, sums

    return train_step


@contextlib.contextmanager
def _listing(batch: Batch) -> Iterator[None]:
    """Adds the keys of a batch to a KeyError for another one, which a method may raise inside."""
    try:
        yield
    except KeyError as e:
        if e.args and e.args[0] not in batch:
            e.add_note(f"the batch has the keys {', '.join(map(repr, batch))}")
        raise


def _refuse_difference(what: str, given: PyTree, wanted: PyTree, with_dtype: bool = False) -> None:
    """Raises UserError unless both have the same paths and leaves of the same shape and, with `with_dtype`, dtype.

    Other shapes would be broadcast, and the next step could not run on another state.
    """

    def describe(x: Any) -> str:
        return jax.typeof(x).str_short() if with_dtype else str(list(jnp.shape(x)))

    found, needed = ({name: describe(x) for name, x in tree.named_leaves(one)} for one in (given, wanted))
    for name in {**needed, **found}:
        if (has := found.get(name, "nothing")) != (needs := needed.get(name, "nothing")):
            raise UserError(f"{what}: {name} is {has} instead of {needs}")


def _mean_loss(out: Any, sown: PyTree, part: Batch) -> jax.Array:
    """The mean of a method's losses plus the mean of each sown loss.

    Raises UserError unless `out` is a `Loss` of one value per example, and a sown loss one number, or one per example.
    A model may get several views of the examples, or several streams at once: multiples of the lengths' gcd.
    """
    if not isinstance(out, methods.Loss):
        raise UserError(f"the method's loss returns a {type(out).__name__}; return imgclf_jax.methods.Loss(values)")
    if jnp.ndim(out.values) != 1 or not jnp.issubdtype(jnp.result_type(out.values), jnp.floating):
        raise UserError(f"the method's Loss has {jax.typeof(out.values).str_short()}; return a float for each example")
    examples = math.gcd(*(len(x) for x in jax.tree.leaves(part) if jnp.ndim(x)))
    for name, x in tree.named_leaves(sown):
        if jnp.size(x) != 1 and (jnp.ndim(x) > 1 or len(x) % examples):
            raise UserError(f"the sown loss {name!r} has the shape {list(jnp.shape(x))}; sow f32[] or one number per "
                            "example, f32[b], and outside of nn.scan and nn.vmap, which would stack it")  # fmt: skip
    return functools.reduce(jnp.add, map(jnp.mean, jax.tree.leaves(sown)), jnp.mean(dtypes.upcast(out.values)))


def _named_metrics(named: Mapping[str, jax.Array], sown: PyTree) -> metrics.Sums:
    """The means f32[] of a method's metrics, by name, and of the metrics that modules sow, by path."""
    by_path = traverse_util.flatten_dict(sown, sep="/")
    if both := named.keys() & by_path.keys():
        raise UserError(f"both the method's Loss and a module have the metric {min(both)!r}; rename one")
    means = {}
    for name, values in {**named, **by_path}.items():
        values = values if isinstance(values, tuple) else (values,)  # `sow` appends to a tuple
        if name in _OWN_METRICS or name.endswith("_std"):
            raise UserError(f"a metric is called {name!r}, which every step has, or runs of several seeds; rename it")
        means[name] = jnp.mean(jnp.stack([jnp.mean(jnp.asarray(x).astype(jnp.float32)) for x in values]))
    return means


def _count_correct(logits: jax.Array | None, batch: Batch, link: Link, task: Task) -> metrics.Sums:
    """{"correct": the number of correct predictions}; {} if the task or the method has none.

    Soft targets and mixed examples count by their dominant label, MULTILABEL ones by all classes, at thresholds of 0.5.
    """
    wanted = batch.get("label" if task is Task.CLASSES else "target")
    if logits is None or wanted is None or len(logits) != len(wanted):
        return {}
    if "other" in batch:
        wanted = jnp.where(batch["weight"] >= 0.5, wanted, batch["other"])
    if task is Task.MULTILABEL:
        outputs = link.probabilities(logits)
        correct = jnp.all(((outputs >= 0.5) == (wanted >= 0.5)) & jnp.isfinite(outputs), -1)
    else:
        labels = metrics.dominant_labels(wanted) if task is Task.SOFT else wanted
        correct = metrics.predicted_classes(logits) == labels
    return {"correct": jnp.sum(correct, dtype=jnp.int32)}


def zero_sums(like: metrics.Sums) -> metrics.Sums:
    """The sums of no step, NumPy arrays with these names, shapes and dtypes."""
    return {k: np.full(x.shape, metrics.NO_STEP if k == NONFINITE_STEP else 0, x.dtype) for k, x in like.items()}


def add_sums(a: metrics.Sums, b: metrics.Sums) -> metrics.Sums:
    """Sums over the steps of both; of NONFINITE_STEP the earlier one."""
    return {k: jnp.minimum(a[k], b[k]) if k == NONFINITE_STEP else a[k] + b[k] for k in a}


def over_seeds(train_step: Function, num_seeds: int) -> Function:
    """The train step of `num_seeds` states, [num_seeds, …], and their interleaved batches (see `data.stream`).

    All seeds share the method's `fixed` arrays.
    """

    def step(states: TrainState, batch: Batch, fixed: PyTree) -> PyTree:
        own = jax.tree.map(lambda x: x.reshape(-1, num_seeds, *x.shape[1:]), batch)
        return jax.vmap(train_step, (0, 1, None))(states, own, fixed)

    return step


def _over_models(function: Function, num_seeds: int) -> Function:
    """`function(params, model_state, *rest)`, mapped over the variables of several seeds."""
    if num_seeds == 1:
        return function
    return lambda params, model_state, *rest: jax.vmap(lambda *of: function(*of, *rest))(params, model_state)


def make_logits(model: nn.Module, augment: Augment, views: tta.Views = tta.NONE, num_seeds: int = 1) -> Inference:
    """Returns `logits(params, model_state, images uint8[b, h, w, c]) -> [b, classes]`, averaged over the TTA views.

    With several seeds, params and model_state are [num_seeds, …], and the logits [num_seeds, b, classes].
    """

    def logits(params: Params, model_state: ModelState, images: jax.Array) -> jax.Array:
        def forward(images: jax.Array) -> jax.Array:
            out: Any = model.apply({"params": params, **model_state}, images, train=False)
            return dtypes.upcast(out)

        return tta.mean_logits(views, forward, augment(None, images))

    return _over_models(logits, num_seeds)


def apply_backbone(model: nn.Module, variables: Variables, images: jax.Array) -> jax.Array:
    """The features [b, d] of normalized images f32[b, h, w, c], in evaluation mode."""
    out: jax.Array = nn.apply(lambda model, images: model.backbone(images, train=False), model)(variables, images)
    return out


def make_inference(
    outputs: Outputs, model: nn.Module, augment: Augment, views: tta.Views = tta.NONE, num_seeds: int = 1,
    link: Link = SOFTMAX, calibration: Mapping[str, np.ndarray] | None = None,
) -> Inference:  # fmt: skip
    """Returns `infer(params, model_state, images uint8[b, h, w, c])`, in float32.

    - "predict" gives probabilities [b, classes] by the loss's `link`.
    - "ranked" gives [2, b, classes]: probabilities, and their logits, which order the classes also where rounding
      makes probabilities equal, such as those of a sigmoid above 17.
    - "logits" gives the network's own, [b, classes], averaged over the TTA views; `calibration`, a `scale` and a `bias`
      of logits, [1] or [classes], changes the others.
    - "features" gives what the head gets, [b, d], without TTA.

    With several seeds, params and model_state are [num_seeds, …]. Logits and features then are [num_seeds, b, …],
    probabilities the mean over the seeds, and the logits of "ranked" those of this mean.
    """

    def features(params: Params, model_state: ModelState, images: jax.Array) -> jax.Array:
        variables = {"params": params, **model_state}
        return apply_backbone(model, variables, augment(None, images)).astype(jnp.float32)

    if outputs == "features":
        return _over_models(features, num_seeds)
    logits_of = make_logits(model, augment, views, num_seeds)

    def infer(params: Params, model_state: ModelState, images: jax.Array) -> jax.Array:
        logits = logits_of(params, model_state, images).astype(jnp.float32)
        if outputs == "logits":
            return logits
        if calibration:
            logits = logits * np.float32(calibration["scale"]) + np.float32(calibration["bias"])
        probabilities = link.probabilities(logits)
        if num_seeds > 1:
            probabilities, logits = jnp.mean(probabilities, 0), link.ensemble(logits)
        return jnp.stack([probabilities, logits]) if outputs == "ranked" else probabilities

    return infer


def make_eval_step(
    model: nn.Module, loss: Loss, augment: Augment, views: tta.Views = tta.NONE, num_seeds: int = 1,
    with_predictions: bool = False, task: Task = Task.CLASSES, method: Method | None = None,
) -> Callable[..., tuple[metrics.Sums, metrics.AnyPredictions | None]]:  # fmt: skip
    """Returns `eval_step(params, model_state, batch, fixed=None) -> (sums, predictions)`.

    `batch["mask"]` bool[b] is False for padding. With several seeds, params and model_state are [num_seeds, …], and the
    sums [num_seeds + 1, …]: each seed's, and last the ensemble's, whose probabilities are the mean over the seeds.
    Predictions are None unless `with_predictions`. Sums of `method.evaluate` are by seed, and NaN for the ensemble.
    """
    logits_of, link = make_logits(model, augment, views, num_seeds), link_of(loss)

    def own_sums(params: Params, model_state: ModelState, batch: Batch, fixed: PyTree) -> metrics.Sums:
        if method is None or method.evaluate is None:
            return {}
        given = {**batch, "image": augment(None, batch["image"])}
        variables = {"params": params, **model_state}
        with _listing(given):
            values = nn.apply(method.evaluate, model)(variables, given, fixed)
        for name, x in values.items():
            if jnp.shape(x) != batch["mask"].shape:  # a mean would count the padding
                raise UserError(f"the method's evaluate returns {name!r} of the shape {list(jnp.shape(x))}; return one "
                                f"number per example, {list(batch['mask'].shape)}")  # fmt: skip
        return {metrics.OWN + name: jnp.sum(jnp.where(batch["mask"], dtypes.upcast(x), 0.0))
                for name, x in values.items()}  # fmt: skip

    def eval_step(
        params: Params, model_state: ModelState, batch: Batch, fixed: PyTree = None
    ) -> tuple[metrics.Sums, metrics.AnyPredictions | None]:
        wanted, mask = batch["label" if task is Task.CLASSES else "target"], batch["mask"]

        def sums_of(logits: jax.Array) -> metrics.Sums:
            return metrics.task_sums(logits, wanted, loss(logits, wanted), link, mask, task)

        sums = _over_models(own_sums, num_seeds)(params, model_state, batch, fixed)
        if num_seeds > 1:
            sums = {name: jnp.append(values, jnp.nan) for name, values in sums.items()}
        if method is not None and not method.predicts:
            examples = jnp.sum(mask, dtype=jnp.int32)
            return {"examples": jnp.broadcast_to(examples, (num_seeds + 1,) if num_seeds > 1 else ()), **sums}, None
        logits = logits_of(params, model_state, batch["image"])  # [b, classes] or [num_seeds, b, classes]
        if num_seeds > 1:
            logits = jnp.concatenate([logits, link.ensemble(logits)[None]])
        sums |= sums_of(logits) if num_seeds == 1 else jax.vmap(sums_of)(logits)
        return sums, metrics.predict(logits, wanted, link, mask, task) if with_predictions else None

    return eval_step


def in_parts(eval_step: Function, count: int) -> Function:
    """`eval_step` of each of `count` parts of a batch, one after the other: its results, [count, …].

    Parts at the end that are only padding are not computed, and their results are zero.
    """

    def evaluate(params: Params, model_state: ModelState, batch: Batch, fixed: PyTree = None) -> PyTree:
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        def result(i: jax.Array | int) -> PyTree:
            return eval_step(params, model_state, jax.tree.map(lambda x: x[i], parts), fixed)

        if count == 1:
            return jax.tree.map(lambda x: x[None], result(0))
        none = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(result, 0))
        used = jnp.sum(jnp.any(parts["mask"], 1), dtype=jnp.int32)
        return jax.lax.fori_loop(
            0, used, lambda i, done: jax.tree.map(lambda x, y: x.at[i].set(y), done, result(i)), none
        )

    return evaluate
