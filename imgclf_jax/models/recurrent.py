"""LSTM and GRU cells with linen's parameters and results, whose bias gradients are summed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.typing import Initializer


class _Weights(nn.Module):
    """Returns the parameters of `nn.Dense` on c features: (kernel [c, features], bias [features] or None)."""

    features: int
    kernel_init: Initializer
    use_bias: bool

    @nn.compact
    def __call__(self, c: int) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.kernel_init, (c, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: DTypeLike | None) -> jax.Array:
    """`nn.Dense`: [b, c] → [b, features] in `dtype`."""
    y = jnp.dot(x.astype(dtype), kernel.astype(dtype))
    return y if bias is None else _add_bias(y, bias)


@jax.custom_jvp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.astype(y.dtype)[None]  # no explicit broadcast, which the scan over rows would store and reread


@_add_bias.defjvp
def _add_bias_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    d_y, d_bias = tangents  # broadcast, then cast, as in `layers.spread`
    return _add_bias(*primals), d_y + jnp.broadcast_to(d_bias, d_y.shape).astype(d_y.dtype)


class LSTMCell(nn.OptimizedLSTMCell):
    """`nn.OptimizedLSTMCell` (Hochreiter and Schmidhuber 1997): ((c, h), x [b, d]) → ((c, h), h), all [b, features]."""

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        def weights(side: str, x: jax.Array, init: Initializer, use_bias: bool) -> list[tuple[jax.Array, Any]]:
            return [_Weights(self.features, init, use_bias, name=side + gate)(x.shape[-1]) for gate in "ifgo"]

        c, h = carry
        input_weights = weights("i", inputs, self.kernel_init, False)
        hidden_weights = weights("h", h, self.recurrent_kernel_init, True)
        bias = jnp.concatenate([bias for _, bias in hidden_weights])
        gates = _dense(h, jnp.concatenate([kernel for kernel, _ in hidden_weights], 1), bias, self.dtype)
        gates += _dense(inputs, jnp.concatenate([kernel for kernel, _ in input_weights], 1), None, self.dtype)
        i, f, g, o = jnp.split(gates, 4, -1)
        c = self.gate_fn(f) * c + self.gate_fn(i) * self.activation_fn(g)
        h = self.gate_fn(o) * self.activation_fn(c)
        return (c, h), h


class GRUCell(nn.GRUCell):
    """`nn.GRUCell` (Cho et al. 2014; the reset gate acts after the matmul): (h, x [b, d]) → (h, h), [b, features]."""

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = carry

        def dense(name: str, use_bias: bool) -> jax.Array:
            x, init = (inputs, self.kernel_init) if name[0] == "i" else (h, self.recurrent_kernel_init)
            return _dense(x, *_Weights(self.features, init, use_bias, name=name)(x.shape[-1]), self.dtype)

        r = self.gate_fn(dense("ir", True) + dense("hr", False))
        z = self.gate_fn(dense("iz", True) + dense("hz", False))
        n = self.activation_fn(dense("in", True) + r * dense("hn", True))
        h = (1.0 - z) * n + z * h
        return h, h
