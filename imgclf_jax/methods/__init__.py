"""Training methods: the loss, the inputs and the trained module of a run.

The config key `method` is the spec of a function `(problem, **arguments) -> Method`, which runs outside of any trace.
All functions of a `Method` are pure and run inside the compiled step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, Initializer, PyTree, Variables
from imgclf_jax.losses import SOFTMAX, Link, Task


class Loss(struct.PyTreeNode):
    """The loss of a batch: `values` f32[n], one per example, whose mean is minimized.

    - `logits` f32[b, classes] are for the training accuracy; None if the method has none.
    - `metrics`, f32[b] or f32[] each, are averaged over the steps of a log line and logged as `train/NAME`.
    """

    values: jax.Array
    logits: jax.Array | None = None
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A training method, as pure functions. All fields but `loss` default to supervised learning.

    - `loss(model, batch, fixed) -> Loss`. `model` is the bound linen module, as inside `nn.apply(loss, module)`: call
      it as often as needed, with `train=True`, or use `model.features`, `model.head`, submodules, `make_rng`,
      `unbind()`. Values sown into the collection "losses" are added to the loss; those in "metrics" are logged.
    - `inputs(key, batch, augment) -> batch` makes the batch for `loss`. Its argument holds "image" uint8[b, h, w, c],
      "label" i32[b], "id", "epoch" and "step" i32[b], and a dict of the same for each stream of `data.extra`.
      `augment(key, images, stream=batch)` applies the config's augmentation to images of `stream`: f32[b, h, w, c]. By
      default each stream is augmented and the batch mixed by the key `mix`.
    - `mixes` is True if `inputs` calls `problem.mix`; with other `inputs` the key `mix` is refused.
    - `model(backbone, problem)` returns the linen module to train, called as `module(images, train=…) -> logits
      [b, classes]`, with submodules `backbone` and `head` as in `Classifier`. `__call__` must create variables that it
      does not use `if self.is_initializing()`; a subclass of `Classifier` does so in `init_more(features)`. Variables
      of other collections are state and kept in checkpoints.
    - `evaluate(model, batch, fixed) -> {name: f32[b]}` adds metrics to evaluation, reported as means. `batch` has
      normalized "image" f32[b, h, w, c], and "label".
    - `fixed` is a pytree of untrained arrays, such as a teacher's variables, or a function that returns it. The
      function is called in training only, so evaluation needs no teacher.
    - `freeze` is a regular expression; parameters whose paths match are frozen, in addition to `rules.freeze`.
    - `merge(variables)` returns the variables of an equivalent plain Classifier, for `export` to .safetensors. By
      default `export` drops the modules that the method adds.
    - `predicts` is False for a method that trains no head: the model then has none, evaluation reports only
      `evaluate`, `features` and `probe` use the backbone, and keys that act on predictions are refused.
    """

    loss: Callable[[Any, Batch, PyTree], Loss]  # the bound module of `model` first
    inputs: Callable[[jax.Array, Batch, Callable[..., jax.Array]], Batch] | None = None
    model: Callable[[nn.Module, "Problem"], nn.Module] | None = None
    evaluate: Callable[[Any, Batch, PyTree], Mapping[str, jax.Array]] | None = None
    fixed: PyTree = None
    predicts: bool = True
    mixes: bool = False
    freeze: str = ""
    merge: Callable[[Variables], Variables] | None = None


@dataclass(frozen=True)
class Problem:
    """What a method may use of the run.

    - `classes`, and their `class_names`; `task`, what the run predicts; `image_shape` (h, w, c) of the model's inputs.
    - `supervised(logits f32[b, classes], batch) -> f32[b]` is the key `loss`, mixing included. `link` maps logits to
      probabilities f32[b, classes].
    - `mix(key, batch) -> batch` mixes f32 images and their labels by the key `mix`.
    - `build_augment(spec)` returns `(key, images uint8[b, h, w, c]) -> f32[b, h, w, c]`. `normalization` is the spec of
      those ops of the key `augment` that evaluation applies too.
    - `steps('5%')` is a duration in whole steps, rounded up; `total` is that of the run. `examples` is the size of the
      training split: batch["id"] i32[b] numbers its examples from 0.
    - `head_init`, from the key `model`, initializes the head's kernel f32[d, classes].
    - `load(run)` returns a `Teacher`. `loader`, which it calls, is None in programs that only evaluate.
    """

    classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    head_init: Initializer
    supervised: Callable[[jax.Array, Batch], jax.Array]
    steps: Callable[[str], int]
    normalization: str
    task: Task
    build_augment: Callable[[str], Callable[..., jax.Array]] = field(repr=False)
    loader: Any = field(default=None, repr=False)
    link: Link = SOFTMAX
    mix: Callable[[jax.Array, Batch], Batch] = lambda key, batch: batch
    examples: int = 0

    @property
    def total(self) -> int:
        """The steps of the run."""
        return self.steps("100%")

    def load(self, run: str, checkpoint: str = "", trust: bool = False) -> "Teacher":
        """The trained model of the work directory `run`, read when an attribute is first used.

        `checkpoint` is "best", "latest" or a step. `trust` allows importing code that the run's config names.
        """
        return Teacher(lambda: self.loader(self, run, checkpoint, trust))


class Teacher:
    """A trained model as a pure function of its variables, read when an attribute is first used.

    `variables` is the pytree to pass as `Method.fixed`. `apply(variables, images f32[b, h, w, c])` returns logits
    f32[b, classes], which `link` maps to probabilities, and raises UserError if the run trained no head;
    `features(variables, images)` returns f32[b, d]. Images are normalized as in this run.
    """

    def __init__(self, load: Callable[[], dict[str, Any]]):
        self._load = load

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        with jax.ensure_compile_time_eval():
            try:
                self.__dict__.update(self._load())
            except UserError as e:
                how = "a method of your own may call problem.load(run, trust=True)"
                raise type(e)(f"method: {str(e).replace('add --trust', how)}") from e
        return self.__dict__[name]
