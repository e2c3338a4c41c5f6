"""What a run learns from a batch: the loss of a method, the batch that it sees, the module that it trains.

A method is named by the config key `method`. The spec names a function `(problem, **arguments) -> Method`, which runs
outside of any trace. All functions of a `Method` are pure and run inside the compiled step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.losses import SOFTMAX, Link, Task

Batch = dict[str, Any]


class Loss(struct.PyTreeNode):
    """The loss of a batch: `values` f32[n], one per example, whose mean is minimized.

    `logits` f32[b, classes] give the training accuracy; None if the method has none. `metrics` are logged as
    `train/NAME`: f32[b] or f32[] each, averaged over the steps of a log line.
    """

    values: jax.Array
    logits: jax.Array | None = None
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """What a run learns from a batch, as pure functions. All but `loss` default to those of supervised training.

    loss(model, batch, fixed) -> Loss. `model` is the bound linen module, as inside `nn.apply(loss, module)`: call it as
        often as needed, with `train=True`, or use `model.features`, `model.head`, submodules, `make_rng`, `unbind()`.
        What it sows into the collection "losses" is added to the loss, and into "metrics" is logged.
    inputs(key, batch, augment) -> batch that `loss` sees. The given batch holds "image" uint8[b, h, w, c], "label"
        i32[b], "id", "epoch" and "step" i32[b], and a dict of the same for each stream of `data.extra`. `augment(key,
        images, stream=batch)` applies the config's augmentation: f32[b, h, w, c]; `stream` is the batch that holds
        these images. The default augments each stream, and mixes as the key `mix` says.
    mixes: True for a method whose `inputs` calls `problem.mix`, which mixes as the key `mix` says. With other `inputs`
        that key is refused.
    model(backbone, problem) -> linen module to train, called as `module(images, train=…) -> logits [b, classes]`. It
        has submodules `backbone` and `head`, as `Classifier` has. Variables that `__call__` does not use are created in
        it `if self.is_initializing()`. Variables of other collections are state, kept in checkpoints.
    evaluate(model, batch, fixed) -> {name: f32[b]}: reported as means next to the metrics of the task. `batch` has
        "image" f32[b, h, w, c], normalized, and "label".
    fixed: a pytree of arrays that are not trained, such as a teacher's variables, or a function that returns it. A
        function is called in training only, so evaluation needs no teacher.
    freeze: a regular expression. Parameters whose paths match it are frozen, beside those that the key `rules.freeze`
        freezes.
    merge(variables) -> variables of the plain Classifier that computes the same, which `export` writes as
        .safetensors. Without it they are the method's own, less the modules that it adds.
    predicts: False for a method that trains no head: then the model has none, nothing is predicted, evaluation reports
        what `evaluate` gives, and `features` and `probe` use the backbone. Keys that act on predictions are refused.
    """

    loss: Callable[[Any, Batch, Any], Loss]
    inputs: Callable[[jax.Array, Batch, Callable[..., jax.Array]], Batch] | None = None
    model: Callable[[nn.Module, "Problem"], nn.Module] | None = None
    evaluate: Callable[[Any, Batch, Any], Mapping[str, jax.Array]] | None = None
    fixed: Any = None
    predicts: bool = True
    mixes: bool = False
    freeze: str = ""
    merge: Callable[[Any], Any] | None = None

    def load_fixed(self) -> Any:
        """The pytree `fixed`. Call it outside of a trace."""
        return self.fixed() if callable(self.fixed) else self.fixed


@dataclass(frozen=True)
class Problem:
    """What a method may know of its run."""

    classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (h, w, c), as the model sees them
    total: int  # steps of the run
    head_init: Callable[..., Any]  # the initializer of the head's kernel, by the key `model`
    supervised: Callable[[jax.Array, Batch], jax.Array]  # (logits, batch) → f32[b]: the key `loss`, mixing included
    steps: Callable[[str], int]  # a duration such as '5%' or '3 epochs' → whole steps, rounded up
    normalization: str  # the ops of the key `augment` that evaluation applies too
    task: Task  # what the run predicts
    build_augment: Callable[[str], Callable[..., jax.Array]] = field(repr=False)  # such a spec → (key, images) → images
    loader: Callable[..., Any] | None = field(default=None, repr=False)
    link: Link = SOFTMAX  # how logits become probabilities, by the key `loss`
    mix: Callable[[jax.Array, Batch], Batch] = lambda key, batch: batch  # mixes f32 images and labels by the key `mix`

    def load(self, run: str, checkpoint: str = "", trust: bool = False) -> "Teacher":
        """The trained model of another run: a work directory. Nothing is read before an attribute is used.

        `checkpoint` is "best", "latest" or a step. `trust` allows it to import code that its record names.
        """
        return Teacher(self, run, checkpoint, trust)


class Teacher:
    """A trained model as a pure function of its variables. It is read when an attribute is first used.

    `variables` is the pytree to pass as `Method.fixed`, `apply(variables, images f32[b, h, w, c])` returns logits
    f32[b, classes], and `features(variables, images)` returns f32[b, d]. Images are normalized as this run does.
    `link` says how its logits become probabilities. `apply` raises UserError for a run that has no trained head.
    """

    def __init__(self, problem: Problem, run: str, checkpoint: str, trust: bool):
        self._problem, self._run, self._args = problem, run, (run, checkpoint, trust)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._problem.loader is None:
            raise UserError(f"the method reads the run {self._run!r}, and these programs were built without a loader; "
                            "pass load=trained.load_teacher where you build them")  # fmt: skip
        with jax.ensure_compile_time_eval():
            try:
                found = self._problem.loader(self._problem, *self._args)
            except Untrusted as e:
                how = "a method of your own may call problem.load(run, trust=True)"
                raise Untrusted(f"method: {str(e).replace('add --trust', how)}") from e
            except UserError as e:
                raise UserError(f"method: {e}") from e
        self.__dict__.update(found)
        return self.__dict__[name]
