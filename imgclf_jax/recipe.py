"""The objects that a config describes: model, loss, optimizer, schedule, ops, and durations in steps.

Nothing here is compiled or depends on devices. `programs.py` compiles a recipe for a mesh.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import datasets, losses, metrics
from imgclf_jax.augment import mixing, ops, tta
from imgclf_jax.core import rng, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Function
from imgclf_jax.data import sampling
from imgclf_jax.data.source import DataInfo, Source
from imgclf_jax.losses import Task
from imgclf_jax.methods import Method, Problem, gradients
from imgclf_jax.methods import table as methods
from imgclf_jax.models import classifier
from imgclf_jax.optim import optimizers, rules, schedules, weight_averages
from imgclf_jax.run import ranking
from imgclf_jax.run.provenance import raised_in_user_code

_EXPLAINED = {  # what the type or message of an error in user code has, and what to change
    "UnexpectedTracerError": "keeps an array of one trace for another; return it, or use a linen variable",
    "ModifyScopeVariableError": "changes a variable in evaluation too; set use_running_average=not train",
    "must be passed to the": "calls a layer without the mode that it needs; pass it as NAME=not train",
}


class _built[T](cached_property[T]):
    """A cached property whose arrays are never tracers, also if a trace is the first to ask for it."""

    def __get__(self, instance: object, owner: type | None = None) -> T:  # type: ignore[override]
        with jax.ensure_compile_time_eval():
            return super().__get__(instance, owner)


@dataclass(frozen=True)
class Recipe:
    """Everything that training, evaluation and prediction build from a config and the facts of its data.

    Each property raises UserError for a spec that names nothing or has unfit arguments.
    """

    config: ConfigDict
    data: DataInfo
    load: Function | None = None  # `trained.load_teacher`, for a method that loads another run

    @cached_property
    def total(self) -> int:
        """The number of steps of the run."""
        return self.steps("total", self.config.total)

    def steps(self, key: str, duration: str, total: int | None = None) -> int:
        """A duration in whole steps; errors name `key`."""
        return configs.steps(str(duration), key, self.data.train_examples, self.config.batch_size, total)

    def period(self, key: str) -> Fraction | None:
        """The period of the cadence `key` in steps; None for never."""
        return configs.period(self.config[key], key, self.data.train_examples, self.config.batch_size, self.total)

    @contextlib.contextmanager
    def naming(self, key: str) -> Iterator[None]:
        """Context manager or decorator: raises UserError that names `key` for an error in what the key builds.

        Errors raised in the user's own code pass unchanged, since the user needs their traceback.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # JAX, Flax and Optax raise many types
            if self.own_code and raised_in_user_code(e):  # also of another key, such as a schedule in the optimizer
                raise
            shape = list(self.data.image_shape)
            raise UserError(f"{key}={self.config[key]!r} fails on images {shape}: {reason(e)}") from e

    @property
    def own_code(self) -> str:
        """The keys of the traced program that name the user's code, such as "model='my:Net' or mix='my:mix'"; or ""."""
        keys = ("method", "gradient", "model", "augment", "mix", "tta", "loss", "optimizer", "schedule")
        return " or ".join(f"{key}={self.config[key]!r}" for key in keys if spec.names_code(self.config[key]))

    @contextlib.contextmanager
    def naming_the_key(self) -> Iterator[None]:
        """Raises UserError naming the config key at fault if tracing fails inside, but outside of every `naming`.

        That key is `model` or `method`, or one whose user code returned something unfit. Errors raised in user code
        pass unchanged.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # JAX, Flax and Optax raise many types
            known = [text for part, text in _EXPLAINED.items() if part in f"{type(e).__name__}: {e}"]
            if self.own_code and known:
                raise UserError(f"{self.own_code} {known[0]} ({reason(e).partition('. ')[0]})") from e
            for key, model in (("model", self.plain_model), ("method", self.model)):
                init = functools.partial(model.init, rng.init_streams(jax.random.key(0)), train=False)
                jax.eval_shape(self.naming(key)(init), jax.ShapeDtypeStruct((1, *self.data.image_shape), "float32"))
            if self.own_code and not raised_in_user_code(e):
                raise UserError(f"{self.own_code} returns something that the step cannot use: {reason(e)}") from e
            raise

    @_built
    def schedule(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        steps = functools.partial(self.steps, "schedule", total=self.total)
        return self.naming("schedule")(schedules.build(self.config.schedule, steps, self.total))

    @_built
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, with its schedule, clipping and parameter rules."""
        built = optimizers.build(self.config.optimizer, self.schedule, self.config.clip, self.rules)
        named = optax.GradientTransformationExtraArgs(*map(self.naming("optimizer"), built))
        evaluated = weight_averages.evaluated_by(built)
        return weight_averages.with_evaluated(named, evaluated) if evaluated else named

    @_built
    def average(self) -> weight_averages.Average:
        """The weight average that evaluation uses: an EMA, or what the optimizer maintains."""
        lookahead = optimizers.split_lookahead(self.config.optimizer)[1]
        return weight_averages.build(self.config.ema, lookahead, self.total, self.optimizer)

    @cached_property
    def rules(self) -> rules.Rules:
        """The `rules` of the config, resolved against the model's parameters."""
        keys = self.config.rules
        also_frozen = self.method.freeze
        if not (keys.lr or keys.decay or keys.freeze or keys.layer_decay or also_frozen):
            return rules.Rules()
        return rules.build(keys.lr, keys.decay, keys.freeze, keys.layer_decay, list(self.parameters), also_frozen)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by path, in the order in which the model creates them."""
        shapes = {}

        def init(rngs: dict[str, jax.Array], images: jax.Array) -> None:
            # As a side effect, since a JAX transformation would return sorted dicts.
            variables = self.model.init(rngs, images, train=False)
            for path, x in traverse_util.flatten_dict(variables["params"]).items():
                if self.method.predicts or path[0] != "head":
                    shapes["/".join(map(str, path))] = x.shape

        # The inputs are traced, since inside `_built` JAX computes what follows from constants, operation by operation.
        images = jax.ShapeDtypeStruct((1, *self.data.image_shape), jnp.float32)
        self.naming_the_key()(jax.eval_shape)(init, rng.init_streams(jax.random.key(0)), images)  # any key: only shapes
        return shapes

    @_built
    def model(self) -> Any:
        """The linen module to train: the backbone and its head, or the method's own model."""
        make = self.method.model
        return make(self.plain_model.backbone, self._problem) if make else self.plain_model

    @_built
    def plain_model(self) -> classifier.Classifier:
        """The backbone that the key `model` names, and its head, without any additions of the method."""
        return classifier.build(self.config.model, len(self.data.class_names), self.config.precision)

    @_built
    def method(self) -> Method:
        """What the run learns from a batch. Raises UserError for a config key that the method would ignore."""
        with self.naming("method"):
            method = methods.build(self.config.method, self._problem)
        _check_keys(method, self.config, bool(self.data.target_names))
        return method if self.supervised else replace(method, loss=self.naming("method")(method.loss))

    @cached_property
    def _problem(self) -> Problem:
        return Problem(
            classes=len(self.data.class_names), class_names=self.data.class_names, image_shape=self.data.image_shape,
            head_init=self.plain_model.head_init, normalization=ops.evaluation_spec(self.config.augment),
            supervised=lambda logits, batch: mixing.batch_loss(self.loss, logits, batch),
            steps=functools.partial(self.steps, "method", total=self.total), task=self.task,
            build_augment=lambda text: ops.build(text, train=True), loader=self.load,
            link=losses.link_of(self.config.loss),
            mix=lambda key, batch: mixing.mix_batch(self.mix, key, batch), examples=self.data.train_examples,
        )  # fmt: skip

    @_built
    def gradient(self) -> Callable[[gradients.Gradient], gradients.Gradient]:
        """The gradient transforms, composed."""
        return methods.build_gradient(self.config.gradient, self.pixel_range)

    @_built
    def loss(self) -> losses.Loss:
        """The loss: see `losses`."""
        return self.naming("loss")(losses.build(self.config.loss, self.data.class_counts, self.data.class_names))

    @cached_property
    def task(self) -> Task:
        """What the run predicts, by its loss and data."""
        if not self.data.target_names:
            return Task.CLASSES
        return Task.MULTILABEL if losses.link_of(self.config.loss) == losses.SIGMOID else Task.SOFT

    def augment(self, train: bool) -> Callable[..., jax.Array]:
        """The device ops; without `train`, only the deterministic ones. See `ops.build`."""
        return self.naming("augment")(ops.build(self.config.augment, train))

    def pixel_range(self) -> tuple[jax.Array, jax.Array]:
        """The least and greatest pixel values of the model's input: see `ops.pixel_range`."""
        return ops.pixel_range(self.config.augment, self.data.image_shape[-1])

    @property
    def supervised(self) -> bool:
        """Whether the method is the default one, which reads only images and their labels or targets."""
        return spec.parse_one(self.config.method).name == "supervised"

    @_built
    def mix(self) -> mixing.Mix | None:
        """The mixing op on batches, or None."""
        mix = mixing.build(self.config.mix)
        return mix and self.naming("mix")(mix)

    @cached_property
    def views(self) -> tta.Views:
        """The TTA views of evaluation and prediction."""
        return tta.build(self.config.tta)

    @_built
    def whole_set_metrics(self) -> dict[str, metrics.WholeSetMetric]:
        """The metrics computed from the predictions of a whole evaluation set, by name."""
        return metrics.build_whole_set(self.config.metrics, self.task)

    @property
    def on_onednn(self) -> bool:
        """Whether oneDNN computes the network on CPU: unless the backbone says False."""
        return bool(getattr(self.model.backbone, "on_onednn", True))


def _check_keys(method: Method, config: ConfigDict, has_targets: bool) -> None:
    """Raises UserError if a config key is set that the method ignores: `mix`, `metrics`, `tta` or `loss`."""
    if config.mix and method.inputs and not method.mixes:
        raise UserError(f"mix={config.mix!r}: method={config.method!r} makes its own batches and does not mix them; "
                        "leave mix empty, or call problem.mix in `inputs` of a Method(…, mixes=True)")  # fmt: skip
    has_name = spec.parse_one(config.loss).name if has_targets else configs.KEYS["loss"][0]  # for the kind of targets
    for key, value in {"metrics": "", "tta": "", "loss": has_name}.items():
        if not method.predicts and config[key] != value:
            raise UserError(f"{key}={config[key]!r}: method={config.method!r} trains no head, so it makes no "
                            f"predictions and has a loss of its own; leave {key}={value!r}")  # fmt: skip


def check_names(config: ConfigDict) -> None:
    """Raises UserError for a spec that names nothing. Needs no data, which may take minutes to open."""
    datasets.extra_streams(config)
    sampling.bind(config.data.sampling)
    classifier.build(config.model, 2, config.precision)
    losses.link_of(config.loss)
    spec.bind(spec.parse_one(config.method), methods.METHODS, "method", leading=("problem",))
    methods.build_gradient(config.gradient)
    schedules.bind(config.schedule)
    optimizers.build(config.optimizer, optax.constant_schedule(0.0), config.clip)
    ops.build(config.augment, train=True)
    mixing.build(config.mix)
    tta.build(config.tta)
    for call in spec.parse(config.metrics):
        spec.lookup(call, metrics.WHOLE_SET, "metric")
    for key, text in configs.selecting_metrics(config).items():
        ranking.parse_best(text, key)


def for_arrays(config: ConfigDict, images: np.ndarray, labels: np.ndarray) -> Recipe:
    """Returns the recipe of a config for arrays in memory, for your own training loop. It ignores the `data` keys.

    `images` are uint8[n, h, w, c], `labels` i32[n], from 0 to the number of classes - 1, or targets f32[n, k]. Raises
    UserError for arrays of other dtypes or shapes.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"images are {images.dtype}{list(images.shape)}; pass uint8[n, h, w, c]")
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=0)) + 1
    names = tuple(map(str, range(classes)))
    source = Source(len(images), lambda ids: {"image": images[ids]}, names, "", labels)  # which checks the labels
    counts = () if source.target_names else tuple(map(int, np.bincount(labels)))
    n, h, w, c = images.shape
    return Recipe(config, DataInfo(n, (h, w, c), names, "", counts, target_names=source.target_names))
