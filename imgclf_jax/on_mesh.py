"""A recipe on a mesh: what a run starts from, and how its state lies on the devices.

Everything is traced for the platform of the mesh (`core/platform.py`), so that a mesh of devices that are not here
serves as well.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imgclf_jax import diagnose, step
from imgclf_jax.core import fsdp, platform, sharding, tree
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.once import once
from imgclf_jax.data.stream import Images
from imgclf_jax.models import classifier, norms
from imgclf_jax.optim import partition
from imgclf_jax.recipe import Recipe

_PRODUCTS = ("float32", "tensorfloat32", "bfloat16")
_FIRST_IMAGES = 5000  # that airbench94 whitens by


@dataclass(frozen=True, eq=False)
class OnMesh:
    """A recipe and the mesh that it is run on.

    Tracing raises UserError, naming the key, for a part of the config that fails on such images.
    """

    recipe: Recipe
    mesh: Mesh = field(default_factory=sharding.make_mesh)

    @property
    def platform(self) -> str:
        """The platform of the mesh, which all programs are traced for."""
        return platform.of(self.mesh)

    @property
    def compiler_options(self) -> dict[str, bool] | None:
        """Options of every program: deterministic kernels on GPU, even where XLA_FLAGS was read long before."""
        wanted = self.recipe.config.deterministic and self.platform == "gpu"
        return {"xla_gpu_deterministic_ops": True} if wanted else None

    def slow_in_loops(self, jaxpr: Any) -> bool:
        """Whether the platform of the mesh runs this program slower inside of a loop."""
        return platform.slow_in_loops(jaxpr, self.platform)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Inside, what is traced is for the mesh's platform, and what fails is traced again to name the config key."""
        with platform.tracing_for(self.platform), diagnose.naming_the_key(self.recipe), self._products():
            yield

    @property
    def groups_of_statistics(self) -> int:
        """In how many groups of the images that are normalized at once batch norm takes its statistics, in training."""
        config = self.recipe.config
        devices = self.mesh.size // self.groups_of_seeds
        return norms.groups(config.batch_norm, config.batch_size // config.accumulate, devices)

    def statistics(self) -> contextlib.AbstractContextManager[None]:
        """Inside, batch norm takes its statistics in training of the images that the config says."""
        return norms.statistics_over(self.groups_of_statistics)

    @once
    def groups_of_seeds(self) -> int:
        """In how many groups of devices the seeds lie: one, unless the mesh has an axis `seeds`."""
        return sharding.groups_of_seeds(self.recipe.num_seeds, self.mesh)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, products of float32 operands have the bits that the config says; CPU has no others than float32."""
        asked = self.recipe.config.matmul_precision
        if asked not in _PRODUCTS:
            raise UserError(unknown("matmul_precision", asked, _PRODUCTS))
        return contextlib.nullcontext() if self.platform == "cpu" else jax.default_matmul_precision(asked)

    def _init(
        self, seed: jax.Array, images: jax.Array | None = None, weights: Mapping[str, Any] | None = None
    ) -> step.TrainState:
        def init(seed: jax.Array) -> step.TrainState:
            recipe, shape = self.recipe, self.recipe.data.image_shape
            parts = recipe.model, recipe.optimizer, shape, seed, recipe.average
            return step.init_state(*parts, images, weights, recipe.method.predicts)

        if self.recipe.num_seeds == 1:
            return init(seed)
        states: step.TrainState = jax.vmap(init)(seed + jnp.arange(self.recipe.num_seeds, dtype=jnp.uint32))
        return states

    def init_state(
        self, seed: int | None = None, images: np.ndarray | None = None, weights: Mapping[str, Any] | None = None
    ) -> step.TrainState:
        """The train state at step 0.

        `seed` is the config's unless given. `images` are `first_images`; `weights`, by name, are taken instead of
        random ones. Of several seeds, `seed` and those after it, all arrays are [num_seeds, …].
        """
        seed = self.recipe.config.seed if seed is None else seed
        with self.tracing():
            state: step.TrainState = self._jitted_init(np.uint32(seed), images, self._sharded(weights))
        return state

    def _sharded(self, weights: Mapping[str, Any] | None) -> dict[str, jax.Array] | None:
        """Weights by name, sharded like the parameters of one seed, so that no device holds all of them."""
        if weights is None:
            return None
        shardings = partition.of_state(dict(weights), self._axes, self.mesh, self.recipe.config.shard)
        return {name: sharding.put(x, shardings[name]) for name, x in weights.items()}

    @once
    def _jitted_init(self) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shape)
        return jax.jit(self._init, out_shardings=shardings, compiler_options=self.compiler_options)

    @once
    def traced_init(self) -> Any:
        """`init` before it is lowered and compiled, without weights from elsewhere."""
        wants, data = hasattr(self.recipe.model.backbone, "init_on_images"), self.recipe.data
        images = (min(_FIRST_IMAGES, data.train_examples), *data.image_shape)
        seed = jax.ShapeDtypeStruct((), "uint32", sharding=sharding.replicated(self.mesh))
        with self.tracing():
            return self._jitted_init.trace(seed, jax.ShapeDtypeStruct(images, "float32") if wants else None, None)

    @once
    def state_shape(self) -> step.TrainState:
        """`init_state`'s result as shapes with shardings, without computing it."""
        with self.tracing(), classifier.bounded():
            shapes = jax.eval_shape(self._init, jax.ShapeDtypeStruct((), "uint32"))
        batch = self.recipe.config.batch_size, *self.recipe.data.image_shape
        classifier.check_size([x.shape for x in jax.tree.leaves(shapes.params)], batch)
        leading = int(self.recipe.num_seeds > 1)
        state = partition.of_state(shapes, self._axes, self.mesh, self.recipe.config.shard, leading)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state)

    def check_size(self) -> None:
        """Raises UserError for what no run could hold, see `diagnose.check_size`."""
        diagnose.check_size(self.recipe, self.state_shape, self.platform == "cpu")

    @once
    def _axes(self) -> dict[str, int | None]:
        """The axis of each parameter that is split over the mesh's `fsdp`; none without it."""
        config, parts = self.recipe.config, self.mesh.shape.get("fsdp", 1)
        partition.check_what(config.shard)
        return partition.build(config.rules.shard, self.recipe.parameters, parts) if parts > 1 else {}

    def gather_at_use(self, function: Callable[..., Any], of_seeds: bool = False) -> Callable[..., Any]:
        """`function(params, model_state, batch)`, which gathers each sharded parameter where it uses it: see `fsdp`.

        With `of_seeds` the parameters are those of all seeds.
        """
        if not self._is_sharded:
            return lambda params, model_state, *args: function(
                self._replicated(params), self._replicated(model_state), *args
            )
        leading, what = int(of_seeds and self.recipe.num_seeds > 1), self.recipe.config.shard
        return fsdp.gather_at_use(function, lambda x: partition.of_state(x, self._axes, self.mesh, what, leading))

    def shard_function(self, function: Callable[..., Any], returns_gradients: bool = False) -> Callable[..., Any]:
        """A function (params, model_state, batch, key, fixed) of a microbatch, gathering parameters where it uses them.

        With `returns_gradients` it returns (…, gradients), which are reduce-scattered.
        """
        if not self._is_sharded:
            return lambda *args: function(*args[:-1], self._replicated(args[-1]))
        shardings = functools.partial(partition.of_state, axes=self._axes, mesh=self.mesh)
        if self.recipe.config.shard == "all":
            return fsdp.gather_at_use(function, shardings, returns_gradients, self.fixed_shardings)

        def scattered(params: Any, *args: Any) -> Any:  # or XLA would shard the layers as the gradients
            out = function(self._replicated(params), *args[:-1], self._replicated(args[-1]))
            if not returns_gradients:
                return out
            return out[0], jax.lax.with_sharding_constraint(out[1], shardings(out[1]))

        return scattered

    def fixed_shardings(self, fixed: Any) -> Any:
        """How a method's `fixed` arrays are sharded: over the mesh's `fsdp`, each along its largest axis."""
        shapes, parts = {name: x.shape for name, x in tree.named_leaves(fixed)}, self.mesh.shape.get("fsdp", 1)
        whole = parts == 1 or self.recipe.config.shard != "all"
        return partition.of_state(fixed, {} if whole else partition.build("", shapes, parts), self.mesh)

    @property
    def _is_sharded(self) -> bool:
        return any(axis is not None for axis in self._axes.values())

    def _replicated(self, tree: Any) -> Any:
        if self.mesh.axis_names == ("data",):
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.replicated(self.mesh))

    def first_images(self, images: Images) -> np.ndarray | None:
        """The first 5,000 training images, as in evaluation, for a backbone that begins from images; or None."""
        if not hasattr(self.recipe.model.backbone, "init_on_images"):
            return None
        ids = np.arange(min(_FIRST_IMAGES, len(images)))
        first, augment = images.read(ids, ids)["image"], self.recipe.augment(train=False)
        with self.tracing():
            return np.asarray(jax.jit(lambda images: augment(None, images))(first))

    def put(self, tree: Any) -> Any:
        """A pytree of small arrays, whole on every device."""
        return sharding.put_whole(tree, self.mesh)
