"""The kind of an op is what it declares, whatever its parameters are called, in every family of ops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.augment import ops, tta
from imgclf_jax.core import kinds, rng
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode

KEY = jax.random.key(1)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 100, (6, 4, 4, 1), np.uint8))


@kinds.random
def noise(k, x, most=9):
    return x + jax.random.randint(k, x.shape, 0, most).astype(x.dtype)


@kinds.by_example
def number(k, x, numbers, passes, times=1):
    return x + (times * numbers + passes).astype(x.dtype)[:, None, None, None]


@kinds.random
def flicker(generator, picture, most=9):
    return picture + generator.integers(1, most, picture.shape, "uint8")


def darker(picture, by=2):
    return picture // by


def forgotten(key, images, amount=1):
    return images


@kinds.random
def view(key):
    return []


def apply(text, train):
    known = jnp.uint32(5), jnp.arange(6, dtype=jnp.int32), jnp.ones(6, jnp.int32)
    return np.rint(np.asarray(ops.build(text, train)(KEY, IMAGES, *known)) * 255)


def test_device_ops():
    drawn = jax.random.randint(rng.fold(KEY, f"{__name__}:noise", 0), IMAGES.shape, 0, 5)
    np.testing.assert_array_equal(apply(f"{__name__}:noise(5)", train=True), np.asarray(IMAGES) + np.asarray(drawn))
    np.testing.assert_array_equal(apply(f"{__name__}:noise(5)", train=False), IMAGES)
    numbered = np.asarray(IMAGES) + (3 * np.arange(6) + 1)[:, None, None, None]
    np.testing.assert_array_equal(apply(f"{__name__}:number(3)", train=True), numbered)
    np.testing.assert_array_equal(apply(f"{__name__}:number(3)", train=False), IMAGES)
    for train in (True, False):
        np.testing.assert_array_equal(apply(f"{__name__}:darker(by=3)", train), np.asarray(IMAGES) // 3)
    assert [ops.needs_ids(f"{__name__}:{n}") for n in ("noise", "number", "darker")] == [False, True, False]


def test_host_ops():
    image = np.asarray(IMAGES[0])
    apply, draws = decode.build(f"decode(1)|{__name__}:flicker(4)|{__name__}:darker")
    drawn = rng.generator(7, f"preprocess/{__name__}:flicker/0", 3).integers(1, 4, image.shape, np.uint8)
    np.testing.assert_array_equal(apply(image, 7, 3), (image + drawn) // 2)
    assert draws
    assert not decode.build(f"decode(1)|{__name__}:darker(by=4)")[1]


@pytest.mark.parametrize(("build", "text", "message"), [
    (ops.build, f"{__name__}:forgotten", "draws at random: declare it by @kinds.random"),
    (decode.build, f"decode(1)|{__name__}:number", "is @kinds.by_example; allowed for a host op"),
    (tta.build, f"{__name__}:view", f"view '{__name__}:view' is @kinds.random; allowed for a view: plain"),
    (ops.build, f"{__name__}:noise(k=1)", "unknown argument 'k': .*allowed: most"),
])  # fmt: skip
def test_mistakes_are_told_with_the_way_out(build, text, message):
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        build(text, train=True) if build is ops.build else build(text)


def test_a_kind_is_found_through_partials_and_wrappers():
    @kinds.random
    def op(key, images):
        return images

    wrapped = functools.wraps(op)(lambda *args: op(*args))
    for other in (op, functools.partial(op), functools.partial(functools.partial(op)), jax.jit(op), wrapped):
        assert kinds.kind_of(other) == kinds.RANDOM
    assert kinds.kind_of(lambda images: images) == kinds.kind_of(abs) == kinds.PLAIN
