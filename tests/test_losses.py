"""Losses and their links to probabilities, against NumPy, Keras, PyTorch and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import sklearn.utils.class_weight
from cases import thorough
from flax import linen as nn
from scipy.special import expit, log_expit, log_softmax, logsumexp, softmax
from scipy.stats import rankdata
from tolerance import rounding

from imgclf_jax import losses, metrics, step
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Task


def built(text, *of_data):
    return jax.jit(losses.build(text, *of_data))


def draw(b, classes, spread=3.0):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, spread, (b, classes)).astype(np.float32)
    return logits, generator.integers(0, classes, b).astype(np.int32)


def given_as(kind, labels, classes):
    """(what the loss is given, the targets [b, classes] that it means)."""
    generator, one_hot = np.random.default_rng(1), np.eye(classes, dtype=np.float32)[labels]
    if kind == "labels":
        return labels, one_hot
    shares = generator.dirichlet(np.ones(classes), len(labels)).astype(np.float32)
    return (shares if kind == "distributions" else (shares > 1 / classes).astype(np.float32),) * 2


@pytest.mark.parametrize("kind", ["labels", "distributions"])
@pytest.mark.parametrize(("smoothing", "classes", "spread"), [(0, 10, 3), (0.1, 2, 3), (0.9, 10, 3), (0, 3, 999)])
def test_softmax_is_the_cross_entropy_of_its_definition(smoothing, classes, spread, kind):
    """-sum(q log p) in float64, where q mixes the target with the uniform distribution; exp(999) overflows."""
    logits, labels = draw(64, classes, spread)
    given, targets = given_as(kind, labels, classes)
    q = (1 - smoothing) * targets + smoothing / classes
    atol = rounding(classes + 8) * np.abs(logits).max()  # a logarithm of a sum of exponentials
    for loss in (built(f"softmax(label_smoothing={smoothing})"), *[jax.jit(losses.SOFTMAX.nll)] * (not smoothing)):
        out = loss(jnp.asarray(logits), jnp.asarray(given))
        assert (out.shape, out.dtype) == ((64,), jnp.float32)
        np.testing.assert_allclose(out, -(q * log_softmax(logits.astype(np.float64), 1)).sum(1), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["labels", "several labels"])
@pytest.mark.parametrize(("smoothing", "mean"), [(0.0, False), (0.1, True)])
def test_sigmoid_is_the_sum_of_binary_cross_entropies(smoothing, mean, kind):
    """-t log s(x) - (1 - t) log(1 - s(x)) summed over classes in float64; the mean equals Keras's."""
    logits, labels = draw(64, 7)
    given, targets = given_as(kind, labels, 7)
    t = (1 - smoothing) * targets + smoothing / 7
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -(t * np.log(s) + (1 - t) * np.log1p(-s)).sum(1) / (7 if mean else 1)
    atol = rounding(8 + 7) * np.abs(logits).max() * (1 if mean else 7)
    of_spec = built(f"sigmoid(label_smoothing={smoothing}, mean={mean})")
    for loss in (of_spec, *[jax.jit(losses.SIGMOID.nll)] * (not smoothing)):
        np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(given)), expected, rtol=0, atol=atol)
    if mean:
        keras_loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=None)
        np.testing.assert_allclose(keras_loss(t.astype(np.float32), logits), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "distributions"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_its_definition(gamma, kind):
    """-alpha (1 - p)^gamma log p in float64, and Keras's in float32."""
    logits, labels = draw(64, 6)
    given, targets = given_as(kind, labels, 6)

    def definition(x):
        log_p = log_softmax(x.astype(np.float64), 1)
        return -0.25 * (targets * (-np.expm1(log_p)) ** gamma * log_p).sum(1)

    loss = built(f"focal(gamma={gamma}, alpha=0.25)")
    out = loss(jnp.asarray(logits), jnp.asarray(given))
    np.testing.assert_allclose(out, definition(logits), rtol=1e-5, atol=1e-6)
    if gamma:
        keras_loss = keras.losses.CategoricalFocalCrossentropy(0.25, gamma, from_logits=True, reduction=None)
        np.testing.assert_allclose(out, keras_loss(targets, logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_focal_of_a_sure_prediction_has_a_gradient(gamma):
    """A power below 1 of 1 - p has no finite derivative where p is 1 in float32; large logits do not overflow."""
    logits, labels = jnp.asarray([[200.0, 0.0, -200.0], [-1000.0, 0.0, 0.0]]), jnp.asarray([0, 0])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(losses.focal(x, labels, gamma))))(logits)
    np.testing.assert_allclose(value, 1000 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [-1, 0.5, 0.5]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["softmax(label_smoothing=0.2)", "sigmoid", "focal"])
def test_class_weights_multiply_the_loss_of_an_example(text):
    """By numbers, and balanced as scikit-learn has it."""
    logits, labels = map(jnp.asarray, draw(40, 5))
    call, unweighted = spec.parse_one(text), np.asarray(built(text)(logits, labels))
    balanced = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(5), y=np.asarray(labels))
    for given, weights in (((0.5, 1.0, 0.0, 2.0, 1.5), np.array([0.5, 1, 0, 2, 1.5])), ("balanced", balanced)):
        weighted = str(spec.Call(call.name, call.args, call.kwargs | {"class_weights": given}))
        assert losses.needs_class_counts(weighted) == (given == "balanced")
        out = built(weighted, np.bincount(labels).tolist(), "abcde")(logits, labels)
        np.testing.assert_allclose(out, unweighted * weights[labels], rtol=1e-5)


def test_positive_weights_are_pos_weight_of_pytorch():
    """By the formula in the documentation of its `BCEWithLogitsLoss`, in float64."""
    logits, weights = draw(32, 4)[0].astype(np.float64), (1.0, 0.0, 3.5, 0.25)
    targets = np.random.default_rng(1).random((32, 4))
    expected = -(weights * targets * log_expit(logits) + (1 - targets) * log_expit(-logits)).sum(1)
    out = built(f"sigmoid(positive_weights={weights})")(logits, targets)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


# A user's losses: over classes that are not exclusive, and without a declaration.
asymmetric = losses.with_link(losses.SIGMOID)(functools.partial(losses.focal, gamma=1.0))


def plain(logits, labels):
    return logits[:, 0]


@pytest.mark.parametrize(("text", "link"), [
    ("softmax(label_smoothing=0.1)", losses.SOFTMAX), ("focal", losses.SOFTMAX), ("sigmoid(mean=True)", losses.SIGMOID),
    (f"{__name__}:plain", losses.SOFTMAX), (f"{__name__}:asymmetric(class_weights=(1, 2))", losses.SIGMOID),
])  # fmt: skip
def test_a_loss_declares_its_link(text, link):
    assert losses.link_of(text) == losses.link_of(losses.build(text)) == link


@pytest.mark.parametrize(("text", "labels", "says"), [
    ("softmax(label_smoothing=1.0)", [0], r"label_smoothing=1.0: allowed are 0 to below 1"),
    ("softmax(class_weights='balance')", [0], "class_weights='balance': allowed are 3 numbers of 0 or more, one per "),
    ("softmax(class_weights=(1, -1, 1))", [0], "class_weights=.*: allowed"),
    ("softmax(class_weights=(0, 0, 0))", [0], "class_weights=.*, not all 0"),
    ("focal(class_weights='balanced')", [0], "the training split has no example of b, c"),
    ("sigmoid(positive_weights='balanced')", [[0, 1, 1]], "positive_weights='balanced': allowed are 3 numbers"),
    ("softmax(class_weights=(1, 2, 3))", [[0, 1, 0]], "class_weights needs one label per example, .*use positive_"),
    ("sigmoid(0.0, False, (1, 2, 3))", [[0, 1, 1]], "class_weights needs one label per example"),
])  # fmt: skip
def test_arguments_that_no_loss_takes(text, labels, says):
    with pytest.raises(UserError, match=says):
        losses.build(text, (3, 0, 0), "abc")(jnp.zeros((1, 3)), jnp.asarray(labels, float if labels[0] else int))


@pytest.mark.parametrize(("text", "row", "said"), [
    ("softmax", [1, 1, 0], "example 1 has the target [1.0, 1.0, 0.0], with the sum 2; targets must be in [0, 1] and "
                           "sum to 1: divide each row by its sum, or use 'sigmoid'"),
    ("focal", [0.5, 0.4, 0], "with the sum 0.9"),
    ("softmax", [2, -1, 0], "example 1 has the target [2.0, -1.0, 0.0]"),
    ("sigmoid", [0, 37.5, 0], "example 1 has the target [0.0, 37.5, 0.0], with the sum 37.5; targets must be in"),
])  # fmt: skip
def test_targets_that_do_not_fit_the_task_are_told(text, row, said):
    targets, task = np.array([[0, 1, 0], row], np.float32), Task.MULTILABEL if text == "sigmoid" else Task.SOFT
    with pytest.raises(UserError) as e:
        losses.check_targets(text, task, targets)
    assert said in str(e.value)
    losses.check_targets(text, task, targets[:1])


@pytest.mark.parametrize("link", [losses.SOFTMAX, losses.SIGMOID])
@pytest.mark.parametrize("spread", [0.01, 1000.0, *thorough(1.0, 30.0)])
def test_log_odds_are_exact_in_float32(link, spread):
    """log p - log(1 - p) by float64, also where float32 rounds p to 0 or 1, and for the mean p of an ensemble."""
    logits = np.random.default_rng(0).normal(0, spread, (3, 50, 5)).astype(np.float32)
    wide = logits.astype(np.float64)
    rest = np.zeros_like(wide)
    if link is losses.SOFTMAX:
        rest = np.stack([logsumexp(np.delete(wide, c, -1), -1) for c in range(5)], -1)
    np.testing.assert_allclose(jax.jit(link.log_odds)(logits), wide - rest, 1e-6, 1e-6)
    log_p, log_q = wide - np.logaddexp(wide, rest), rest - np.logaddexp(wide, rest)
    mean = logsumexp(log_p, 0) - logsumexp(log_q, 0)
    np.testing.assert_allclose(jax.jit(lambda x: link.log_odds(link.ensemble(x)))(logits), mean, 1e-6, 1e-6)


@pytest.mark.parametrize("logits", [[5.0], [-np.inf, 1.0, 0.0], [0.0, 0.0], [3e38, -3e38]])
def test_log_odds_rank_logits_at_the_limits(logits):
    """One class, an excluded class, equal logits and those that overflow: no NaN, and the order of the logits."""
    odds = np.asarray(jax.jit(losses.SOFTMAX.log_odds)(np.float32(logits)))
    np.testing.assert_array_equal(rankdata(odds), rankdata(logits))
    assert not np.isnan(odds).any()


class Given(nn.Module):
    """A model whose logits are its images, [b, 1, 1, classes], times a parameter."""

    @nn.compact
    def __call__(self, x, train=False):
        return x[:, 0, 0] * self.param("times", nn.initializers.ones, ())


@pytest.mark.parametrize("loss", [
    "softmax", "softmax(label_smoothing=0.2, class_weights=(5.0, 0.1, 1.0, 0.0))", "focal(gamma=2, alpha=4)",
    "sigmoid(label_smoothing=0.3, class_weights=(5.0, 0.1, 1.0, 0.0), mean=True)",
])  # fmt: skip
def test_nll_is_that_of_the_probabilities_whatever_the_loss(loss):
    """For each of two seeds and the ensemble, without padding: in float64, from the probabilities themselves."""
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(0, 3, (12, 4)).astype(np.float32), np.arange(12, dtype=np.int32) % 4
    times, mask = np.float32([1, 0.3]), np.arange(12) < 9
    evaluate = step.make_eval_step(Given(), losses.build(loss), lambda key, images: images, num_seeds=2)
    batch = {"image": logits[:, None, None], "label": labels, "mask": mask}
    found = metrics.summarize(jax.device_get(jax.jit(evaluate)({"times": times}, {}, batch)[0]))

    wide, independent = times[:, None, None] * logits[mask].astype(np.float64), loss.startswith("sigmoid")
    each = expit(wide) if independent else softmax(wide, -1)
    hot = np.eye(4)[labels[mask]]

    def nll(p):
        rest = (1 - hot) * np.log1p(-p) if independent else 0
        return -(hot * np.log(p) + rest).sum(-1).mean()

    expected = [nll(p) for p in each]
    assert found["nll"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["nll_std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-5)
    assert found["ensemble_nll"] == pytest.approx(nll(each.mean(0)), rel=1e-6)
    assert (found["loss"] == pytest.approx(found["nll"])) == (loss == "softmax")
