"""The small network against that of the Keras example on the same weights, in float64."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf

from imgclf_jax import losses, step
from imgclf_jax.models import classifier
from imgclf_jax.optim.optimizers import promoting

CLASSES, BATCH, STEPS, SHAPE = 10, 8, 20, (28, 28, 1)
# Keras rounds the betas to float32 where it raises them to the power of the step; these lose nothing by it.
B1, B2 = float(np.float32(0.9)), float(np.float32(0.999))


@pytest.fixture
def float64():
    """Both frameworks compute in float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # that of a model built before stays otherwise
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def to_params(weights):
    """Keras's weights, or their gradients, in the order of `model.weights`, as our parameters."""
    names = ("block0", "block1", "dense", "head")
    layers = {
        name: {"kernel": kernel, "bias": bias}
        for name, kernel, bias in zip(names, weights[::2], weights[1::2], strict=True)
    }
    return {"head": layers.pop("head"), "backbone": layers}


def keras_example(rng):
    """The Keras model with random weights."""
    layers = keras.layers
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
        layers.Dense(64, activation="relu"), layers.Dense(CLASSES),
    ])  # fmt: skip
    model.set_weights([rng.normal(0, 0.3 / np.sqrt(max(1, np.prod(w.shape[:-1]) / 9)), w.shape) for w in model.weights])
    return model


def assert_close(ours, theirs, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.thorough
@pytest.mark.usefixtures("form")
def test_logits_gradients_and_adam_agree_with_keras(float64):
    """Logits and all gradients to 1e-10; after 20 training steps with Adam all parameters to 1e-8."""
    rng = np.random.default_rng(0)
    theirs, adam = keras_example(rng), keras.optimizers.Adam(1e-3, B1, B2, epsilon=1e-7)

    @tf.function
    def backward(images, labels):
        with tf.GradientTape() as tape:
            logits = theirs(images)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return logits, tape.gradient(loss, [v.value for v in theirs.trainable_variables])

    model = classifier.build("cnn", CLASSES, "float64").clone(dtype=jnp.float64)
    params = jax.tree.map(np.asarray, to_params(theirs.get_weights()))
    own = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    images = rng.integers(0, 256, (STEPS, BATCH, *SHAPE), np.uint8)
    labels = rng.integers(0, CLASSES, (STEPS, BATCH), np.int32)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return jnp.mean(losses.softmax(logits, labels)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params, images[0] / 255, labels[0])
    keras_logits, keras_grads = backward(images[0] / 255, labels[0])
    assert np.ptp(keras_logits) > 0.1
    assert_close(logits, keras_logits.numpy(), 1e-10)
    assert min(np.max(np.abs(g)) for g in jax.tree.leaves(grads)) > 1e-4
    assert_close(grads, to_params([g.numpy() for g in keras_grads]), 1e-10)

    # Keras adds epsilon to sqrt(v) before the correction of its bias, optax after it: dividing epsilon by the
    # square root of the correction makes the two formulas one.
    eps = lambda count: 1e-7 / jnp.sqrt(1 - B2 ** (count + 1))  # noqa: E731
    optimizer = optax.inject_hyperparams(optax.adam)(1e-3, B1, B2, eps)
    schedule = optax.constant_schedule(1e-3)
    scale = lambda key, images: images / jnp.float64(255)  # noqa: E731
    # Strict promotion refuses to compare float64 logits with float32, the least precision of a loss.
    train_step = jax.jit(promoting(step.make_train_step(model, losses.softmax, optimizer, schedule, scale)))
    state = step.TrainState(
        jnp.uint32(0), jnp.int32(0), jnp.int32(0), params, {}, jax.jit(promoting(optimizer.init))(params)
    )
    for x, y in zip(images, labels, strict=True):
        state, _ = train_step(state, {"image": jnp.asarray(x, jnp.float64), "label": jnp.asarray(y)})
        adam.apply_gradients(zip(backward(x / 255, y)[1], theirs.trainable_variables, strict=True))
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert_close(state.params, to_params(theirs.get_weights()), 1e-8)
