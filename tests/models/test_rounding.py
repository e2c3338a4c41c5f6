"""bfloat16 on CPU: comparisons, sorts and roundings see the program's exact values, whatever roundings are omitted."""

import functools
from typing import Any

import by_numpy
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_programs import EXACT, LOOSE, SHAPE

from imgclf_jax import programs
from imgclf_jax.core import jaxprs, sharding
from imgclf_jax.models.cpu.moves import MOVES
from imgclf_jax.models.cpu.rewrite import _ELEMENTWISE, rewrite
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

BF16 = jnp.bfloat16


class WinnerTakesAll(nn.Module):
    """Each image keeps only its largest unit, as in competitive networks."""

    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1).astype(self.dtype)
        h = nn.Dense(self.width, dtype=self.dtype)(x) * jnp.asarray(1.1, self.dtype)
        greatest = jnp.max(h, -1, keepdims=True)
        y = nn.Dense(self.width, dtype=self.dtype)(h)
        return jnp.where(h == greatest, y, 0)


@pytest.fixture
def winner_takes_all(fake_config, one_device):
    """(Its programs, state, 64 images) in bfloat16."""
    fake_config.model, fake_config.precision, fake_config.batch_size = "test_rounding:WinnerTakesAll", "bfloat16", 64
    fake_config.optimizer, fake_config.schedule = "sgd", "constant(1.0)"
    data = DataInfo(64, (12, 12, 1), tuple("abcd"), "made up")
    of = programs.Programs(Recipe(fake_config, data), sharding.make_mesh())
    return of, of.init()["state"], np.random.default_rng(0).integers(0, 256, (64, *data.image_shape), np.uint8)


@pytest.mark.thorough
@pytest.mark.optimized
def test_each_image_has_a_winner_in_features_and_in_training(winner_takes_all, monkeypatch):
    """Features equal linen's without the rewrite, and the step moves the parameters that linen's step moves."""
    of, state, images = winner_takes_all
    features = of.jitted(of.pure("features"))  # rewritten, as a program that takes gradients
    found = np.asarray(features(state.params, state.model_state, images))
    expected = np.asarray(jax.jit(of.pure("features"))(state.params, state.model_state, images))
    assert np.count_nonzero(found.any(-1)) == np.count_nonzero(expected.any(-1)) == 64
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-8)

    batch = {"image": images, "label": np.arange(64, dtype=np.int32) % 4}

    def step(of):
        copy = jax.tree.map(jnp.copy, state)  # `train` donates it
        after = of.train(copy, of.zero_sums(), sharding.put_batch(batch, of.mesh))[0].params
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, state.params)

    ours = step(of)
    monkeypatch.setattr(programs, "optimize_for_cpu", lambda pure, onednn: pure)
    as_written = step(programs.Programs(of.recipe, of.mesh))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(as_written), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max())


def test_the_greatest_of_an_array_is_in_it():
    """Whether or not a matmul has read the array in between. Equal elements share its gradient."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), BF16)

    def winners(x, matmul):
        h = x * BF16(1.1)
        m = jnp.max(h, -1, keepdims=True)
        y = h @ jnp.eye(32, dtype=BF16) if matmul else h
        return jnp.sum((y * m).astype(jnp.float32)), (h == m, jnp.sqrt(m - h))

    for matmul in (True, False):
        function = jax.grad(functools.partial(winners, matmul=matmul), has_aux=True)
        (found, (won, below)), (expected, (as_written, _)) = rewrite(function)(x), function(x)
        np.testing.assert_array_equal(won, as_written)
        assert np.all(np.any(won, -1))
        assert not np.any(np.isnan(below))
        a, b = found.astype(np.float32), expected.astype(np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.abs(b).max())


def run_program(steps, x, y, told):
    """(The last value, an observation of the last `told` exact ones). A step is (operation, its two operands)."""
    exact, loose = [x, y], []
    for name, first, second in steps:
        table, into, operands = (EXACT, exact, exact) if name in EXACT else (LOOSE, loose, exact + loose)
        into.append(table[name](*(operands[-1 - i % len(operands)] for i in (first, second))))
    ranks, above = jnp.argsort(exact[-1], 0), exact[-1] - exact[-2] > 0
    winners = [z == jnp.max(z, -1, keepdims=True) for z in exact[-told:]]
    return (loose or exact)[-1], (ranks, above, winners, [jnp.floor(z * 64).astype(jnp.int32) for z in exact[-told:]])


def derive(steps, told, x, y):
    """(The observations, the last value, and the gradients of a number that depends on all)."""

    def value(x, y):
        out, outcomes = run_program(steps, x, y, told)
        return jnp.sum(out.astype(jnp.float32) * WEIGHTS), (out, outcomes)

    gradients, (out, outcomes) = jax.grad(value, (0, 1), has_aux=True)(x, y)
    return outcomes, (out, *gradients)


def draw(rng):
    """Numbers of which some are equal, and some become equal in bfloat16 once multiplied by 1.1."""
    kinds = rng.normal(size=SHAPE), rng.integers(-3, 4, SHAPE) / 2, 1.875 + rng.integers(0, 4, SHAPE) / 128
    return np.choose(rng.choice(3, SHAPE, p=(0.1, 0.2, 0.7)), kinds)


def check(steps, dtype, seed=0, told=1):
    """Compares a program with the rewritten one, both computed in NumPy; gives the program.

    What is told is equal. The last value and the gradients may differ by the rounding of the greatest number, once a
    step: what leads to a comparison is rounded, and all that follows is linear in it or smooth.
    """
    x, y = (draw(np.random.default_rng([seed, i])).astype(dtype) for i in range(2))
    program, shape = jax.make_jaxpr(functools.partial(derive, steps, told), return_shape=True)(x, y)
    rewritten = jax.make_jaxpr(rewrite(jax.extend.core.jaxpr_as_fun(program)))(x, y)
    (expected, greatest), (found, _) = (by_numpy.evaluate(p, x, y) for p in (program, rewritten))
    expected, found = (jax.tree.unflatten(jax.tree.structure(shape), out) for out in (expected, found))
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    for a, b, s in zip(found[1], expected[1], shape[1], strict=True):
        assert a.dtype == s.dtype
        atol = float(jnp.finfo(dtype).eps) * len(steps) * greatest
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=atol)
    return program


DTYPES = pytest.mark.parametrize("dtype", [BF16, *thorough(jnp.dtype(jnp.float32))], ids=["bfloat16", "float32"])
NAMES = sorted({*EXACT, *LOOSE})
WEIGHTS = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
STEPS = st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.integers(0, 3))


@pytest.mark.thorough
@DTYPES
@settings(max_examples=15)
@given(st.lists(STEPS, min_size=2, max_size=8), st.integers(0, 2**31))
def test_random_programs_and_their_gradients_tell_the_same(dtype, steps, seed):
    check(steps, dtype, seed)


@pytest.mark.thorough
@DTYPES
def test_every_primitive_that_is_rewritten_tells_the_same(dtype):
    """In some program, forward or in its gradient; each operation takes the two inputs."""
    names = np.random.default_rng(2).permutation(NAMES)
    programs = [check([(str(n), -1, -2) for n in names[i : i + 9]], dtype, told=9) for i in range(0, len(names), 9)]
    # Two are other names of what is there, in other versions of JAX, and one leaves no trace in a program.
    assert {*_ELEMENTWISE, *MOVES} - {"copy_p", "stop_gradient", "copy"} <= set.union(*map(primitives, programs))


def primitives(jaxpr):
    """The names of all primitives in a jaxpr and those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inner = [primitives(j) for eqn in jaxpr.eqns for j in jaxprs.inner(eqn)]
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*inner)


def test_a_broadcast_is_scaled():
    """By a number, before any array has an order."""
    x = jnp.arange(12, dtype=BF16).reshape(3, 4)
    found = rewrite(lambda x: jnp.broadcast_to(x[:, :1], x.shape) * 2 + x)(x)
    np.testing.assert_array_equal(found, x[:, :1] * 2 + x)
