"""Normalizations: linen's parameters, statistics and results, in few passes over the images."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from imgclf_jax.models.cpu.layout import channel_axis, spread, sum_but, widen


class BatchNorm(nn.Module):
    """`nn.BatchNorm` on `inner` images: the same parameters, statistics and results, in float32 (or float64).

    Ioffe and Szegedy 2015 (arXiv:1502.03167), over all images of the batch, on however many devices they lie.
    `momentum` is the weight of the old running mean and variance, the collection `batch_stats`.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x, axis = widen(x), channel_axis()
        shape = (x.shape[axis],)
        running = [
            self.variable("batch_stats", name, fill, shape) for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else jnp.ones(shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            mean, var = (v.value for v in running)
            factor = lax.rsqrt(var + self.epsilon) * scale
            return x * spread(factor, axis, x) + spread(bias - mean * factor, axis, x)
        y, mean, var = _batch_norm(x, scale.astype(x.dtype), bias.astype(x.dtype), self.epsilon, axis)
        if not self.is_initializing():
            for old, new in zip(running, (mean, var), strict=True):
                old.value = self.momentum * old.value + (1 - self.momentum) * new.astype(old.value.dtype)
        return y


def _mean_but(x: jax.Array, axis: int) -> jax.Array:
    return sum_but(x, axis) / (x.size // x.shape[axis])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalized x, mean [c], variance [c]), the latter two not differentiated."""
    return _batch_norm_forward(x, scale, bias, epsilon, axis)[0]


def _batch_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    mean = _mean_but(x, axis)
    var = jnp.maximum(_mean_but(lax.square(x), axis) - lax.square(mean), 0)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale
    y = x * spread(factor, axis, x) + spread(bias - mean * factor, axis, x)
    return (y, mean, var), (x, mean, inverse, scale)


def _batch_norm_backward(epsilon: float, axis: int, saved: Any, gradients: Any) -> tuple[jax.Array, ...]:
    """The paper's section 3, in two passes over the images."""
    x, mean, inverse, scale = saved
    gradient = gradients[0]
    count = x.size // x.shape[axis]
    mean_gradient = _mean_but(gradient, axis)
    mean_product = _mean_but(gradient * (x - spread(mean, axis, x)), axis) * inverse  # of it and normalized x
    a = scale * inverse
    b = -a * mean_product * inverse
    c = -a * mean_gradient - b * mean
    d_x = gradient * spread(a, axis, x) + x * spread(b, axis, x) + spread(c, axis, x)
    return d_x, mean_product * count, mean_gradient * count


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class LayerNorm(nn.Module):
    """`nn.LayerNorm` over the features (Ba et al. 2016, arXiv:1607.06450): the same parameters and results.

    Computed in float32 (or float64), the result is in x's dtype.
    """

    axis: int = -1
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axis = self.axis % x.ndim
        scale = self.param("scale", nn.initializers.ones, (x.shape[axis],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[axis],))
        wide = widen(x)
        return _layer_norm(wide, scale.astype(wide.dtype), bias.astype(wide.dtype), self.epsilon, axis).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int) -> jax.Array:
    return _layer_norm_forward(x, scale, bias, epsilon, axis)[0]


def _layer_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int
) -> tuple[jax.Array, Any]:
    mean = jnp.mean(x, axis, keepdims=True)
    var = jnp.maximum(jnp.mean(lax.square(x), axis, keepdims=True) - lax.square(mean), 0)
    inverse = lax.rsqrt(var + epsilon)
    y = (x - mean) * inverse * spread(scale, axis, x) + spread(bias, axis, x)
    return y, (x, mean, inverse, scale)


def _weighted_mean(x: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """The mean of x times weights [d] over the axis of size d, which stays, of size 1."""
    total = lax.dot_general(weights, x, (((0,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)
    return jnp.expand_dims(total / x.shape[axis], axis)


def _layer_norm_backward(epsilon: float, axis: int, saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, mean, inverse, scale = saved
    product = lax.optimization_barrier(gradient * ((x - mean) * inverse))  # of it and normalized x
    means = [_weighted_mean(y, scale, axis) for y in (gradient, product)]
    # Or XLA writes out the mean, the deviation and the scale of each element, for all passes to read.
    (first, second), mean, inverse, scale = lax.optimization_barrier((means, mean, inverse, scale))
    d_x = (gradient * spread(scale, axis, x) - first - (x - mean) * (inverse * second)) * inverse
    return d_x, sum_but(product, axis), sum_but(gradient, axis)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def layer_norm(name: str, x: jax.Array, axis: int = -1) -> jax.Array:
    """x normalized over the features on `axis` by a `LayerNorm` of that name."""
    return LayerNorm(axis, name=name)(x)
