"""What a config describes, put together: model, loss, optimizer, schedule, steps and the shape of the state."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import losses, metrics, optim, rng, schedules, sharding, spec, step
from imgclf_jax.data import augment
from imgclf_jax.data.stream import Images
from imgclf_jax.errors import UserError, reason
from imgclf_jax.models import classifier
from imgclf_jax.provenance import DataInfo


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
        return schedules.build(self.config.schedule, self._schedule_steps, self.total)

    def _schedule_steps(self, duration: Any) -> int:
        return self.steps("schedule", str(duration), self.total)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optim.build(self.config.optimizer, self.schedule, self.config.clip)

    @cached_property
    def model(self) -> classifier.Classifier:
        return classifier.build(self.config.model, len(self.data.class_names), self.config.precision)

    @cached_property
    def loss(self) -> losses.Loss:
        return losses.build(self.config.loss)

    def init(self, seed: jax.Array) -> dict[str, Any]:
        """What a run starts from and a checkpoint holds: {"state": TrainState, "sums": of the metrics window}."""
        state = step.init_state(self.model, self.optimizer, self.data.image_shape, seed)
        return {"state": state, "sums": step.zero_sums()}

    def shape(self) -> Any:
        """`init`'s result as shapes with shardings, without computing it.

        Raises UserError, naming the key, for a part of the config that fails on such images.
        """
        config, image_shape = self.config, self.data.image_shape
        images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), "uint8")
        labels = jax.ShapeDtypeStruct((config.batch_size,), "int32")
        logits = jax.ShapeDtypeStruct((config.batch_size, len(self.data.class_names)), "float32")

        def draw(images: jax.Array) -> jax.Array:
            return augment.build(config.augment, train=True)(rng.key(0, "augment"), images)

        def init_and_update(seed: jax.Array) -> dict[str, Any]:
            run = self.init(seed)
            self.optimizer.update(run["state"].params, run["state"].opt_state, run["state"].params)
            return run

        def trace(key: str, function: Callable[..., Any], *args: Any) -> Any:
            try:
                return jax.eval_shape(function, *args)
            except UserError:
                raise
            except Exception as e:  # what JAX, Flax and Optax raise is of many types
                if any(":" in call.name for call in spec.parse(config[key])):
                    raise  # the user's own code: the traceback tells more
                where = f" on images {list(image_shape)}" if key in ("augment", "model") else ""
                raise UserError(f"{key}={config[key]!r} fails{where}: {reason(e)}") from e

        trace("schedule", lambda step: optim.promoting(self.schedule)(step), jax.ShapeDtypeStruct((), "int32"))
        if (drawn := trace("augment", draw, images).shape) != images.shape:
            raise UserError(f"augment={config.augment!r} turns images {list(image_shape)} into {list(drawn[1:])}; "
                            "device ops keep the shape")  # fmt: skip
        zeros = jnp.zeros((1, *image_shape), jnp.float32)
        trace("model", lambda: self.model.init(rng.key(0, "init"), zeros, train=False))
        trace("loss", lambda logits, labels: self.loss(logits, labels), logits, labels)
        shape = trace("optimizer", init_and_update, jax.ShapeDtypeStruct((), "uint32"))
        whole = sharding.replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shape)

    def put(self, tree: Any) -> Any:
        """A pytree of small arrays, whole on every device."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

    @cached_property
    def train_step(self) -> Any:
        """Jitted (state, sums, batch) → (state, sums), the step's sums added; the state's buffers are donated."""
        augment_train = augment.build(self.config.augment, train=True)
        pure = step.make_train_step(self.model, self.loss, self.optimizer, self.schedule, augment_train)

        def train_step(state: step.TrainState, sums: metrics.Sums, batch: step.Batch) -> Any:
            state, new = pure(state, batch)
            return state, step.add_sums(sums, new)

        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        return jax.jit(train_step, in_shardings=(whole, whole, split), out_shardings=whole, donate_argnums=0)

    @cached_property
    def eval_step(self) -> Any:
        """Jitted (params, model_state, batch) → sums."""
        pure = step.make_eval_step(self.model, self.loss, augment.build(self.config.augment, train=False))
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        return jax.jit(pure, in_shardings=(whole, whole, split), out_shardings=whole)

    @cached_property
    def predict_step(self) -> Any:
        """Jitted (params, model_state, images) → probabilities."""
        pure = step.make_predict_step(self.model, augment.build(self.config.augment, train=False))
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        return jax.jit(pure, in_shardings=(whole, whole, split), out_shardings=whole)

    @property
    def preprocess_eval(self) -> str:
        """The host ops of evaluation and prediction."""
        return self.config.preprocess_eval or self.config.preprocess

    def eval_images(self, source: Any) -> Images:
        """A source seen through the host ops of evaluation."""
        return Images(source, self.preprocess_eval, self.config.seed, self.config.data.threads)
