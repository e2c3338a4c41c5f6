"""What a config describes, put together: model, loss, optimizer, schedule, steps and the shape of the state."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import diagnose, losses, metrics, step
from imgclf_jax.augment import mixing, ops, tta
from imgclf_jax.core import rng, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, placement, sources
from imgclf_jax.data.stream import Images
from imgclf_jax.models import classifier
from imgclf_jax.models.frozen import Frozen
from imgclf_jax.optim import optimizers, rules, schedules, weight_averages
from imgclf_jax.run.provenance import DataInfo

# Up to so many steps, or bytes of images, go to the device in one call.
_MOST_STEPS, _CHUNK_BYTES = 32, 8 << 20
_FIRST_IMAGES = 5000  # that airbench94 whitens by


def describe(images: Images, loss: str) -> DataInfo:
    """What is recorded of the training images; with how many each class has, where the loss spec asks for them."""
    source = images.source
    counts = sources.class_counts(source).tolist() if losses.needs_class_counts(loss) else ()
    return DataInfo(len(images), images.shape, tuple(source.class_names), source.fingerprint(), tuple(counts))


@dataclass(frozen=True)
class Experiment:
    """The parts that training, evaluation and prediction share; everything follows from the three fields.

    Building a part raises UserError for a spec that names nothing or has arguments that do not fit.
    """

    config: ConfigDict
    data: DataInfo
    mesh: Mesh

    @cached_property
    def total(self) -> int:
        """How many steps the run has."""
        return self.steps("total", self.config.total)

    def steps(self, key: str, duration: str, total: int | None = None) -> int:
        """A duration in whole steps."""
        return configs.steps(duration, key, self.data.train_examples, self.config.batch_size, total)

    def period(self, key: str) -> Any:
        """The period in steps, a fraction, that a cadence key gives; None for never."""
        args = (self.data.train_examples, self.config.batch_size, self.total)
        return configs.period(self.config[key], key, *args)

    @cached_property
    def schedule(self) -> optax.Schedule:
        return schedules.build(self.config.schedule, self._steps_for("schedule"), self.total)

    def _steps_for(self, key: str) -> Callable[[Any], int]:
        return lambda duration: self.steps(key, str(duration), self.total)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizers.build(self.config.optimizer, self.schedule, self.config.clip, self.rules)

    @cached_property
    def average(self) -> weight_averages.Average:
        lookahead = optimizers.split_lookahead(self.config.optimizer)[1]
        return weight_averages.build(self.config.ema, lookahead, self._steps_for("optimizer"), self.total)

    @cached_property
    def rules(self) -> rules.Rules:
        """What the keys of `rules` say of the model's parameters."""
        keys = self.config.rules
        if not (keys.lr or keys.decay or keys.freeze or keys.layer_decay):
            return rules.Rules()
        return rules.build(keys.lr, keys.decay, keys.freeze, keys.layer_decay, list(self.parameters))

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its path, in the order in which the model uses them."""
        found = {}

        def init() -> None:  # flax notes parameters as they come; what leaves a JAX transformation is sorted
            images = jnp.zeros((1, *self.data.image_shape), jnp.float32)
            variables = self.model.init(rng.key(0, "init"), images, train=False)
            found.update({k: v.shape for k, v in traverse_util.flatten_dict(variables["params"], sep="/").items()})

        with self._naming_the_key():
            jax.eval_shape(init)
        return found

    @cached_property
    def model(self) -> classifier.Classifier:
        return classifier.build(self.config.model, len(self.data.class_names), self.config.precision)

    @cached_property
    def loss(self) -> losses.Loss:
        return losses.build(self.config.loss, self.data.class_counts, self.data.class_names)

    @cached_property
    def whole_set_metrics(self) -> dict[str, Callable[..., float]]:
        """Metrics of whole evaluation sets, by name: of labels and probabilities."""
        return metrics.build_whole_set(self.config.metrics)

    @property
    def with_ids(self) -> bool:
        """Whether batches carry the ids and epochs of their examples."""
        return ops.wants_ids(self.config.augment)

    @cached_property
    def views(self) -> tta.Views:
        """What evaluation and prediction average logits over. Raises UserError where the images are too small."""
        views, images = tta.build(self.config.tta), jax.ShapeDtypeStruct((1, *self.data.image_shape), "float32")
        for _, view in views:
            jax.eval_shape(view, images)
        return views

    def init(
        self, seed: jax.Array, images: jax.Array | None = None, weights: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a run starts from and a checkpoint holds: {"state": TrainState, "sums": of the metrics window}.

        `images` are `first_images`; `weights`, by name, are taken instead of random ones. Of several seeds, `seed` and
        those after it, all arrays are [num_seeds, …].
        """

        def init(seed: jax.Array) -> dict[str, Any]:
            shape = self.data.image_shape
            state = step.init_state(self.model, self.optimizer, shape, seed, self.average, images, weights)
            return {"state": state, "sums": step.zero_sums()}

        if self.num_seeds == 1:
            return init(seed)
        runs: dict[str, Any] = jax.vmap(init)(seed + jnp.arange(self.num_seeds, dtype=jnp.uint32))
        return runs

    @property
    def num_seeds(self) -> int:
        """How many replicas are trained at once."""
        return int(self.config.num_seeds)

    def zero_sums(self) -> metrics.Sums:
        """The sums of no step, of every seed, on the devices."""
        sums = step.zero_sums()
        several = (self.num_seeds,) if self.num_seeds > 1 else ()
        return self.put(jax.tree.map(lambda x: jnp.broadcast_to(x, several), sums))

    def first_images(self, images: Images) -> jax.Array | None:
        """The first 5,000 training images, as in evaluation, for a backbone that begins from images; or None."""
        if not hasattr(self.model.backbone, "init_on_images"):
            return None
        ids = np.arange(min(_FIRST_IMAGES, len(images)))
        first = images.read(ids, ids)["image"]
        return jax.jit(lambda images: ops.build(self.config.augment, train=False)(None, images))(first)

    @cached_property
    def _init_jaxpr(self) -> tuple[Any, Any]:
        """(jaxpr, shape) of `init`, traced without computing it."""
        with self._naming_the_key():
            return jax.make_jaxpr(self.init, return_shape=True)(jax.ShapeDtypeStruct((), "uint32"))

    @cached_property
    def shape(self) -> Any:
        """`init`'s result as shapes with shardings, without computing it.

        Raises UserError, naming the key, for a part of the config that fails on such images.
        """
        whole = sharding.replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self._init_jaxpr[1])

    @contextlib.contextmanager
    def _naming_the_key(self) -> Iterator[None]:
        """Traces the parts one by one where tracing the whole fails, so that the error can name a config key."""
        try:
            yield
        except UserError:
            raise
        except Exception:  # what JAX, Flax and Optax raise is of many types
            diagnose.find(self)
            raise

    def put(self, tree: Any) -> Any:
        """A pytree of small arrays, whole on every device."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

    @cached_property
    def steps_per_call(self) -> int:
        """How many steps one call of `train_chunk` runs at most."""
        if self.config.steps_per_call:
            return int(self.config.steps_per_call)
        if jax.default_backend() == "cpu" and "conv_general_dilated" in str(self._init_jaxpr[0]):
            return 1  # inside of a loop XLA:CPU runs its own convolution a hundred times slower
        batch_bytes = self.config.batch_size * self.num_seeds * math.prod(self.data.image_shape)
        gaps = [math.ceil(every) for key in configs.CADENCES if (every := self.period(key)) is not None]
        return max(1, min(_MOST_STEPS, _CHUNK_BYTES // batch_bytes, self.total, *gaps))

    @cached_property
    def lowered_train_chunk(self) -> Any:
        """`train_chunk` before compilation. Raises UserError, naming the key, where the config cannot be traced."""
        frozen = self.rules.frozen
        pure = step.make_train_step(
            Frozen(self.model, frozen, tuple(self.parameters)) if frozen else self.model,
            self.loss, self.optimizer, self.schedule, ops.build(self.config.augment, train=True), self.average,
            mixing.build(self.config.mix), self.config.accumulate,
        )  # fmt: skip
        pure = step.several(pure, self.num_seeds)
        split, size = sharding.sharded(self.mesh), self.steps_per_call

        def train_chunk(state: step.TrainState, sums: metrics.Sums, chunk: Any, steps: jax.Array) -> Any:
            def body(i: jax.Array | int, carry: tuple[step.TrainState, metrics.Sums]) -> Any:
                batch = jax.lax.with_sharding_constraint(placement.batch_at(chunk, i), split)
                state, new = pure(carry[0], batch)
                return state, step.add_sums(carry[1], new)

            # One program for chunks of all lengths, so that no result depends on where a chunk ends.
            return jax.lax.fori_loop(0, steps, body, (state, sums)) if size > 1 else body(0, (state, sums))

        chunk = placement.chunk_shape(
            self.config.data.placement, self.data.train_examples, self.data.image_shape, self.mesh,
            self.config.batch_size, size, self.with_ids, self.num_seeds,
        )  # fmt: skip
        whole = sharding.replicated(self.mesh)
        steps = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        with self._naming_the_key():
            jitted = jax.jit(train_chunk, out_shardings=whole, donate_argnums=0)
            return jitted.lower(self.shape["state"], self.shape["sums"], chunk, steps)

    @cached_property
    def train_chunk(self) -> Any:
        """Compiled (state, sums, chunk, steps) → (state, sums): trains on the chunk's first `steps` batches.

        The sums of those steps are added; the state's buffers are donated. See `placement` for what a chunk is.
        """
        return self.lowered_train_chunk.compile()

    @cached_property
    def eval_batch_size(self) -> int:
        """Examples in a batch of evaluation: padded up to a multiple of the devices, and masked.

        No result depends on it; on CPU small batches, which stay in the caches, are faster.
        """
        most = 128 * self.mesh.size if jax.default_backend() == "cpu" else self.config.batch_size
        return sharding.round_up(max(1, min(self.config.batch_size, most) // len(self.views)), self.mesh)

    @cached_property
    def eval_chunk(self) -> Any:
        """Compiled (params, model_state, chunk, steps) → the sums of each of the chunk's first `steps` batches.

        The chunk is {"image": uint8[k, b, h, w, c], "label": i32[k, b], "mask": bool[k, b]}, k being `steps_per_call`;
        the sums (and predictions, see `step`) are stacked [k, …], zeros after the first `steps`.
        """
        images = ops.build(self.config.augment, train=False)
        pure = step.make_eval_step(
            self.model, self.loss, images, self.views, self.num_seeds, bool(self.whole_set_metrics)
        )
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)

        def eval_chunk(params: Any, model_state: Any, chunk: Any, steps: jax.Array) -> Any:
            def batch_sums(i: jax.Array | int) -> Any:
                batch = jax.lax.with_sharding_constraint(placement.batch_at(chunk, i), split)
                return pure(params, model_state, batch)

            def body(i: jax.Array, out: Any) -> Any:
                return jax.tree.map(lambda all, new: all.at[i].set(new), out, batch_sums(i))

            if size == 1:
                return jax.tree.map(lambda x: x[None], batch_sums(0))
            shapes = jax.eval_shape(batch_sums, 0)
            zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
            return jax.lax.fori_loop(0, steps, body, zeros)

        size = self.steps_per_call
        shapes = {"image": (self.data.image_shape, "uint8"), "label": ((), "int32"), "mask": ((), "bool")}
        chunk = {
            name: jax.ShapeDtypeStruct(
                (size, self.eval_batch_size, *shape), dtype, sharding=sharding.sharded(self.mesh, axis=1)
            )
            for name, (shape, dtype) in shapes.items()
        }
        state, steps = self.shape["state"], jax.ShapeDtypeStruct((), "int32", sharding=whole)
        with self._naming_the_key():
            jitted = jax.jit(eval_chunk, out_shardings=whole)
            return jitted.lower(state.params, state.model_state, chunk, steps).compile()

    @cached_property
    def predict_step(self) -> Any:
        """Jitted (params, model_state, images) → probabilities."""
        images = ops.build(self.config.augment, train=False)
        pure = step.make_predict_step(self.model, images, self.views, self.num_seeds, losses.link_of(self.config.loss))
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        return jax.jit(pure, in_shardings=(whole, whole, split), out_shardings=whole)

    @property
    def preprocess_eval(self) -> str:
        """The host ops of evaluation and prediction."""
        return decode.for_evaluation(self.config.preprocess_eval, self.config.preprocess)

    def eval_images(self, source: Any) -> Images:
        """A source seen through the host ops of evaluation."""
        return Images(source, self.preprocess_eval, self.config.seed, self.config.data.threads)
