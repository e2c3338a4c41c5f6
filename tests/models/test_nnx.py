"""An nnx module as a backbone, next to its linen twin: with equal parameters they train alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import rewind
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import launch
from imgclf_jax import losses, step
from imgclf_jax.core import json_files, tree
from imgclf_jax.models import classifier

SHAPE, WIDTH = (4, 4, 1), 3
SPEC = f"{__name__}:bridged(dropout=0.0)"


class Nnx(nnx.Module):
    def __init__(self, width=4, dropout=0.0, *, dtype=jnp.float32, rngs):
        self.conv = nnx.Conv(1, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.8, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.dropout(jnp.mean(nnx.gelu(self.norm(self.conv(x))), (1, 2)))
        for layer in self.layers:
            x = layer(x)
        return x


class Linen(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.gelu(nn.BatchNorm(not train, momentum=0.8, name="norm")(x))
        x = jnp.mean(x, (1, 2))
        for i in range(2):
            x = nn.Dense(self.width, name=f"layers_{i}")(x)
        return x


class Bridged(nnx.bridge.ToLinen):
    """An nnx module as a linen module, as docs/extending.md has it."""

    def __call__(self, x, train=False):
        return super().__call__(x, nnx_method=lambda net, x: (net.train() if train else net.eval()) or net(x))


def bridged(width=WIDTH, dropout=0.0, dtype=jnp.float32):
    return Bridged(Nnx, kwargs=FrozenDict(width=width, dropout=dropout, dtype=dtype), metadata_fn=None)


def batch():
    rng = np.random.default_rng(0)
    return {"image": rng.integers(256, size=(8, *SHAPE), dtype=np.uint8), "label": rng.integers(0, 3, 8, np.int32)}


def start(model):
    """(initial state, compiled train step) of plain SGD."""
    optimizer = optax.sgd(0.5)
    scale = lambda key, images: images.astype(jnp.float32) / 255  # noqa: E731
    train_step = step.make_train_step(model, losses.softmax, optimizer, optax.constant_schedule(0.5), scale)
    return jax.jit(lambda: step.init_state(model, optimizer, SHAPE, 0))(), jax.jit(train_step)


def test_it_trains_as_its_linen_twin():
    """Losses, gradients and batch statistics; nnx numbers the layers of a list, where linen's have names."""
    state, train_step = start(classifier.build(SPEC, 3, "float32"))
    twin, twin_step = start(classifier.Classifier(Linen(WIDTH), 3))

    def as_nnx(named):
        return {name.replace("layers_", "layers/"): x for name, x in tree.named_leaves(named)}

    assert as_nnx(twin.params).keys() == dict(tree.named_leaves(state.params)).keys()
    assert as_nnx(twin.model_state).keys() == dict(tree.named_leaves(state.model_state)).keys()
    state = state.replace(params=tree.map_named(as_nnx(twin.params).get, state.params))
    for _ in range(2):  # an update of plain SGD is the gradient
        state, sums = train_step(state, batch())
        twin, twin_sums = twin_step(twin, batch())
        np.testing.assert_allclose(sums["loss"], twin_sums["loss"], rtol=1e-6)
        for own, other in ((state.params, twin.params), (state.model_state, twin.model_state)):
            expected = as_nnx(other)
            for name, x in tree.named_leaves(own):
                np.testing.assert_allclose(x, expected[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.thorough
def test_a_run_goes_on_with_the_same_bits(tmp_path):
    """With dropout, batch norm and a list of layers in its checkpoints, and several seeds."""
    common = [f"--config.model={__name__}:bridged(4, dropout=0.5)", "--config.num_seeds=2", "--config.batch_size=16",
              "--config.schedule=constant(0.1)", "--config.data.source=fake(64, (8, 8, 1), 4)",
              "--config.preprocess=decode(1)", "--config.augment=", "--config.total=6 steps",
              "--config.checkpoint_every=3 steps"]  # fmt: skip

    def run():
        assert launch.main([*common, f"--workdir={tmp_path / 'run'}"]) == 0
        return json_files.read(tmp_path / "run" / "result.json")["params_sha256"]

    whole = run()
    rewind(tmp_path / "run", 3)
    assert run() == whole
    assert launch.main(["evaluate", f"--workdir={tmp_path / 'run'}", "--trust"]) == 0
