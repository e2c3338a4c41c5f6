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


def plain_loss(logits, labels):
    """A user's loss without declarations."""
    return losses.softmax(logits, labels)


@losses.with_link(losses.SIGMOID)
def declared_loss(logits, labels, scale=1.0):
    """A user's loss over classes that are not exclusive."""
    return scale * losses.sigmoid(logits, labels)


@pytest.mark.parametrize(("loss", "link"), [
    ("softmax(label_smoothing=0.1)", losses.SOFTMAX), ("focal", losses.SOFTMAX), ("sigmoid(mean=True)", losses.SIGMOID),
    (f"{__name__}:plain_loss", losses.SOFTMAX), (f"{__name__}:declared_loss(scale=2.0)", losses.SIGMOID),
])  # fmt: skip
def test_each_loss_has_a_link(loss, link):
    """By its spec, with arguments bound; a user's own loss declares one, or has the softmax."""
    assert losses.link_of(loss) == link
    assert losses.link_of(losses.build(loss)) == link


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


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_an_ensemble_has_the_mean_probabilities(name, float64):
    """Its logits, passed to the link, are these probabilities, and passed to the loss give the loss of this mean."""
    logits = np.random.default_rng(0).normal(0, 4, (5, 20, 6))
    link, probabilities = losses.link_of(name), PROBABILITIES[name](logits)
    np.testing.assert_allclose(link.probabilities(jnp.asarray(logits)), probabilities, rtol=1e-12)
    together = link.ensemble(jnp.asarray(logits))
    mean = probabilities.mean(0)
    np.testing.assert_allclose(link.probabilities(together), mean, rtol=1e-12)
    labels = np.arange(20, dtype=np.int32) % 6
    hot = np.eye(6)[labels]
    expected = -np.log(mean[np.arange(20), labels]) if name == "softmax" else (
        -(hot * np.log(mean) + (1 - hot) * np.log1p(-mean)).sum(-1))  # fmt: skip
    np.testing.assert_allclose(losses.build(name)(together, jnp.asarray(labels)), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_an_ensemble_of_sure_models_is_finite(name):
    """Where float32 rounds every probability to 0 or 1."""
    logits = jnp.asarray([[[300.0, -300.0]], [[200.0, -200.0]]])
    together = losses.link_of(name).ensemble(logits)
    assert np.isfinite(together).all()
    assert np.argmax(together) == 0
    # The second class has exp(-600) and exp(-400) by the softmax, exp(-300) and exp(-200) by the sigmoid: the greater
    # of both, halved, is the mean.
    second = together[0, 1] - together[0, 0] if name == "softmax" else together[0, 1]
    np.testing.assert_allclose(second, (-400 if name == "softmax" else -200) - np.log(2), rtol=1e-5)


class Given(nn.Module):
    """A model whose logits are its images, [b, 1, 1, classes], times a parameter."""

    @nn.compact
    def __call__(self, x, train=False):
        return x[:, 0, 0] * self.param("times", nn.initializers.ones, ())


@pytest.mark.parametrize("loss", [
    "softmax", "softmax(label_smoothing=0.2, class_weights=(5.0, 0.1, 1.0, 0.0))", "focal(gamma=2, alpha=4)",
    "sigmoid(label_smoothing=0.3, class_weights=(5.0, 0.1, 1.0, 0.0), mean=True)",
    f"{__name__}:plain_loss", f"{__name__}:declared_loss(scale=2.0)",
])  # fmt: skip
def test_nll_is_that_of_the_probabilities_whatever_the_loss(loss):
    """For each of two seeds and the ensemble, without padding: in float64, from the probabilities themselves."""
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(0, 3, (12, 4)).astype(np.float32), np.arange(12, dtype=np.int32) % 4
    times, mask = np.float32([1, 0.3]), np.arange(12) < 9
    evaluate = step.make_eval_step(Given(), losses.build(loss), lambda key, images: images, num_seeds=2)
    batch = {"image": logits[:, None, None], "label": labels, "mask": mask}
    found = metrics.summarize(jax.device_get(jax.jit(evaluate)({"times": times}, {}, batch)[0]))

    name = "sigmoid" if losses.link_of(loss) == losses.SIGMOID else "softmax"
    each = PROBABILITIES[name](times[:, None, None] * logits[mask].astype(np.float64))
    hot = np.eye(4)[labels[mask]]

    def nll(p):
        rest = (1 - hot) * np.log1p(-p) if name == "sigmoid" else 0
        return -(hot * np.log(p) + rest).sum(-1).mean()

    expected = [nll(p) for p in each]
    assert found["nll"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["nll_std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-5)
    assert found["ensemble_nll"] == pytest.approx(nll(each.mean(0)), rel=1e-6)
    plain = loss == "softmax" or loss.endswith("plain_loss")
    assert (found["loss"] == pytest.approx(found["nll"])) == plain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two seeds with the loss `sigmoid`."""
    folder = tmp_path_factory.mktemp("link")
    argv = [f"--config.data.source={SOURCE}", "--config.preprocess=decode(1)", "--config.model=mlp(widths=(8,))",
            "--config.total=8 steps", "--config.batch_size=16", "--config.loss=sigmoid", "--config.metrics=auc",
            "--config.schedule=constant(3e-3)", "--config.num_seeds=2", "--config.tensorboard=False"]  # fmt: skip
    assert launch.main([*argv, f"--workdir={folder}"]) == 0
    return Workdir(folder)


def by_hand(run, images):
    """The mean over seeds of the sigmoid of the logits, in float64; and that of each seed."""
    programs, state, _ = restore(run.load_config(), run, "latest")
    pixels = images.astype(np.float32) / np.float32(255)
    params = jax.device_get(state.params)
    apply = jax.jit(programs.recipe.model.apply)
    each = [apply({"params": jax.tree.map(lambda x, i=i: x[i], params)}, pixels) for i in range(2)]
    probabilities = scipy.special.expit(np.asarray(each, np.float64))
    return probabilities.mean(0), probabilities


@pytest.mark.thorough
def test_evaluation_follows_the_loss(run):
    """Loss, AUC and accuracy of the ensemble, and the mean of the seeds' losses."""
    from sklearn.metrics import roc_auc_score

    examples = sources.open_splits(SOURCE)["test"].read(np.arange(60))
    labels, hot = examples["label"], np.eye(3)[examples["label"]]
    mean, each = by_hand(run, examples["image"])

    def loss(p):
        return np.mean(-(hot * np.log(p) + (1 - hot) * np.log1p(-p)).sum(-1))

    result = json.loads(run.result.read_text())["test"]
    assert result["loss"] == pytest.approx(np.mean([loss(p) for p in each]), rel=1e-4)
    assert result["ensemble_loss"] == pytest.approx(loss(mean), rel=1e-4)
    assert result["nll"] == result["loss"]  # `sigmoid` without arguments is the likelihood itself
    assert result["ensemble_nll"] == result["ensemble_loss"]
    assert result["ensemble_accuracy"] == np.mean(mean.argmax(-1) == labels)
    areas = [roc_auc_score(labels == c, mean[:, c]) for c in range(3)]
    assert result["ensemble_auc"] == pytest.approx(np.mean(areas), abs=2e-3)  # near ties may fall either way


def test_prediction_follows_the_loss(run, tmp_path, capsys):
    """The probabilities are means of sigmoids, which do not sum to one."""
    images = sources.open_splits(SOURCE)["test"].read(np.arange(4))["image"]
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    capsys.readouterr()
    assert launch.main(["predict", f"--workdir={run.path}", "--format=json", str(tmp_path)]) == 0
    records = json.loads(capsys.readouterr().out)
    found = [{p["class"]: p["probability"] for p in record["predictions"]} for record in records]
    mean, _ = by_hand(run, images)
    np.testing.assert_allclose([[one[c] for c in "012"] for one in found], mean, rtol=1e-4, atol=1e-6)
    assert all(abs(sum(one.values()) - 1) > 1e-3 for one in found)
