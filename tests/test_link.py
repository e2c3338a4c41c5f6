"""How a loss maps logits to probabilities, in metrics and ensembles, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import linen as nn

from imgclf_jax import losses, metrics, step

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("link", [losses.SOFTMAX, losses.SIGMOID])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
def test_log_odds_are_exact_in_float32(link, spread):
    """log p - log(1 - p) by float64, also where float32 rounds p to 0 or 1, and for the mean p of an ensemble."""
    logits = np.random.default_rng(0).normal(0, spread, (3, 50, 5)).astype(np.float32)
    wide = logits.astype(np.float64)
    rest = np.zeros_like(wide)
    if link is losses.SOFTMAX:
        rest = np.stack([scipy.special.logsumexp(np.delete(wide, c, -1), -1) for c in range(5)], -1)
    np.testing.assert_allclose(link.log_odds(jnp.asarray(logits)), wide - rest, 1e-6, 1e-6)
    log_p, log_q = wide - np.logaddexp(wide, rest), rest - np.logaddexp(wide, rest)
    mean = scipy.special.logsumexp(log_p, 0) - scipy.special.logsumexp(log_q, 0)
    np.testing.assert_allclose(link.log_odds(link.ensemble(jnp.asarray(logits))), mean, 1e-6, 1e-6)


@pytest.mark.parametrize("logits", [[5.0], [-np.inf, 1.0, 0.0], [0.0, 0.0], [3e38, -3e38]])
def test_log_odds_rank_logits_at_the_limits(logits):
    """One class, an excluded class, equal logits and those that overflow: no NaN, and the order of the logits."""
    odds = np.asarray(losses.SOFTMAX.log_odds(jnp.asarray(logits)))
    np.testing.assert_array_equal(scipy.stats.rankdata(odds), scipy.stats.rankdata(logits))
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
    each = scipy.special.expit(wide) if independent else scipy.special.softmax(wide, -1)
    hot = np.eye(4)[labels[mask]]

    def nll(p):
        rest = (1 - hot) * np.log1p(-p) if independent else 0
        return -(hot * np.log(p) + rest).sum(-1).mean()

    expected = [nll(p) for p in each]
    assert found["nll"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["nll_std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-5)
    assert found["ensemble_nll"] == pytest.approx(nll(each.mean(0)), rel=1e-6)
    assert (found["loss"] == pytest.approx(found["nll"])) == (loss == "softmax")
