"""The models against Keras on the same weights, in float64; the layers against Flax and NumPy."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf
from cases import thorough

from imgclf_jax import losses, step
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import classifier
from imgclf_jax.models.backbones import CNN, RNN
from imgclf_jax.optim.optimizers import promoting

CLASSES, BATCH, STEPS = 10, 8, 20
# Keras rounds the betas to float32 where it raises them to the power of the step; these lose nothing by it.
B1, B2 = float(np.float32(0.9)), float(np.float32(0.999))
CASES = {  # spec → the shape of its images
    "cnn": (28, 28, 1),
    "rnn(cell='lstm', features=12, layers=2)": (9, 5, 3),
    "rnn(cell='gru', features=12, layers=2)": (9, 5, 3),
}


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


def keras_model(spec, shape):
    """The same network from Keras's own layers; for `cnn` it is the network of the Keras example."""
    layers = keras.layers
    if spec == "cnn":
        body = [
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
        ]
    else:
        cell = layers.LSTM if "lstm" in spec else layers.GRU  # GRU's default is reset_after=True
        body = [layers.Reshape((shape[0], shape[1] * shape[2])), cell(12, return_sequences=True), cell(12)]
    return keras.Sequential([layers.Input(shape), *body, layers.Dense(CLASSES)])


def to_params(spec, weights):
    """Keras's weights, or their gradients, in the order of `model.weights`, as our parameters.

    Keras's GRU has a bias for the input and one for the state at each gate; where the two are only ever added
    (z and r), ours has the input's alone.
    """
    kernel, bias = weights[-2:]
    params = {"backbone": {}, "head": {"kernel": kernel, "bias": bias}}
    if spec == "cnn":
        for i in range(2):
            kernel, bias = weights[2 * i : 2 * i + 2]
            params["backbone"][f"block{i}"] = {"kernel": kernel, "bias": bias}
        params["backbone"]["dense"] = {"kernel": weights[4], "bias": weights[5]}
        return params
    for i in range(2):
        kernel, recurrent, bias = weights[3 * i : 3 * i + 3]
        gates = "ifgo" if "lstm" in spec else "zrn"
        cell = params["backbone"][f"cell{i}"] = {}
        for g, k, r, b in zip(gates, *(np.split(w, len(gates), -1) for w in (kernel, recurrent, bias)), strict=True):
            cell[f"i{g}"], cell[f"h{g}"] = {"kernel": k}, {"kernel": r}
            if "lstm" in spec:
                cell[f"h{g}"]["bias"] = b
            else:
                cell[f"i{g}"]["bias"] = b[0]
                if g == "n":
                    cell["hn"]["bias"] = b[1]
    return params


def clear_redundant(spec, arrays):
    """The same arrays, with zeros for the biases of Keras's GRU that ours lacks."""
    arrays = [np.array(a) for a in arrays]
    if "gru" in spec:
        for i in (2, 5):  # [2, z | r | n]: of the state's row only n's bias is not redundant
            arrays[i][1, : 2 * arrays[i].shape[1] // 3] = 0
    return arrays


class KerasRun:
    """A Keras model with random weights, its gradients and its own Adam."""

    def __init__(self, spec, shape, rng):
        self.spec, self.model = spec, keras_model(spec, shape)
        random = [rng.normal(0, 0.3 / np.sqrt(max(1, np.prod(w.shape[:-1]) / 9)), w.shape) for w in self.model.weights]
        self.model.set_weights(clear_redundant(spec, random))
        self.adam = keras.optimizers.Adam(1e-3, B1, B2, epsilon=1e-7)
        self.backward = tf.function(self._backward)

    def _backward(self, images, labels):
        with tf.GradientTape() as tape:
            logits = self.model(images)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return logits, tape.gradient(loss, [v.value for v in self.model.trainable_variables])

    def params(self):
        return to_params(self.spec, self.model.get_weights())

    def train_step(self, images, labels):
        # A gradient that is always zero leaves Adam's moments, and so the redundant biases, at zero.
        grads = clear_redundant(self.spec, [g.numpy() for g in self.backward(images, labels)[1]])
        self.adam.apply_gradients(zip(grads, self.model.trainable_variables, strict=True))


def random_variables(model, x):
    """Random variables of the model's shapes and dtypes, including biases."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype), shapes)


def images_like(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def assert_close(ours, theirs, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.thorough
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("spec", "form"), [("cnn", "cpu"), *((spec, "gpu") for spec in CASES)], indirect=["form"])
def test_logits_gradients_and_adam_agree_with_keras(spec, float64):
    """Logits and all gradients to 1e-10; after 20 training steps with Adam all parameters to 1e-8."""
    shape, rng = CASES[spec], np.random.default_rng(0)
    theirs = KerasRun(spec, shape, rng)
    model = classifier.build(spec, CLASSES, "float64").clone(dtype=jnp.float64)
    params = jax.tree.map(np.asarray, theirs.params())
    own = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    images = rng.integers(0, 256, (STEPS, BATCH, *shape), np.uint8)
    labels = rng.integers(0, CLASSES, (STEPS, BATCH), np.int32)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return jnp.mean(losses.softmax(logits, labels)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params, images[0] / 255, labels[0])
    keras_logits, keras_grads = theirs.backward(images[0] / 255, labels[0])
    assert np.ptp(keras_logits) > 0.1
    assert_close(logits, keras_logits.numpy(), 1e-10)
    assert min(np.max(np.abs(g)) for g in jax.tree.leaves(grads)) > 1e-4
    assert_close(grads, to_params(spec, [g.numpy() for g in keras_grads]), 1e-10)

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
        theirs.train_step(x / 255, y)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert_close(state.params, theirs.params(), 1e-8)
    final = [np.asarray(w) for w in theirs.model.get_weights()]
    assert all(np.array_equal(a, b) for a, b in zip(final, clear_redundant(spec, final), strict=True))


def test_the_cnn_has_the_size_of_the_keras_example():
    """121,930 parameters, and 64 features per image."""
    model = classifier.build("cnn", CLASSES, "float32")
    images = jnp.zeros((3, 28, 28, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(p.size for p in jax.tree.leaves(variables)) == 121_930
    backbone = {"params": variables["params"]["backbone"]}
    assert jax.eval_shape(CNN().apply, backbone, images).shape == (3, 64)


@pytest.mark.parametrize("size", [4, 8, 9])
def test_the_cnn_refuses_images_that_its_blocks_use_up(size):
    with pytest.raises(UserError, match=f"images of {size} by {size}.*resize"):
        random_variables(classifier.build("cnn", CLASSES, "float32"), images_like(1, size, size, 1))


@pytest.mark.parametrize(
    "spec", ["cnn", "rnn(features=16)", *thorough("mlp(widths=(16,))", "rnn(cell='gru', features=16)")]
)
def test_bfloat16_backbones_have_a_float32_head(spec):
    """Parameters and logits stay float32, features are bfloat16, and the logits are close to those of float32."""
    x = images_like(4, 28, 28, 1)
    low, high = classifier.build(spec, CLASSES, "bfloat16"), classifier.build(spec, CLASSES, "float32")
    variables = random_variables(low, x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    features = jax.eval_shape(low.backbone.apply, {"params": variables["params"]["backbone"]}, x)
    assert features.dtype == jnp.bfloat16
    logits, expected = jax.jit(low.apply)(variables, x), jax.jit(high.apply)(variables, x)
    assert logits.dtype == jnp.float32
    logits, expected = np.asarray(logits), np.asarray(expected)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05 * np.ptp(expected))
    assert (logits != expected).any()


def test_rnn_names_its_cells():
    with pytest.raises(UserError, match=r"'lstm'.*gru"):
        RNN("lstn").init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
