"""Random networks of linen's layers, this project's and JAX's primitives take the train step of plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough, trained_for
from flax import linen as nn
from jax import lax

from imgclf_jax.core import dtypes, rng, tree
from imgclf_jax.models import classifier, layers, norms

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("one_device", "shallow")]


class Part:
    """A part of a network, its settings drawn at random; where the network is `plain`, its layers are linen's."""

    def __init__(self, net, i, train):
        self.net, self.i, self.train, self.rng = net, i, train, np.random.default_rng([net.seed, *str(i).encode()])
        self.width = self.one(8, 48)

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def linen(self, name, *args, module=nn, **settings):
        return getattr(module, name)(*args, dtype=self.net.dtype, name=f"{name}{self.i}", **settings)

    def ours(self, name, *args, **settings):
        module = nn if self.net.plain else norms if name.endswith("Norm") else layers
        return self.linen(name, *args, module=module, **settings)

    def conv(self, layer, x):
        groups, large = self.one(1, 1, 2, x.shape[-1]), min(x.shape[1:3]) > 5
        settings = {"strides": self.one((1, 1), (2, 2), (2, 1)), "kernel_dilation": self.one((1, 1), (2, 2), (1, 2))}
        return layer("Conv", self.width, (self.one(1, 2, 3), self.one(2, 3)), **settings,
                     padding=self.one("SAME", *["VALID", 1, ((1, 0), (0, 2))] * large),
                     feature_group_count=1 if x.shape[-1] % groups or self.width % groups else groups)(x)  # fmt: skip

    def batch_norm(self, x):
        if self.net.plain:
            return self.linen("BatchNorm", momentum=0.9, use_running_average=not self.train)(x)
        return self.ours("BatchNorm", momentum=0.9)(x, self.train)

    def kernel(self, *shape):
        return self.net.param(f"kernel{self.i}", nn.initializers.lecun_normal(), shape).astype(self.net.dtype)

    def conv2(self, x, kernel):
        return layers.conv(x, kernel, dtype=self.net.dtype).astype(x.dtype)

    def noise(self, x):
        return x + jax.random.uniform(self.net.make_rng("dropout"), x.shape, jnp.float32).astype(x.dtype) * self.train

    def rnn(self, cell, x):
        zeros = lambda key, shape, dtype=None: jnp.zeros(shape, self.net.dtype)  # noqa: E731
        return nn.RNN(self.linen(cell, 8, carry_init=zeros), name=f"rnn{self.i}")(x[:, :9])


FUNCTIONS = (
    nn.relu, nn.silu, nn.elu, nn.celu, nn.gelu, nn.log_softmax, nn.hard_swish, nn.standardize, layers.gelu, lax.erf,
    lambda x: jnp.cumsum(x, 1) / 4, lambda x: jnp.sort(x, -1), lambda x: lax.top_k(x, x.shape[-1] // 2)[0],
    lambda x: lax.cummax(x, 1), lambda x: lax.cumlogsumexp(x, 1), lambda x: x.at[:, 0].add(x[:, -1]),
    lambda x: lax.dynamic_slice_in_dim(x, jnp.int32(1), 4, x.ndim - 1), lambda x: x[:, jnp.arange(5) // 2], jnp.sin,
    lambda x: lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y) + x, x), lambda x: lax.map(jnp.tanh, x),
    lambda x: x + lax.stop_gradient(lax.while_loop(lambda s: s < 3, lambda s: s * 2, 1)), lambda x: lax.square(x) / 4,
    lambda x: lax.cond(jnp.any(jnp.isnan(x)), jnp.sin, lambda y: nn.silu(y) + y, x), nn.tanh,
    lambda x: jax.checkpoint(lambda y: jnp.sin(y) * y + y)(x), lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 0.7j)[..., :4],
    lambda x: lax.associative_scan(lambda a, b: a / 2 + b, x, axis=1), lambda x: jax.jvp(jnp.sin, (x,), (x * x,))[1],
)  # fmt: skip
ANY = (
    *(lambda p, x, f=f: f(dtypes.upcast(x)).astype(x.dtype) for f in FUNCTIONS), lambda p, x: p.noise(x),
    *[lambda p, x: p.ours("Dense", p.width)(x), lambda p, x: nn.silu(y := p.ours("Dense", p.width)(x)) + y] * 4,
    lambda p, x: p.linen("Dense", p.width)(x), lambda p, x: p.linen("RMSNorm")(x), lambda p, x: p.ours("LayerNorm")(x),
    lambda p, x: nn.remat(nn.Dense)(p.width, dtype=p.net.dtype, name=f"remat{p.i}")(x), lambda p, x: nn.PReLU()(x),
    lambda p, x: nn.SpectralNorm(p.linen("Dense", p.width))(x, update_stats=p.train),
)  # fmt: skip
TOKENS = (
    lambda p, x: p.linen("MultiHeadDotProductAttention", 2, qkv_features=8)(x, x[:, ::2]),
    lambda p, x: p.linen("DenseGeneral", (2, p.width))(x).max(2), lambda p, x: p.linen("Conv", 8, (3,))(x),
    lambda p, x: p.linen("Einsum", (*x.shape[1:], p.width), "bnd,nde->bne")(x), lambda p, x: p.rnn("LSTMCell", x),
    lambda p, x: p.rnn("GRUCell", x), lambda p, x: x.astype(p.net.dtype) @ p.kernel(x.shape[-1], p.width),
)  # fmt: skip
IMAGES = (
    *[lambda p, x: p.conv(p.ours, x)] * 6, *[lambda p, x: p.conv(p.linen, x), lambda p, x: p.batch_norm(x)] * 3,
    lambda p, x: p.linen("ConvTranspose", p.width, (3, 2), strides=p.one((1, 1), (2, 1)))(x)[:, :12],
    lambda p, x: p.linen("Conv", 2, (2, 3, 3))(x[..., None]).max(-1), lambda p, x: p.linen("InstanceNorm")(x),
    lambda p, x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2) if p.net.plain else layers.max_pool(x, 3, 2, 1),
    lambda p, x: nn.avg_pool(x, (3, 2), (1, 2), "SAME"), lambda p, x: p.linen("ConvLocal", 4, (2, 2))(x),
    lambda p, x: lax.scan(lambda y, k: (y + nn.relu(p.conv2(y, k)), None), x, p.kernel(2, 3, 3, *[x.shape[-1]] * 2))[0],
    lambda p, x: jax.grad(lambda y, k: jnp.sum(jnp.sin(p.conv2(y, k))))(x, p.kernel(3, 2, x.shape[-1], 4)),
    lambda p, x: jax.vmap(lambda k: p.conv2(x, k))(p.kernel(2, 3, 3, x.shape[-1], 4)).sum(0),
)  # fmt: skip


class Net(nn.Module):
    """A dilated convolution, random parts of images, then of tokens [b, n, d], and a dense layer: → [b, d]."""

    seed: int
    depth: int = 8
    on_onednn: bool = True
    plain: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = Part(self, "first", train).ours("Conv", 8, (3, 3), kernel_dilation=2)(x)
        for i in range(self.depth):
            part = Part(self, i, train)
            x = x.reshape(len(x), -1, x.shape[-1]) if i == 4 else x
            y = part.one(*(ANY if part.one(0, 1) else IMAGES if x.ndim == 4 else TOKENS))(part, x)
            x = x + y if x.shape == y.shape and part.one(0, 1) else y[..., :64]
        return nn.relu(Part(self, "last", train).ours("Dense", 16)(x.reshape(len(x), -1)[:, :512]))


def gradient(model, variables, batch, key):
    """The gradient of a train step by plain JAX."""

    def loss(params):
        rngs = {"dropout": key, **rng.init_streams(rng.fold(key, "params"))}
        state = {name: value for name, value in variables.items() if name != "params"}
        images = batch["image"].astype(jnp.float64) / 255
        logits, _ = model.apply({"params": params, **state}, images, train=True, rngs=rngs, mutable=list(state))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return jax.jit(jax.grad(loss))(variables["params"])


@jax.numpy_dtype_promotion("standard")  # which linen's layers rely on
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["Net(0, 0)", *thorough(
    "Net(1, 4, on_onednn=False)", "Net(0, 4)", "resnet_cifar(8)", "vit('Ti', 4)",
    *(f"Net({seed}, on_onednn={seed % 3 > 0})" for seed in range(16)),
)])  # fmt: skip
def test_a_train_step_is_that_of_plain_jax_in_float64(model, precision, fake_config):
    """Its gradient is the update by SGD at a learning rate of 1. `Net(0, 0)` could not train in bfloat16 once."""
    text, plain = (f"{__name__}:{model}", f"{__name__}:{model[:-1]}, plain=True)") if "Net" in model else (model,) * 2
    fake_config.update(model=text, precision=precision, optimizer="sgd", schedule="constant(1.0)")
    fake_config.preprocess, fake_config.data.source = "decode(3)", "fake(64, (12, 12, 3), 4)"
    programs, _, images, after = trained_for(fake_config, 1)
    before, [(_, batch)] = programs.init_state(), programs.batches(images, [0])
    with jax.enable_x64():
        exact = classifier.build(plain, 4, "float64").clone(dtype=np.float64)
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), {"params": before.params, **before.model_state})
        expected = gradient(exact, wide, jax.tree.map(np.asarray, batch), rng.key(np.uint32(0), "dropout", 0))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    trees = (jax.tree.map(np.asarray, one) for one in (before.params, after.params, expected))
    for (name, old), (_, new), (_, true) in zip(*map(tree.named_leaves, trees), strict=True):
        error = np.linalg.norm(old.astype(np.float64) - new - true)
        assert error <= {"float32": 1e-3, "bfloat16": 0.3}[precision] * (np.linalg.norm(true) + 0.05 * scale), name
