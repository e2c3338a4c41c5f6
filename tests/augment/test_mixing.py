"""Mixing against NumPy written from the papers, the distributions of weights and boxes, and any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import programs, thorough
from scipy import stats

from imgclf_jax import losses, step
from imgclf_jax.augment import mixing
from imgclf_jax.augment.mixing import cutmix, mixup
from imgclf_jax.core import rng

KEY = jax.random.key(5)


def noise(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def before(x):
    """The partner of each example: the previous one, and the last one for the first."""
    return np.stack([x[i - 1] for i in range(len(x))])


def test_mixup_is_the_papers_convex_combination():
    images = noise(32, 5, 6, 3)
    out, weight = map(np.asarray, jax.jit(mixup, static_argnums=2)(KEY, images, 0.4))
    other = before(images)
    for own, a, b, lam in zip(out, images, other, weight, strict=True):
        np.testing.assert_allclose(own, lam * a + (1 - lam) * b, atol=1e-6)
    assert len(set(weight.tolist())) == 32


@pytest.mark.parametrize("alpha", [0.2, *thorough(1.0)])
def test_one_weight_a_batch_is_the_greater_share_of_a_beta_variate(alpha):
    images = noise(8, 3, 4, 1)
    apply = jax.jit(jax.vmap(mixing.build(f"mixup({alpha}, per_batch=True)"), in_axes=(0, None)))
    out, weight = map(np.asarray, apply(jax.random.split(KEY, 5_000), jnp.asarray(images)))
    assert (weight == weight[:, :1]).all()
    share = weight[:, 0]
    expected = share[:, None, None, None, None] * images + (1 - share[:, None, None, None, None]) * before(images)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    edges = np.array([0.5, 0.6, 0.75, 0.9, 0.99, 1])
    counts = np.histogram(share, edges)[0]
    shares = 2 * np.diff(stats.beta(alpha, alpha).cdf(edges))
    assert stats.chisquare(counts, 5_000 * shares).pvalue > 1e-3


@pytest.mark.parametrize(("h", "w"), [(9, 13), *thorough((8, 8), (1, 4))])
def test_cutmix_is_the_papers_box(h, w):
    """From the same draws: centre, sides, the border, and the weight as the remaining share."""
    n = 200
    images = noise(n, h, w, 2)
    out, weight = map(np.asarray, jax.jit(cutmix, static_argnums=2)(KEY, images, 1.0))
    key_weight, key_y, key_x = jax.random.split(KEY, 3)
    a, b = np.asarray(jax.random.loggamma(key_weight, 1.0, (2, n)), np.float64)
    lam = 1 / (1 + np.exp(b - a))  # a beta variate, as the share of one gamma variate in the sum of two
    centre_y = np.asarray(jax.random.randint(key_y, (n,), 0, h))
    centre_x = np.asarray(jax.random.randint(key_x, (n,), 0, w))
    for i, other in enumerate(before(images)):
        side = np.sqrt(1 - lam[i])
        half_h, half_w = int(h * side) // 2, int(w * side) // 2
        expected = images[i].copy()
        y = slice(max(centre_y[i] - half_h, 0), centre_y[i] + half_h)
        x = slice(max(centre_x[i] - half_w, 0), centre_x[i] + half_w)
        expected[y, x] = other[y, x]
        np.testing.assert_array_equal(out[i], expected)
        pasted = (out[i] != images[i]).any(-1).mean()
        np.testing.assert_allclose(weight[i], 1 - pasted, atol=1e-6)
    assert stats.chisquare(np.bincount(centre_x, minlength=w)).pvalue > 1e-3


def test_the_loss_is_that_of_the_mixed_target():
    """Against cross-entropy with soft targets in NumPy, with label smoothing; and the label that counts."""
    rng_ = np.random.default_rng(0)
    logits, labels = rng_.normal(size=(16, 5)).astype(np.float32), rng_.integers(0, 5, 16)
    weight = rng_.random(16).astype(np.float32)
    loss = losses.build("softmax(label_smoothing=0.1)")
    batch = {"label": labels, "other": before(labels), "weight": weight}
    own = jax.jit(lambda *args: mixing.batch_loss(loss, *args))(logits, batch)
    target = weight[:, None] * np.eye(5)[labels] + (1 - weight[:, None]) * np.eye(5)[before(labels)]
    target = 0.9 * target + 0.1 / 5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(own, -(target * log_p).sum(-1), atol=1e-5)
    wanted = np.where(weight >= 0.5, labels, before(labels))
    counted = step._count_correct(jnp.asarray(logits), batch, losses.SOFTMAX, losses.Task.CLASSES)
    assert counted["correct"] == (logits.argmax(-1) == wanted).sum()


@pytest.mark.thorough
@pytest.mark.parametrize(("text", "shares"), [
    ("mixup(0.2, probability=0.1)|cutmix(probability=0.4)", (0.1, 0.4)),
    ("mixup(0.2)", (1.0, 0.0)),
    ("mixup(0.2)|cutmix", (0.5, 0.5)),
    ("mixup(0.2, 0.3)|cutmix", (0.3, 0.7)),
    ("cutmix(probability=0.25)", (0.0, 0.25)),
    ("cutmix(probability=0)|mixup(probability=1)", (1.0, 0.0)),
])  # fmt: skip
def test_one_op_is_drawn_for_each_batch(text, shares):
    """Recognized by the pixels: mixup creates new values, cutmix does not."""
    mix = jax.jit(jax.vmap(mixing.build(text), in_axes=(0, None)))
    images = np.tile(np.arange(2, dtype=np.float32)[:, None, None, None], (4, 6, 6, 1))
    n = 2_000
    out, weight = map(np.asarray, mix(jax.random.split(KEY, n), images))
    mixed = ((out > 0) & (out < 1)).any((1, 2, 3, 4))
    pasted = ~mixed & (weight < 1).any(1)
    for seen, share in ((mixed, shares[0]), (pasted, shares[1])):
        if share in (0, 1):
            assert seen.mean() == share
        else:
            assert stats.binomtest(int(seen.sum()), n, share).pvalue > 1e-3
    untouched = ~mixed & ~pasted
    np.testing.assert_array_equal(out[untouched], np.broadcast_to(images, out[untouched].shape))


@pytest.mark.thorough
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_trains_on_mixed_images_and_counts_the_main_label(accumulate):
    """Its loss and correct count, computed by hand from the parts."""
    e = programs((6, 6, 1), 3, 1, seed=3, model="mlp(widths=(8,))", loss="softmax(label_smoothing=0.1)")
    state = e.init_state()
    images = np.random.default_rng(0).integers(0, 256, (16, 6, 6, 1), np.uint8)
    labels = np.random.default_rng(1).integers(0, 3, 16).astype(np.int32)
    pure = jax.jit(step.make_train_step(
        e.recipe.model, e.recipe.loss, e.recipe.optimizer, e.recipe.schedule,
        lambda key, x: x.astype(jnp.float32) / 255, mix=mixing.build("mixup(1.0)"), accumulate=accumulate,
    ))  # fmt: skip
    _, sums = pure(state, {"image": jnp.asarray(images), "label": jnp.asarray(labels)})
    key = jax.random.split(rng.key(3, "mix", 0))[1]
    mixed, weight = jax.jit(mixup, static_argnums=2)(key, images / np.float32(255), 1.0)
    own = np.asarray(weight)[:, None]
    target = 0.9 * (own * np.eye(3)[labels] + (1 - own) * np.eye(3)[before(labels)]) + 0.1 / 3
    logits = e.recipe.model.apply(
        {"params": state.params}, mixed, train=True, rngs={"dropout": rng.key(3, "dropout", 0)}
    )
    np.testing.assert_allclose(sums["loss"], -jnp.sum(target * jax.nn.log_softmax(logits)), rtol=1e-5)
    main = np.where(np.asarray(weight) >= 0.5, labels, before(labels))
    assert int(sums["correct"]) == int((np.argmax(np.asarray(logits), -1) == main).sum())


def test_targets_are_mixed_as_their_images_are():
    """A target that is linear in the image stays linear; here, the mean of all pixels."""
    images = noise(6, 4, 4, 1)
    batch = {"image": images, "target": images.mean((1, 2, 3))[:, None]}
    mixed = jax.device_get(jax.jit(lambda batch: mixing.mix_batch(mixing.build("mixup(1.0)"), KEY, batch))(batch))
    assert set(mixed) == {"image", "target"}
    np.testing.assert_allclose(mixed["target"][:, 0], mixed["image"].mean((1, 2, 3)), rtol=1e-5)
    assert np.abs(mixed["target"] - batch["target"]).max() > 0.01
