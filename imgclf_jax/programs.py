"""The compiled programs of a recipe (init, train, eval, predict) and the shardings of their arrays on the mesh."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imgclf_jax import datasets, losses, metrics, step
from imgclf_jax.augment import ops
from imgclf_jax.config import selecting_metrics
from imgclf_jax.core import internals, machine, platform, sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.once import once
from imgclf_jax.core.typing import Array, Batch, Function, PyTree
from imgclf_jax.data import decode, placement
from imgclf_jax.data.source import DataInfo
from imgclf_jax.data.stream import Images, StreamSpec
from imgclf_jax.models import norms
from imgclf_jax.models.frozen import Frozen
from imgclf_jax.optim import partition
from imgclf_jax.recipe import Recipe, check_names

_CALL_BYTES = 2**23  # of images, in a call of `eval` on CPU
_FEW = 8  # images, fewer than which `models/cpu/` takes twice as long for as plain XLA operations
_FIRST_IMAGES = 5000  # training images that airbench94 computes its whitening from


def check(config: ConfigDict) -> None:
    """Raises UserError for every mistake that shows before the data are opened."""
    mesh = sharding.make_mesh(text=config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    for name, one in datasets.extra_streams(config).items():
        sharding.check_batch_size(one.batch_size, mesh, config.accumulate, f"data.extra.{name}: batch_size")
    check_names(config)


def programs_for_images(
    config: ConfigDict, images: Images, mesh: Mesh | None = None, load: Function | None = None
) -> "Programs":
    """The programs of a config for these training images, on `mesh` or else on all devices; `load` as for `Recipe`."""
    recipe = Recipe(config, images.describe(losses.needs_class_counts(config.loss)), load)
    return Programs(recipe, mesh or sharding.make_mesh(text=config.mesh))


@dataclass(frozen=True, eq=False)
class Programs:
    """The compiled programs of a recipe on a mesh. Each is compiled once, on first use.

    With `predicting`, evaluation returns the predictions for each example even if no metric of the recipe needs them.
    A `calibration` (see `step.make_inference`) rescales the probabilities of inference, not those of evaluation.
    Tracing raises UserError, naming the key, if a part of the config fails on these images.
    """

    recipe: Recipe
    mesh: Mesh = field(default_factory=sharding.make_mesh)
    predicting: bool = False
    calibration: Mapping[str, np.ndarray] | None = None

    # The mesh and the sharded train state.

    @property
    def platform(self) -> str:
        """The platform of the mesh, for which all programs are traced."""
        return platform.platform_of(self.mesh)

    def compiler_options(self, onednn: bool = False) -> dict[str, bool | str] | None:
        """Compiler options of a program, or of one for oneDNN. XLA reads XLA_FLAGS only once."""
        if self.recipe.config.deterministic and self.platform == "gpu":
            return {"xla_gpu_deterministic_ops": True}
        return platform.ONEDNN_OPTIONS if self._is_plain(onednn and self.recipe.on_onednn) else None

    def _is_plain(self, wanted: bool) -> bool:
        """Whether layers are plain XLA operations on CPU; not of several seeds: `vmap` makes grouped convolutions."""
        return wanted and self.platform == "cpu" and platform.has_onednn() and self.recipe.config.num_seeds == 1

    def caching(self, onednn: bool) -> contextlib.AbstractContextManager[None]:
        """The context to compile a program in: programs on oneDNN stay out of JAX's compilation cache."""
        on_onednn = self._is_plain(onednn and self.recipe.on_onednn)
        return internals.not_cached() if on_onednn else contextlib.nullcontext()

    @contextlib.contextmanager
    def tracing(self, plain: bool = False) -> Iterator[None]:
        """Traces for the mesh's devices. A failure is traced again, part by part, to name the config key at fault.

        With `plain` it is plain XLA operations on CPU, not `models/cpu/`: faster for forward passes and some training.
        """
        target = self.platform, platform.compute_capability_of(self.mesh), self._is_plain(plain)
        matmuls = jax.default_matmul_precision(None if self.platform == "cpu" else self.recipe.config.matmul_precision)
        with platform.tracing_for(*target), self.recipe.naming_the_key(), matmuls:
            yield

    def _init(
        self, seed: jax.Array, images: jax.Array | None = None, weights: Mapping[str, Array] | None = None
    ) -> step.TrainState:
        recipe = self.recipe
        init = functools.partial(step.init_state, recipe.model, recipe.optimizer, recipe.data.image_shape,
                                 average=recipe.average, images=images, weights=weights,
                                 head=recipe.method.predicts)  # fmt: skip
        if recipe.config.num_seeds == 1:
            return init(seed=seed)
        seeds = seed + jnp.arange(recipe.config.num_seeds, dtype=jnp.uint32)
        states: step.TrainState = jax.vmap(lambda seed: init(seed=seed))(seeds)
        return states

    def init_state(
        self, images: np.ndarray | None = None, weights: Mapping[str, Array] | None = None
    ) -> step.TrainState:
        """The train state at step 0: see `step.init_state`. With several seeds all arrays are [num_seeds, …]."""
        if weights:  # no device holds all of them
            shardings = partition.state_shardings(dict(weights), self._axes, self.mesh)
            weights = {name: sharding.put(x, shardings[name]) for name, x in weights.items()}
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shape)
        options = platform.init_options(self.platform) or self.compiler_options()
        with self.tracing():
            jitted = jax.jit(self._init, out_shardings=shardings, compiler_options=options)
            state: step.TrainState = jitted(np.uint32(self.recipe.config.seed), images, weights)
        return state

    @once
    def traced_init(self) -> jax.stages.Traced:
        """The initialization by a seed alone, traced."""
        with self.tracing():
            return jax.jit(self._init).trace(jax.ShapeDtypeStruct((), "uint32"))

    @once
    def state_shape(self) -> step.TrainState:
        """The shapes, dtypes and shardings of `init_state`'s result."""
        leading = int(self.recipe.config.num_seeds > 1)
        state: step.TrainState = self._with_shardings(self.traced_init.out_info, self._axes, leading)
        return state

    def check_size(self) -> None:
        """Raises UserError if the devices use the host's memory and the train state or a batch exceeds it."""
        if self.platform != "cpu":
            return
        config = self.recipe.config
        nbytes = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(self.state_shape))
        machine.require_memory(nbytes, f"the train state of model={config.model!r} with num_seeds={config.num_seeds}")
        images = config.batch_size * config.num_seeds * math.prod(self.recipe.data.image_shape)
        machine.require_memory(5 * images, f"a batch of batch_size={config.batch_size}")  # as uint8 and as float32

    @once
    def _axes(self) -> dict[str, int | None]:
        """The axis along which each parameter is sharded over the mesh's `fsdp`, by path; empty without it."""
        config, parts = self.recipe.config, self.mesh.shape.get("fsdp", 1)
        return partition.build(config.rules.shard, self.recipe.parameters, parts) if parts > 1 else {}

    def _shard(self, tree: PyTree) -> PyTree:
        """Constrains gradients or updates to the shardings of their parameters."""
        if not self._axes:
            return tree
        return jax.lax.with_sharding_constraint(tree, partition.state_shardings(tree, self._axes, self.mesh))

    def first_images(self, images: Images) -> np.ndarray | None:
        """The first 5,000 training images, normalized, for a backbone with `init_on_images`; else None."""
        if not hasattr(self.recipe.model.backbone, "init_on_images"):
            return None
        ids = np.arange(min(_FIRST_IMAGES, len(images)))
        first, augment = images.read(ids, ids)["image"], self.recipe.augment(train=False)
        with self.tracing():
            return np.asarray(jax.jit(lambda images: augment(None, images))(first))

    # Training.

    @property
    def stream(self) -> StreamSpec:
        """The specification of the run's training batches."""
        config, streams = self.recipe.config, datasets.extra_streams(self.recipe.config)
        sizes = tuple((name, streams[name].batch_size) for name in self.recipe.data.extra)
        needs_ids = not self.recipe.supervised or ops.needs_ids(config.augment)
        return StreamSpec(config.seed, config.batch_size, config.num_seeds, needs_ids, extra=sizes)

    def batches(self, images: Images, steps: Iterable[int]) -> Iterator[tuple[int, Batch]]:
        """Yields each step with its batch on the devices."""
        return placement.batches(self.recipe.config.data.placement, images, self.stream, steps, self.mesh)

    @property
    def batch_shape(self) -> Batch:
        """The shapes, dtypes and shardings of a batch."""

        def shape(data: DataInfo, spec: StreamSpec) -> Batch:
            columns = {"id": "int32", "epoch": "int32"} if spec.needs_ids else {}
            return placement.batch_shape(spec.rows, data.image_shape, len(data.target_names), self.mesh, **columns)

        extra = {one.name: shape(self.recipe.data.extra[one.name], one) for one in self.stream.extra_streams}
        return {**shape(self.recipe.data, self.stream), **extra}

    @contextlib.contextmanager
    def _tracing_training(self) -> Iterator[None]:
        config = self.recipe.config
        groups = norms.groups(config.batch_norm, config.batch_size // config.accumulate)
        with self.tracing(self.recipe.on_onednn), norms.statistics_over(groups):
            yield

    @once
    def _train_step(self) -> jax.stages.Wrapped:
        """The jitted train step of all seeds: `(state, batch, fixed) -> (state, sums)`."""
        recipe, frozen = self.recipe, self.recipe.rules.frozen
        with self._tracing_training():
            pure = step.make_train_step(
                Frozen(recipe.model, frozen, tuple(recipe.parameters)) if frozen else recipe.model,
                recipe.method, recipe.optimizer, recipe.schedule, recipe.augment(train=True), recipe.average,
                recipe.mix, recipe.config.accumulate, self._shard, recipe.gradient,
                recipe.task, losses.link_of(recipe.config.loss), recipe.config.on_bad_step == "skip",
            )  # fmt: skip
        num_seeds = recipe.config.num_seeds
        return jax.jit(step.over_seeds(pure, num_seeds) if num_seeds > 1 else pure)

    @once
    def _fixed(self) -> PyTree:
        """The method's arrays that are not trained, on the host; None if there are none."""
        fixed = self.recipe.method.fixed
        return fixed() if callable(fixed) else fixed

    @once
    def fixed(self) -> PyTree:
        """The method's arrays that are not trained, such as a teacher's variables, sharded on the mesh."""
        return jax.tree.map(lambda x, like: sharding.put(x, like.sharding), self._fixed, self.fixed_shape)

    @property
    def fixed_shape(self) -> PyTree:
        """`fixed` as shapes, sharded over the mesh's `fsdp`; the mesh may be of devices that hold no arrays."""
        shapes = jax.eval_shape(lambda x: x, self._fixed)  # float64 of NumPy becomes float32
        named, parts = {name: x.shape for name, x in tree.named_leaves(shapes)}, self.mesh.shape.get("fsdp", 1)
        axes = partition.build("", named, parts) if parts > 1 else {}
        return self._with_shardings(shapes, axes)

    def _with_shardings(self, shapes: PyTree, axes: Mapping[str, int | None], leading: int = 0) -> PyTree:
        shardings = partition.state_shardings(shapes, axes, self.mesh, leading)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    @once
    def shape(self) -> dict[str, PyTree]:
        """The shapes and shardings of a training checkpoint: {"state": TrainState, "sums": since the last log}."""
        fixed = self.fixed_shape  # loads a teacher, so outside of the trace
        with self._tracing_training():
            _, sums = self._train_step.trace(self.state_shape, self.batch_shape, fixed).out_info
        return {"state": self.state_shape, "sums": self._with_shardings(sums, axes={})}

    def zero_sums(self) -> metrics.Sums:
        """The metric sums of no step, for every seed, on the devices."""
        return sharding.put_replicated(step.zero_sums(self.shape["sums"]), self.mesh)

    @once
    def traced_train(self) -> jax.stages.Traced:
        """`train`, traced but not yet lowered. Any machine can lower it for the mesh's platform."""

        def train(state: step.TrainState, sums: metrics.Sums, batch: Batch, fixed: PyTree) -> PyTree:
            state, new = self._train_step(state, batch, fixed)
            return state, step.add_sums(sums, new)

        shapes, options = (self.state_shape, self.shape["sums"]), self.compiler_options(True)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        with self._tracing_training():
            jitted = jax.jit(train, out_shardings=shardings, donate_argnums=0, compiler_options=options)
            return jitted.trace(*shapes, self.batch_shape, self.fixed_shape)

    @once
    def train(self) -> Function:
        """Compiled `(state, sums, batch) -> (state, sums)`: a step. Adds its metrics to `sums`; donates the state."""
        with self.caching(True):
            compiled, fixed = self.traced_train.lower().compile(), self.fixed
        return lambda state, sums, batch: compiled(state, sums, batch, fixed)

    # Evaluation and inference.

    @property
    def eval_batch_size(self) -> int:
        """Examples that evaluation computes at once, a multiple of the device count.

        No result depends on it but for rounding. On CPU small batches are faster, since they fit the caches.
        """
        size = self.recipe.config.batch_size
        size = min(size, 128 * self.mesh.size) if self.platform == "cpu" else size
        return sharding.round_up(max(1, size // len(self.recipe.views)), self.mesh)

    @property
    def eval_call_size(self) -> int:
        """Examples in a call of `eval`; the last call is padded and masked.

        On one CPU device a call computes several small batches: each call costs up to a third of the time of one.
        """
        size = self.eval_batch_size
        batches = _CALL_BYTES // (size * math.prod(self.recipe.data.image_shape)) if self.platform == "cpu" else 1
        return size * (min(max(batches, 1), 8) if self.mesh.size == 1 else 1)

    @once
    def traced_eval(self) -> jax.stages.Traced:
        """`eval`, traced but not yet lowered."""
        recipe, state, options = self.recipe, self.state_shape, self.compiler_options(self._evaluates_forward)
        pure = step.make_eval_step(
            recipe.model, recipe.loss, recipe.augment(train=False), recipe.views, recipe.config.num_seeds,
            self.predicting or bool(recipe.whole_set_metrics), recipe.task, recipe.method,
        )  # fmt: skip
        size, data = self.eval_call_size, recipe.data
        batch = placement.batch_shape(size, data.image_shape, len(data.target_names), self.mesh, mask="bool")
        evaluate = step.in_parts(pure, size // self.eval_batch_size)
        jitted = jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh), compiler_options=options)
        fixed = None if self._evaluates_forward else self.fixed_shape  # so that evaluation loads no teacher
        with self.tracing(self._evaluates_forward and self.recipe.on_onednn):
            traced = jitted.trace(state.params, state.model_state, batch, fixed)
        metrics.reported(traced.out_info[0], recipe.whole_set_metrics)  # refuses names that mean something else
        return traced

    @once
    def eval(self) -> Function:
        """Compiled `(params, model_state, batch) -> (sums, predictions)`: see `step.make_eval_step` and `in_parts`.

        A batch is {"image": uint8[b, h, w, c], "label": i32[b], "mask": bool[b]}.
        """
        with self.caching(self._evaluates_forward):
            compiled, fixed = self.traced_eval.lower().compile(), None if self._evaluates_forward else self.fixed
        return lambda params, model_state, batch: compiled(params, model_state, batch, fixed)

    def check_best(self) -> None:
        """Raises UserError if `checkpoint.best` or `stop` names a metric that evaluation does not report."""
        for key, text in selecting_metrics(self.recipe.config).items():
            names = metrics.reported(self.traced_eval.out_info[0], self.recipe.whole_set_metrics)
            if (kind := text.partition("/")[2]) not in names:
                raise UserError(f"{key}={text!r}: evaluation has no {kind!r}; it has {', '.join(names) or 'no metric'}")

    @property
    def _evaluates_forward(self) -> bool:
        """Whether evaluation is a forward pass; a method's `evaluate` may take gradients."""
        return self.recipe.method.evaluate is None

    def check_predicts(self) -> None:
        """Raises UserError if the run's method trains no head."""
        if not self.recipe.method.predicts:
            raise UserError(f"method={self.recipe.config.method!r} trains no head, so this run predicts nothing; use "
                            "features, probe or export --gives=features, or train a head with init_from")  # fmt: skip

    def pure(self, outputs: step.Outputs) -> step.Inference:
        """The pure function (params, model_state, images) → what `outputs` names: see `step.make_inference`."""
        recipe = self.recipe
        if outputs != "features":
            self.check_predicts()
        parts = recipe.augment(train=False), recipe.views, recipe.config.num_seeds, losses.link_of(recipe.config.loss)
        return step.make_inference(outputs, recipe.model, *parts, self.calibration)

    @once
    def inference(self) -> Callable[[step.Outputs], Function]:
        """`inference(outputs)` is `pure(outputs)`, jitted once."""
        return functools.cache(lambda outputs: self.jitted(self.pure(outputs), forward=True))

    def jitted(self, pure: Function, forward: bool = False) -> Function:
        """Jits a pure function (params, model_state, batch) of all seeds; `forward` if it takes no gradient.

        The batch [b, …] is sharded over the devices, and the results are replicated.
        """
        shape = self.state_shape.params, self.state_shape.model_state

        def infer(*args: PyTree) -> jax.Array:
            with self.tracing(forward and (self.recipe.on_onednn or len(args[-1]) < _FEW)):
                return pure(*args)

        shardings = jax.tree.map(lambda x: x.sharding, shape)
        replicated, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        options = self.compiler_options(forward)
        jitted = jax.jit(infer, in_shardings=(*shardings, split), out_shardings=replicated, compiler_options=options)

        @functools.wraps(jitted)
        def run(*args: PyTree) -> jax.Array:
            with self.caching(forward):  # the first call with each shape compiles
                return jitted(*args)

        return run

    @once
    def host_ops(self) -> decode.HostOps:
        """The preprocessing of evaluation as one function: see `decode.build`."""
        return decode.build(self.preprocess_eval, self.recipe.data.bits)[0]

    @property
    def preprocess_eval(self) -> str:
        """The spec of the preprocessing of evaluation and inference, which is deterministic."""
        return decode.evaluation_spec(self.recipe.config.preprocess_eval, self.recipe.config.preprocess)
