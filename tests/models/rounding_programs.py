"""Operations that programs are made of at random: every primitive that the rewrite for CPU handles, and others.

Each is a function of two arrays f[n, n, n] → f[n, n, n] in their dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from imgclf_jax.models.cpu import matmuls, pool
from imgclf_jax.models.cpu.layout import features_first, features_last

N = 4
SHAPE = (N, N, N)


def clip(x):
    return lax.clamp(jnp.asarray(-1, x.dtype), x, jnp.asarray(1, x.dtype))


def to_int(x):
    return (clip(x) * 4).astype(jnp.int32)


def from_int(i, x):
    return i.astype(x.dtype) * 0.25


def greatest(x, axis=-1):
    return jnp.max(x, axis, keepdims=True)


def winners(x, y):
    return jnp.where(x == greatest(x), y, 0)


def compare(operation):
    """With another array, which is sometimes equal and sometimes less."""
    return lambda x, y: jnp.where(operation(x * 1.1, jnp.maximum(x * 1.1, y)), x, y)


@jax.custom_vjp
def straight_through(x):
    """Rounds, with the gradient of the identity."""
    return jnp.round(x * 35) / 48


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@jax.custom_jvp
def gated(x):
    return jnp.where(x >= greatest(x, 0), x, x * 0.7)


@gated.defjvp
def _gated_jvp(primals, tangents):
    return gated(*primals), jnp.where(primals[0] >= greatest(primals[0], 0), tangents[0], tangents[0] * 0.7)


def pooled(x):
    """Of equal elements, the first gets the gradient."""
    y = pool.max_pool(features_first(x[None] * 1.1), 2)  # [n, h, w, b]
    return features_last(y.repeat(2, 1).repeat(2, 2))[0]


def scanned(x, y):
    """Two steps, each of which keeps the minimum of its input and the last one."""
    return lax.scan(lambda c, _: (winners(c * 1.1, y) - c, None), x, None, 2)[0]


def loop(x, y):
    start = lax.stop_gradient(x)
    return y - lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, winners(s[1] * 1.1, s[1])), (0, start))[1]


# Of operands that are the program's bit for bit these are too: IEEE operations, copies, and all that is discontinuous.
EXACT = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y * 0.9,
    "scale": lambda x, y: x * 1.1,
    "mul": lambda x, y: x * clip(y),
    "div": lambda x, y: x / (jnp.abs(y) + 1.3),
    "sqrt": lambda x, y: jnp.sqrt(jnp.abs(x) + 0.3),
    "below": lambda x, y: jnp.sqrt(greatest(x * 1.1) - x * 1.1 + 1),
    "square": lambda x, y: lax.square(clip(x)),
    "neg": lambda x, y: -x,
    "relu": lambda x, y: jax.nn.relu(x * 1.1),
    "max": jnp.maximum,
    "min": lambda x, y: jnp.minimum(x * 1.1, y),
    "eq": compare(lax.eq),
    "ne": compare(lax.ne),
    "lt": compare(lax.lt),
    "le": compare(lax.le),
    "gt": compare(lax.gt),
    "ge": compare(lax.ge),
    "winners": winners,
    "winner of all": lambda x, y: jnp.where(x * 1.1 == jnp.max(x * 1.1), y, x),
    "least": lambda x, y: jnp.where(x == jnp.min(x, (0, 2), keepdims=True), y, 0),
    "difference": lambda x, y: jnp.where(x * 1.1 - greatest(x * 1.1) >= 0, x, y),
    "is zero": lambda x, y: jnp.where((x - greatest(x)).astype(bool), x, y),
    "floor": lambda x, y: jnp.floor(x * 35) / 48,
    "ceil": lambda x, y: jnp.ceil(x * 35) / 48,
    "round": lambda x, y: jnp.round(x * 35) / 48,
    "sign": lambda x, y: jnp.sign(x * 1.1 - y * 1.1) * y,
    "rem": lambda x, y: lax.stop_gradient(lax.rem(x * 1.1, jnp.full_like(x, 0.7))) + y,
    "nextafter": lambda x, y: jnp.where(lax.nextafter(x * 1.1, y * 1.1) > y * 1.1, x, y),
    "is_finite": lambda x, y: jnp.where(jnp.isfinite(1 / (x * 1.1 - greatest(x * 1.1))), x, y),
    "reduce_precision": lambda x, y: lax.reduce_precision(x * 1.1, 8, 3),
    "bits": lambda x, y: jnp.where(
        lax.bitcast_convert_type(x * 1.1, f"uint{8 * x.dtype.itemsize}") >> (8 * x.dtype.itemsize - 16) & 1, x, y),
    "ints": lambda x, y: from_int((~(to_int(x) << 1) & 7 ^ to_int(y) | 8) >> 1, x),
    "leading zeros": lambda x, y: from_int(lax.shift_right_logical(lax.clz(to_int(x)), 3), x),
    "bools": lambda x, y: jnp.where((x > y) & ~(x > 1) ^ (y > 1) | (x == 0), x, y),
    "all": lambda x, y: jnp.where(jnp.all(x <= greatest(y), -1, keepdims=True), x, y),
    "any": lambda x, y: jnp.where(jnp.any(x >= greatest(y), 1, keepdims=True), x, y),
    "argmax": lambda x, y: jax.nn.one_hot(jnp.argmax(x * 1.1, -1), N, dtype=x.dtype) * y,
    "argmin": lambda x, y: jax.nn.one_hot(jnp.argmin(x * 1.1, 0), N, dtype=x.dtype, axis=0) * y,
    "sort": lambda x, y: features_last(jnp.sort(features_first(x * 1.1), 0)),
    "ranks": lambda x, y: jnp.take_along_axis(y, jnp.argsort(x * 1.1, 1), 1),
    "top_k": lambda x, y: from_int(lax.top_k(x * 1.1, N)[1], x) + y,
    "cummax": lambda x, y: jnp.where(lax.cummax(x * 1.1, 1) == x * 1.1, x, y),
    "upcast": lambda x, y: jnp.where((z := (x * 1.1).astype(jnp.float32)) == greatest(z), y, 0),
    "index": lambda x, y: from_int(jnp.argmax((x * 1.1).astype(jnp.float32), 0), x)[None] + y * 0,
    "threshold": lambda x, y: jnp.where(jax.random.uniform(jax.random.key(0), SHAPE) < x.astype(jnp.float32), x, y),
    "dropout": lambda x, y: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, SHAPE), x * 2, 0),
    "straight_through": lambda x, y: straight_through(x * 1.1),
    "gated": lambda x, y: gated(x * 1.1),
    "max_pool": lambda x, y: pooled(x),
    "stop_gradient": lambda x, y: lax.stop_gradient(x * 1.1) + y,
    "remat": lambda x, y: jax.checkpoint(winners)(x * 1.1, y),
    "jit": lambda x, y: jax.jit(winners)(x * 1.1, y * 1.1),
    "cond": lambda x, y: lax.cond(jnp.all(x * 1.1 < greatest(y * 1.1)), winners, lambda x, y: x - y, x * 1.1, y),
    "switch": lambda x, y: lax.switch(jnp.argmax((x * 1.1).ravel()) % 2, [lambda x: x, jax.nn.relu], y),
    "scan": scanned,
    "while": loop,
    "transpose": lambda x, y: features_first(x) * 1.1,
    "turn": lambda x, y: features_last(x) + y,
    "rev": lambda x, y: jnp.flip(x, 1) * 1.1,
    "pad": lambda x, y: jnp.pad(x, ((0, 0), (1, 0), (0, 0)), constant_values=1)[:, :-1],
    "pad by the greatest": lambda x, y: lax.pad(z := x * 1.1, jnp.max(z), ((0, 0, 0), (1, -1, 0), (0, 0, 0))),
    "concatenate": lambda x, y: jnp.concatenate([x * 1.1, y], -1)[..., ::2],
    "broadcast": lambda x, y: jnp.broadcast_to(x[:, :1] * 1.1, SHAPE),
    "squeeze": lambda x, y: jnp.squeeze(x[None] * 1.1, 0),
    "merge": lambda x, y: (x.reshape(N * N, N) * 1.1).reshape(SHAPE),
    "split": lambda x, y: x.reshape(N, N, 2, 2).max(3).repeat(2, -1),
    "gather": lambda x, y: (x * 1.1)[:, jnp.asarray([1, 0, 3, 2])],
    "update": lambda x, y: lax.dynamic_update_slice(x * 1.1, y[:1], (1, 0, 0)),
    "scatter": lambda x, y: (x * 1.1).at[1:3].max(y[1:3]),
    "barrier": lambda x, y: lax.optimization_barrier(x * 1.1),
}  # fmt: skip


def smooth(function, middle=0):
    """Of any operands, on a range where it is defined and its slope is small."""
    return lambda x, y: function(jnp.sin(x) * 0.75 + middle)


MATRIX = np.linalg.qr(np.random.default_rng(5).normal(size=(N, N)))[0]

# Their results are the program's but for rounding. Smooth, so that what was different before hardly grows.
LOOSE = {
    **{f.__name__: smooth(f) for f in (
        lax.acos, lax.asin, lax.asinh, lax.atan, lax.atanh, lax.cos, lax.cosh, lax.erf, lax.erf_inv, lax.erfc, lax.exp,
        lax.exp2, lax.expm1, lax.log1p, lax.logistic, lax.sin, lax.sinh, lax.tan, lax.tanh)},
    **{f.__name__: smooth(f, 2) for f in (lax.acosh, lax.cbrt, lax.digamma, lax.lgamma, lax.log, lax.rsqrt)},
    "atan2": lambda x, y: lax.atan2(jnp.sin(x), 2 + jnp.sin(y)),
    "pow": lambda x, y: lax.pow(2 + jnp.sin(x), jnp.sin(y)),
    "integer_pow": smooth(lambda x: lax.integer_pow(x, 3)),
    "linear": lambda x, y: x * 0.9 + y * 0.3,
    "gelu": lambda x, y: jax.nn.gelu(x),
    "softmax": lambda x, y: jax.nn.softmax(x, 1) * 1.1,
    "centre": lambda x, y: x - jnp.mean(x, (0, 1), keepdims=True),
    "standard": lambda x, y: jax.nn.standardize(x, -1, epsilon=0.5),
    "product": lambda x, y: y + jnp.prod(1 + 0.2 * jnp.sin(lax.stop_gradient(x)), 1, keepdims=True),
    "matmul": lambda x, y: jnp.einsum("bnd,de->bne", x * 1.1, jnp.asarray(MATRIX, x.dtype)),
    "dense": lambda x, y: features_last(
        matmuls.dense(features_first(x), jnp.asarray(MATRIX, jnp.float32), x.dtype)).astype(x.dtype),
    "repeated": lambda x, y: functools.reduce(lambda z, _: jnp.tanh(z) + y * 0.1, range(2), x),
}  # fmt: skip
