"""BatchNorm, LayerNorm and GroupNorm with linen's parameters and results, in few passes over the images.

Statistics accumulate in float32 (or float64); outputs are in `dtype`.
"""

import functools
import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.core import dtypes, platform, rng
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Initializer, PyTree
from imgclf_jax.models.cpu import sums

# While tracing inside `statistics_over(n)`, training BatchNorm takes the statistics of n groups of the batch.
statistics_over = jax.make_user_context(1)


def groups(text: str, images: int) -> int:
    """The number of BatchNorm groups in a batch of `images`, from the key `batch_norm`.

    The key is 'global' (SyncBatchNorm) or 'groups(N)' (ghost batch norm over N images each). A method that passes more
    images through the model, such as two views of each, splits them into as many groups. Raises UserError for another
    key, and if `images` is not a multiple of N.
    """
    if text == "global":
        return 1
    size = re.fullmatch(r"groups\(([1-9]\d*)\)", text.replace(" ", ""))
    if not size:
        raise UserError(f"batch_norm={text!r}: allowed are 'global' and 'groups(N)' of N images each")
    if images % int(size[1]):
        raise UserError(f"batch_norm={text!r}: {images} images do not divide into groups of {size[1]}")
    return images // int(size[1])


def uses_linen_batch_norm(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a model calls linen's BatchNorm, which `statistics_over` does not reach."""
    modules = model.module_paths(rng.init_streams(jax.random.key(0)), jnp.zeros((1, *image_shape)), train=False)
    return any(isinstance(module, nn.BatchNorm) for module in modules.values())


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over the last axis: the same parameters, statistics and results.

    Ioffe and Szegedy 2015 (arXiv:1502.03167). Statistics cover the global batch on any number of devices, or each group
    inside `statistics_over`; the running ones, in `batch_stats`, follow the mean over the groups with `momentum`.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    dtype: DTypeLike = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (x.shape[-1],)
        running = [
            self.variable("batch_stats", name, fill, shape) for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else jnp.ones(shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = dtypes.upcast(x)
        if not train:
            mean, var = (v.value for v in running)
            factor = lax.rsqrt(var + self.epsilon) * scale
            return (x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)).astype(self.dtype)
        # Off CPU, XLA's automatic derivative is faster: the rule below would cost it a pass over the images.
        normalize = functools.partial(_batch_norm_by_rule if platform.current() == "cpu" else _batch_norm, self.epsilon)
        if (parts := statistics_over.value) == 1 or len(x) == 1:  # models are initialized on one example
            y, mean, var = normalize(x, scale.astype(x.dtype), bias.astype(x.dtype))
        else:
            by_group = x.reshape(parts, -1, *x.shape[1:])
            y, *moments = jax.vmap(normalize, (0, None, None))(by_group, scale.astype(x.dtype), bias.astype(x.dtype))
            y, (mean, var) = y.reshape(x.shape), (jnp.mean(values, 0) for values in moments)
        if not self.is_initializing():
            for old, new in zip(running, (mean, var), strict=True):
                old.value = self.momentum * old.value + (1 - self.momentum) * new.astype(old.value.dtype)
        return y.astype(self.dtype)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis (Ba et al. 2016, arXiv:1607.06450), computed in at least float32."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        with jax.numpy_dtype_promotion("standard"):  # which linen relies on
            return super().__call__(dtypes.upcast(x))


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` over groups of adjacent channels (Wu and He 2018, arXiv:1803.08494), in at least float32."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        with jax.numpy_dtype_promotion("standard"):  # which linen relies on
            return super().__call__(dtypes.upcast(x))


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts values [c] to the shape of x [..., c]."""
    return sums.broadcast(values, shape=x.shape) if platform.current() == "cpu" else jnp.broadcast_to(values, x.shape)


def _mean(x: jax.Array) -> jax.Array:
    """The mean over all axes but the last → [c]."""
    total = sums.sum_features(x, shape=x.shape) if platform.current() == "cpu" else jnp.sum(x, range(x.ndim - 1))
    return total / (x.size // x.shape[-1])


def _batch_norm(
    epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (normalized x, mean [c], variance [c])."""
    mean = _mean(x)
    var = jnp.maximum(_mean(lax.square(x)) - lax.square(mean), 0)
    factor = lax.rsqrt(var + epsilon) * scale
    if platform.current() == "tpu":  # its derivative reads less memory on TPU, but more on GPU
        return (x - _spread(mean, x)) * _spread(factor, x) + _spread(bias, x), mean, var
    return x * _spread(factor, x) + _spread(bias - mean * factor, x), mean, var


_batch_norm_by_rule = jax.custom_jvp(_batch_norm, nondiff_argnums=(0,))


@_batch_norm_by_rule.defjvp
def _batch_norm_jvp(
    epsilon: float, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[PyTree, PyTree]:
    """Transposes to section 3 of the paper in two passes over the images: one for both sums, one to combine them."""
    x, scale, bias = primals
    d_x, d_scale, d_bias = tangents
    y, mean, var = _batch_norm(epsilon, x, scale, bias)
    inverse = lax.rsqrt(var + epsilon)
    # Subtracting again is faster than storing the difference. Without the barrier XLA stores the broadcast mean.
    centred, again = (z - _spread(m, z) for z, m in ((x, mean), platform.cpu_barrier((x, mean))))
    d_mean, half_d_var = _mean(d_x), _mean(centred * d_x)
    factor = inverse * scale
    slope = inverse * d_scale - factor * inverse * inverse * half_d_var
    d_y = _spread(factor, x) * d_x + _spread(d_bias - factor * d_mean, x) + again * _spread(slope, x)
    return (y, mean, var), (d_y, d_mean, 2 * half_d_var)
