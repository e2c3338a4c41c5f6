"""What is compiled of a recipe: init, train, eval and predict, and how their arrays lie on the mesh.

Every program is traced for the platform of the mesh (`core/platform.py`), so that a mesh of devices that are not here
serves as well: such a program can be lowered or compiled, if not run.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imgclf_jax import diagnose, losses, step
from imgclf_jax.core import platform, sharding
from imgclf_jax.core.once import once
from imgclf_jax.data import decode, placement
from imgclf_jax.data.stream import Images, StreamSpec
from imgclf_jax.models.cpu.rewrite import rewrite
from imgclf_jax.models.frozen import Frozen
from imgclf_jax.recipe import Recipe

log = logging.getLogger(__name__)

# Up to so many steps, or bytes of images, go to the devices as one chunk, unless `steps_per_call` says otherwise.
_MOST_STEPS, _CHUNK_BYTES = 32, 8 << 20
_FIRST_IMAGES = 5000  # that airbench94 whitens by


def of_images(config: ConfigDict, images: Images) -> "Programs":
    """The programs of a config for these training images, on all devices."""
    return Programs(Recipe(config, images.describe(losses.needs_class_counts(config.loss))))


@dataclass(frozen=True, eq=False)
class Programs:
    """The compiled programs of a recipe on a mesh. Each is compiled once, when it is first asked for.

    Tracing raises UserError, naming the key, for a part of the config that fails on such images.
    """

    recipe: Recipe
    mesh: Mesh = field(default_factory=sharding.make_mesh)

    @property
    def platform(self) -> str:
        """The platform of the mesh, which all programs are traced for."""
        return platform.of(self.mesh)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Inside, what is traced is for the mesh's platform, and what fails is traced again to name the config key."""
        with platform.tracing_for(self.platform), diagnose.naming_the_key(self.recipe):
            yield

    # What a run starts from.

    def _init(
        self, seed: jax.Array, images: jax.Array | None = None, weights: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        def init(seed: jax.Array) -> dict[str, Any]:
            recipe, shape = self.recipe, self.recipe.data.image_shape
            state = step.init_state(recipe.model, recipe.optimizer, shape, seed, recipe.average, images, weights)
            return {"state": state, "sums": step.zero_window()}

        if self.recipe.num_seeds == 1:
            return init(seed)
        runs: dict[str, Any] = jax.vmap(init)(seed + jnp.arange(self.recipe.num_seeds, dtype=jnp.uint32))
        return runs

    def init(
        self, seed: int | None = None, images: jax.Array | None = None, weights: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a run starts from and a checkpoint holds: {"state": TrainState, "sums": the `step.Window`}.

        `seed` is the config's unless given. `images` are `first_images`; `weights`, by name, are taken instead of
        random ones. Of several seeds, `seed` and those after it, all arrays are [num_seeds, …].
        """
        seed = self.recipe.config.seed if seed is None else seed
        with self.tracing():
            run: dict[str, Any] = self._jitted_init(np.uint32(seed), images, weights)
        return run

    @once
    def _jitted_init(self) -> Any:
        return jax.jit(self._init, out_shardings=sharding.replicated(self.mesh))

    @once
    def traced_init(self) -> Any:
        """`init` before it is lowered and compiled, without weights from elsewhere."""
        wants, data = hasattr(self.recipe.model.backbone, "init_on_images"), self.recipe.data
        images = (min(_FIRST_IMAGES, data.train_examples), *data.image_shape)
        seed = jax.ShapeDtypeStruct((), "uint32", sharding=sharding.replicated(self.mesh))
        with self.tracing():
            return self._jitted_init.trace(seed, jax.ShapeDtypeStruct(images, "float32") if wants else None, None)

    @once
    def shape(self) -> dict[str, Any]:
        """`init`'s result as shapes with shardings, without computing it."""
        whole = sharding.replicated(self.mesh)
        with self.tracing():
            shapes = jax.eval_shape(self._init, jax.ShapeDtypeStruct((), "uint32"))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def zero_window(self) -> step.Window:
        """The window of no step, of every seed, on the devices."""
        several = (self.recipe.num_seeds,) if self.recipe.num_seeds > 1 else ()
        return self.put(jax.tree.map(lambda x: jnp.broadcast_to(x, several), step.zero_window()))

    def first_images(self, images: Images) -> jax.Array | None:
        """The first 5,000 training images, as in evaluation, for a backbone that begins from images; or None."""
        if not hasattr(self.recipe.model.backbone, "init_on_images"):
            return None
        ids = np.arange(min(_FIRST_IMAGES, len(images)))
        first, augment = images.read(ids, ids)["image"], self.recipe.augment(train=False)
        with self.tracing():
            return jax.jit(lambda images: augment(None, images))(first)

    def put(self, tree: Any) -> Any:
        """A pytree of small arrays, whole on every device."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

    # Training.

    @property
    def stream(self) -> StreamSpec:
        """Which batches the run trains on."""
        recipe = self.recipe
        return StreamSpec(recipe.config.seed, recipe.config.batch_size, recipe.num_seeds, recipe.with_ids)

    def chunks(self, images: Images, ranges: Iterable[range]) -> Iterator[tuple[range, Any]]:
        """Each range of steps, of at most `steps_per_call`, with its chunk on the devices."""
        place = self.recipe.config.data.placement
        return placement.train_chunks(place, images, self.stream, ranges, self.steps_per_call, self.mesh)

    def chunk_shape(self, size: int) -> Any:
        """The shapes, dtypes and shardings of a chunk of `size` steps."""
        place, data = self.recipe.config.data.placement, self.recipe.data
        return placement.chunk_shape(place, data.train_examples, data.image_shape, self.stream, size, self.mesh)

    @once
    def train_step(self) -> Any:
        """The traced train step of all seeds, whose `jaxpr` is of (state, batch) → (state, window)."""
        recipe = self.recipe
        with self.tracing():
            frozen = recipe.rules.frozen
            pure = step.make_train_step(
                Frozen(recipe.model, frozen, tuple(recipe.parameters)) if frozen else recipe.model,
                recipe.loss, recipe.optimizer, recipe.schedule, recipe.augment(train=True), recipe.average,
                recipe.mix, recipe.config.accumulate,
            )  # fmt: skip
            batch = jax.eval_shape(lambda chunk: placement.batch_at(chunk, 0), self.chunk_shape(1))
            return jax.jit(self._in_its_form(step.several(pure, recipe.num_seeds))).trace(self.shape["state"], batch)

    @once
    def _in_loop(self) -> bool:
        """Whether a call of `train` is a loop over steps; else it is one step.

        It follows from the train step and its batch alone. So all calls of a run are of one program, whatever is asked
        for with `steps_per_call`, and wherever something is due.
        """
        return self._steps_in_chunk > 1 and not platform.slow_in_loops(self.train_step.jaxpr, self.platform)

    @property
    def _steps_in_chunk(self) -> int:
        """How many batches a chunk holds at most; one if they are large."""
        return _CHUNK_BYTES // (self.stream.rows * math.prod(self.recipe.data.image_shape)) or 1

    def _in_its_form(self, pure: Callable[..., Any]) -> Callable[..., Any]:
        """A pure function, differentiated by now, as the platform runs it fast."""
        return rewrite(pure) if self.platform == "cpu" else pure

    @once
    def steps_per_call(self) -> int:
        """How many steps one call of `train` runs at most. No result depends on it."""
        asked = int(self.recipe.config.steps_per_call)
        if not self._in_loop:
            if asked > 1:
                log.warning(
                    "steps_per_call=%d: a call runs one step, since %s", asked,
                    "a batch is large" if self._steps_in_chunk == 1
                    else "XLA's own convolution is slow inside of a loop on CPU"
                )  # fmt: skip
            return 1
        return asked or max(1, min(_MOST_STEPS, self._steps_in_chunk, self.recipe.total))

    @once
    def traced_train(self) -> Any:
        """`train` before it is lowered and compiled: it can be lowered for the mesh's platform on any machine."""
        split, whole = sharding.sharded(self.mesh), sharding.replicated(self.mesh)
        train_step = jax.extend.core.jaxpr_as_fun(self.train_step.jaxpr)  # traced above, not once more

        def one_step(i: jax.Array | int, chunk: Any, state: step.TrainState, window: step.Window) -> Any:
            batch = jax.lax.with_sharding_constraint(placement.batch_at(chunk, i), split)
            # The step is compiled apart from the reading of its batch, in which programs differ. The step's number is
            # there since XLA moves a barrier out of the loop if what it holds is the same in each step: that of a
            # chunk of one step is.
            batch, _ = jax.lax.optimization_barrier((batch, state.step))
            leaves = train_step(*jax.tree.leaves((state, batch)))
            state, new = jax.tree.unflatten(self.train_step.out_tree, leaves)
            return state, step.join_windows(window, new)

        def train(state: step.TrainState, window: step.Window, chunk: Any, steps: jax.Array) -> Any:
            if not self._in_loop:
                return one_step(0, chunk, state, window)
            return jax.lax.fori_loop(0, steps, lambda i, carry: one_step(i, chunk, *carry), (state, window))

        steps = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        with self.tracing():
            jitted = jax.jit(train, out_shardings=whole, donate_argnums=0)
            return jitted.trace(self.shape["state"], self.shape["sums"], self.chunk_shape(self.steps_per_call), steps)

    @once
    def train(self) -> Any:
        """Compiled (state, window, chunk, steps) → (state, window): trains on the chunk's first `steps` batches.

        The window of those steps is joined to the one given; the state's buffers are donated. See `placement` for what
        a chunk is.
        """
        return self.traced_train.lower().compile()

    # Evaluation and prediction.

    @property
    def eval_batch_size(self) -> int:
        """Examples in a batch of evaluation: padded up to a multiple of the devices, and masked.

        No result depends on it. On CPU small batches, which stay in the caches, are faster.
        """
        batch_size = self.recipe.config.batch_size
        most = 128 * self.mesh.size if self.platform == "cpu" else batch_size
        return sharding.round_up(max(1, min(batch_size, most) // len(self.recipe.views)), self.mesh)

    @once
    def traced_eval(self) -> Any:
        """`eval` before it is lowered and compiled."""
        recipe, size = self.recipe, self.steps_per_call
        pure = step.make_eval_step(
            recipe.model, recipe.loss, recipe.augment(train=False), recipe.views, recipe.num_seeds,
            bool(recipe.whole_set_metrics),
        )  # fmt: skip
        pure = self._in_its_form(pure)
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)

        def eval(params: Any, model_state: Any, chunk: Any, steps: jax.Array) -> Any:
            def batch_sums(i: jax.Array | int) -> Any:
                batch = jax.lax.with_sharding_constraint(placement.batch_at(chunk, i), split)
                batch, _ = jax.lax.optimization_barrier((batch, i))  # apart from its reading, as in training
                return pure(params, model_state, batch)

            def body(i: jax.Array, out: Any) -> Any:
                return jax.tree.map(lambda all, new: all.at[i].set(new), out, batch_sums(i))

            if not self._in_loop:
                return jax.tree.map(lambda x: x[None], batch_sums(0))
            shapes = jax.eval_shape(batch_sums, 0)
            zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
            return jax.lax.fori_loop(0, steps, body, zeros)

        chunk = placement.eval_chunk_shape(recipe.data.image_shape, self.eval_batch_size, size, self.mesh)
        state, steps = self.shape["state"], jax.ShapeDtypeStruct((), "int32", sharding=whole)
        with self.tracing():
            return jax.jit(eval, out_shardings=whole).trace(state.params, state.model_state, chunk, steps)

    @once
    def eval(self) -> Any:
        """Compiled (params, model_state, chunk, steps) → the sums of each of the chunk's first `steps` batches.

        The chunk is {"image": uint8[k, b, h, w, c], "label": i32[k, b], "mask": bool[k, b]}, k being `steps_per_call`;
        the sums (and predictions, see `step`) are stacked [k, …], zeros after the first `steps`.
        """
        return self.traced_eval.lower().compile()

    @once
    def predict(self) -> Any:
        """Jitted (params, model_state, images) → probabilities."""
        recipe = self.recipe
        pure = step.make_predict_step(
            recipe.model, recipe.augment(train=False), recipe.views, recipe.num_seeds,
            losses.link_of(recipe.config.loss),
        )  # fmt: skip
        whole, split = sharding.replicated(self.mesh), sharding.sharded(self.mesh)
        traced = platform.traced_for(self.platform, self._in_its_form(pure))
        return jax.jit(traced, in_shardings=(whole, whole, split), out_shardings=whole)

    @property
    def preprocess_eval(self) -> str:
        """The host ops of evaluation and prediction, which draw nothing."""
        return decode.for_evaluation(self.recipe.config.preprocess_eval, self.recipe.config.preprocess)

    def eval_images(self, source: Any) -> Images:
        """A source seen through the host ops of evaluation."""
        return Images(source, self.preprocess_eval, self.recipe.config.seed, self.recipe.config.data.threads)
