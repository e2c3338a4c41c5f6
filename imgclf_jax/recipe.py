"""What a config says, put together: model, loss, optimizer, schedule, ops, and durations in steps.

A description only: nothing here is compiled, and nothing depends on devices. `programs.py` compiles it.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from imgclf_jax import losses, metrics
from imgclf_jax.augment import mixing, ops, tta
from imgclf_jax.core import rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import extra
from imgclf_jax.methods import Method, Problem, gradients
from imgclf_jax.methods import table as methods
from imgclf_jax.models import classifier
from imgclf_jax.optim import optimizers, rules, schedules, weight_averages
from imgclf_jax.run.provenance import DataInfo


@dataclass(frozen=True)
class Recipe:
    """The parts that training, evaluation and prediction share. All of them follow from the config and the data.

    Building a part raises UserError for a spec that names nothing, or whose arguments do not fit.
    """

    config: ConfigDict
    data: DataInfo
    load: Callable[..., Any] | None = None  # `trained.load_teacher`, for a method that reads another run

    @cached_property
    def total(self) -> int:
        """How many steps the run has."""
        return self.steps("total", self.config.total)

    def steps(self, key: str, duration: str, total: int | None = None) -> int:
        """A duration in whole steps; errors name `key`."""
        return configs.steps(duration, key, self.data.train_examples, self.config.batch_size, total)

    def period(self, key: str) -> Fraction | None:
        """The period in steps that the cadence `key` gives; None for never."""
        size = (self.data.train_examples, self.config.batch_size, self.total)
        return configs.period(self.config[key], key, *size)

    def _steps_for(self, key: str) -> Callable[[Any], int]:
        return lambda duration: self.steps(key, str(duration), self.total)

    @cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        return schedules.build(self.config.schedule, self._steps_for("schedule"), self.total)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, with its schedule, clipping and the rules by parameter."""
        return optimizers.build(self.config.optimizer, self.schedule, self.config.clip, self.rules)

    @cached_property
    def average(self) -> weight_averages.Average:
        """The weights that evaluation uses: an average, or what the optimizer says."""
        lookahead = optimizers.split_lookahead(self.config.optimizer)[1]
        steps = self._steps_for("optimizer")
        return weight_averages.build(self.config.ema, lookahead, steps, self.total, self.optimizer)

    @cached_property
    def rules(self) -> rules.Rules:
        """What the keys of `rules` say about the model's parameters."""
        keys = self.config.rules
        also = self.method.freeze
        if not (keys.lr or keys.decay or keys.freeze or keys.layer_decay or also):
            return rules.Rules()
        return rules.build(keys.lr, keys.decay, keys.freeze, keys.layer_decay, list(self.parameters), also)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its path, in the order in which the model uses them."""
        found = {}

        def init() -> None:  # flax notes parameters in their order; a JAX transformation would return them sorted
            images = jnp.zeros((1, *self.data.image_shape), jnp.float32)
            # Any key: only shapes are kept.
            params = self.model.init(rng.init_streams(jax.random.key(0)), images, train=False)["params"]
            shapes = {tree.join(path): x.shape for path, x in traverse_util.flatten_dict(params).items()}
            found.update({name: shape for name, shape in shapes.items()
                          if self.method.predicts or not name.startswith("head/")})  # fmt: skip

        with classifier.bounded():
            jax.eval_shape(init)
        return found

    @cached_property
    def model(self) -> Any:
        """The linen module that is trained: the backbone and its head, unless the method has another."""
        if self.method.model is None:
            return self._classifier
        return self.method.model(self._classifier.backbone, self._problem)

    @cached_property
    def _classifier(self) -> classifier.Classifier:
        return classifier.build(self.config.model, len(self.data.class_names), self.config.precision)

    @property
    def backbone(self) -> Any:
        """The backbone that the key `model` names, without what a method adds to it."""
        return self._classifier.backbone

    @cached_property
    def method(self) -> Method:
        """What the run learns from a batch. Raises UserError for a key of the config that it would not read."""
        found = methods.build(self.config.method, self._problem)
        methods.check_keys(found, self.config, bool(self.data.target_names))
        return found

    @cached_property
    def _problem(self) -> Problem:
        return Problem(
            classes=len(self.data.class_names), class_names=self.data.class_names, image_shape=self.data.image_shape,
            total=self.total, head_init=self._classifier.head_init, normalization=self.normalization,
            supervised=lambda logits, batch: mixing.batch_loss(self.loss, logits, batch),
            steps=self._steps_for("method"), task=self.task, build_augment=lambda text: ops.build(text, train=True),
            loader=self.load, link=losses.link_of(self.config.loss),
            mix=lambda key, batch: mixing.mix_batch(self.mix, key, batch),
        )  # fmt: skip

    @cached_property
    def gradient(self) -> Callable[[gradients.Gradient], gradients.Gradient]:
        """The functions of the gradient function, composed."""
        return methods.build_gradient(self.config.gradient, self.pixel_range)

    @cached_property
    def loss(self) -> losses.Loss:
        """The loss of each example."""
        return losses.build(self.config.loss, self.data.class_counts, self.data.class_names)

    @cached_property
    def task(self) -> losses.Task:
        """What a run predicts: its loss and its data say it. Raises UserError where the two do not fit."""
        return losses.task_of(self.config.loss, bool(self.data.target_names))

    def augment(self, train: bool) -> Callable[..., jax.Array]:
        """The device ops; without `train` those that draw at random are left out. See `ops.build`."""
        return ops.build(self.config.augment, train)

    @property
    def normalization(self) -> str:
        """The ops of the key `augment` that evaluation applies too, as a spec."""
        return ops.text_of_evaluation(self.config.augment)

    def pixel_range(self) -> tuple[jax.Array, jax.Array]:
        """The least and the greatest value of a pixel in the images that the model is given, see `ops.pixel_range`."""
        return ops.pixel_range(self.config.augment, self.data.image_shape[-1])

    @property
    def supervised(self) -> bool:
        """Whether the method is the default one, which reads images and their labels or targets alone."""
        return methods.is_supervised(self.config.method)

    @property
    def with_ids(self) -> bool:
        """Whether batches carry the ids and epochs of their examples, for a method or an op that wants them."""
        return not self.supervised or ops.wants_ids(self.config.augment)

    @cached_property
    def mix(self) -> mixing.Mix | None:
        """The mixing op on batches; None for none."""
        return mixing.build(self.config.mix, self.task)

    @cached_property
    def views(self) -> tta.Views:
        """The views that evaluation and prediction average logits over. Raises UserError for too small images."""
        views, images = tta.build(self.config.tta), jax.ShapeDtypeStruct((1, *self.data.image_shape), "float32")
        for _, view in views:
            jax.eval_shape(view, images)
        return views

    @cached_property
    def whole_set_metrics(self) -> dict[str, metrics.OfPredictions]:
        """Metrics of whole evaluation sets, by name."""
        return metrics.build_whole_set(self.config.metrics, self.task, self.data.class_names)

    @property
    def num_seeds(self) -> int:
        """How many replicas are trained at once."""
        return int(self.config.num_seeds)


def check_names(config: ConfigDict) -> None:
    """Raises UserError for a spec that names nothing, before data are opened, which may take minutes."""
    extra.check(config)
    classifier.build(config.model, 2, config.precision)
    losses.link_of(config.loss)
    methods.check_name(config.method)
    methods.build_gradient(config.gradient)
    schedules.check_name(config.schedule)
    optimizers.build(config.optimizer, optax.constant_schedule(0.0), config.clip)
    ops.build(config.augment, train=True)
    mixing.build(config.mix)
    tta.build(config.tta)
    metrics.check_names(config.metrics, losses.tasks_of(config.loss))
    if config.checkpoint.best:
        metrics.parse_best(config.checkpoint.best)


def for_arrays(config: ConfigDict, images: np.ndarray, labels: np.ndarray) -> Recipe:
    """The recipe of a config for arrays in memory, for a loop of your own; the keys of `data` are not used.

    `images` are uint8[n, h, w, c], `labels` i32[n] (the classes are 0 to the greatest label) or targets f32[n, k].
    Raises UserError for arrays of other dtypes or shapes.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"images are {images.dtype}{list(images.shape)}; they must be uint8[n, h, w, c]")
    targets = labels.ndim == 2 and np.issubdtype(labels.dtype, np.floating)
    if len(labels) != len(images) or not (targets or (labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer))):
        raise UserError(f"labels are {labels.dtype}{list(labels.shape)} for {len(images)} images; they must be "
                        "integers [n], or floating-point targets [n, k]")  # fmt: skip
    if not len(images):
        raise UserError("there are no images")
    if not targets and labels.min() < 0:
        raise UserError(f"labels are {labels.min()} to {labels.max()}; classes are numbered from 0")
    n, h, w, c = images.shape
    counts = () if targets else tuple(map(int, np.bincount(labels)))
    names = tuple(map(str, range(labels.shape[1] if targets else len(counts))))
    data = DataInfo(n, (h, w, c), names, "", counts)
    return Recipe(config, data)
