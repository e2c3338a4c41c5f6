"""How a loss maps logits to probabilities, in metrics, ensembles and `predict`, against NumPy and SciPy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import linen as nn
from PIL import Image

import launch
from imgclf_jax import losses, metrics, step
from imgclf_jax.data import sources
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import restore

pytestmark = pytest.mark.usefixtures("one_device")

SOURCE = "fake(60, (8, 8, 1), 3)"
PROBABILITIES = {"softmax": functools.partial(scipy.special.softmax, axis=-1), "sigmoid": scipy.special.expit}


@pytest.mark.parametrize("link", [losses.SOFTMAX, losses.SIGMOID])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
def test_log_odds_are_exact_in_float32(link, spread):
    """log p - log(1 - p) by float64, also where float32 rounds p to 0 or 1, and for the mean p of an ensemble."""
    logits = np.random.default_rng(0).normal(0, spread, (3, 50, 5)).astype(np.float32)
    wide = logits.astype(np.float64)
    if link is losses.SOFTMAX:
        others = [scipy.special.logsumexp(np.delete(wide, c, -1), -1) for c in range(5)]
        rest = np.stack(others, -1)
    else:
        rest = np.zeros_like(wide)
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

    name = loss.partition("(")[0].replace("focal", "softmax")
    each = PROBABILITIES[name](times[:, None, None] * logits[mask].astype(np.float64))
    hot = np.eye(4)[labels[mask]]

    def nll(p):
        rest = (1 - hot) * np.log1p(-p) if name == "sigmoid" else 0
        return -(hot * np.log(p) + rest).sum(-1).mean()

    expected = [nll(p) for p in each]
    assert found["nll"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["nll_std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-5)
    assert found["ensemble_nll"] == pytest.approx(nll(each.mean(0)), rel=1e-6)
    assert (found["loss"] == pytest.approx(found["nll"])) == (loss == "softmax")


def test_prediction_follows_the_loss(tmp_path, capsys):
    """The probabilities of a run of two seeds are means of sigmoids in float64, which do not sum to one."""
    argv = [f"--config.data.source={SOURCE}", "--config.preprocess=decode(1)", "--config.model=mlp(widths=(8,))",
            "--config.total=8 steps", "--config.batch_size=16", "--config.loss=sigmoid", "--config.num_seeds=2",
            "--config.schedule=constant(3e-3)", "--config.tensorboard=False", f"--workdir={tmp_path}/run"]  # fmt: skip
    assert launch.main(argv) == 0
    images = sources.open_splits(SOURCE)["test"].read(np.arange(4))["image"]
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    capsys.readouterr()
    words = ["predict", f"--workdir={tmp_path}/run", "--format=json", *(f"{tmp_path}/{i}.png" for i in range(4))]
    assert launch.main(words) == 0
    records = json.loads(capsys.readouterr().out)
    found = [{p["class"]: p["probability"] for p in record["predictions"]} for record in records]

    run = Workdir(tmp_path / "run")
    programs, state, _ = restore(run.load_config(), run, "latest")
    pixels, params = images.astype(np.float32) / np.float32(255), jax.device_get(state.params)
    each = [programs.recipe.model.apply({"params": jax.tree.map(lambda x, i=i: x[i], params)}, pixels) for i in (0, 1)]
    mean = scipy.special.expit(np.asarray(each, np.float64)).mean(0)
    np.testing.assert_allclose([[one[c] for c in "012"] for one in found], mean, rtol=1e-4, atol=1e-6)
    assert all(abs(sum(one.values()) - 1) > 1e-3 for one in found)
