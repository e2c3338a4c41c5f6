"""TTA views against the same computed by hand, their weights, and the config key in evaluation and prediction."""

import jax
import numpy as np
import pytest
from cases import programs, thorough

from imgclf_jax import metrics
from imgclf_jax.augment import tta
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 7, 9, 3), np.uint8)
AUGMENT = "flip_lr|normalize(mean=0.4, std=0.3)"


@pytest.fixture(scope="module")
def trained():
    """A network whose logits depend on every pixel, its parameters, and its inputs for IMAGES."""
    e = programs((7, 9, 3), 3, augment=AUGMENT)
    state = e.init_state()
    seen = ((IMAGES / 255 - 0.4) / 0.3).astype(np.float32)
    apply = jax.jit(lambda images: e.recipe.model.apply({"params": state.params}, images, train=False))
    return e, state, seen, apply


def moved(images, dy, dx):
    """The image moved down by dy and right by dx, mirrored at the border."""
    pad = max(abs(dy), abs(dx))
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    h, w = images.shape[1:3]
    return padded[:, pad - dy : pad - dy + h, pad - dx : pad - dx + w]


def by_hand(text, x, logits):
    def mirrored(x):
        return 0.5 * logits(x) + 0.5 * logits(x[:, :, ::-1])

    def of_translated(f, pad):
        return 0.5 * f(x) + 0.25 * f(moved(x, pad, pad)) + 0.25 * f(moved(x, -pad, -pad))

    return {
        "": lambda: logits(x),
        "flip": lambda: mirrored(x),
        "translate(2)": lambda: of_translated(logits, 2),
        "flip|translate(1)": lambda: of_translated(mirrored, 1),
    }[text]()


@pytest.mark.parametrize("text", ["flip|translate(1)", *thorough("", "flip", "translate(2)")])
def test_logits_are_those_averaged_by_hand(trained, text):
    """flip|translate(1) as in airbench94: half the original image, a quarter each of two translations, mirrored too."""
    _, _, seen, logits = trained
    expected = by_hand(text, seen, logits)
    views = tta.build(text)
    assert len(views) == {"": 1, "flip": 2, "translate(2)": 3, "flip|translate(1)": 6}[text]
    assert sum(weight for weight, _ in views) == 1
    found = jax.jit(lambda x: tta.mean_logits(views, logits, x))(seen)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("views", [[], [(0.0, abs)], [(1.0, abs), (-1.0, abs)], [abs], None])
def test_views_without_a_mean(views, monkeypatch):
    monkeypatch.setitem(tta.VIEWS, "flip", lambda: views)
    with pytest.raises(UserError, match=r"tta='flip': flip must return \[\(weight, function\), …\] with a sum of w"):
        tta.build("flip")


def test_the_config_key_reaches_evaluation_and_prediction(trained):
    """On eight devices, with the batch reduced by the number of views; an evaluation counts every example once."""
    plain, state, seen, logits = trained
    e = programs((7, 9, 3), 3, augment=AUGMENT, tta="flip|translate(1)")
    assert (plain.eval_batch_size, e.eval_batch_size) == (16, 8)
    expected = np.asarray(by_hand("flip|translate(1)", seen, logits))
    labels = np.random.default_rng(1).integers(0, 3, 16).astype(np.int32)
    state = sharding.put_replicated(state, e.mesh)
    correct = 0
    for first in (0, 8):
        rows = slice(first, first + 8)
        batch = {"image": IMAGES[rows], "label": labels[rows], "mask": np.ones(8, bool)}
        sums, _ = e.eval(state.params, {}, sharding.put_batch(batch, e.mesh))
        correct += metrics.summarize({name: x[0] for name, x in jax.device_get(sums).items()})["accuracy"] * 8
    assert correct == (expected.argmax(-1) == labels).sum()
    softmax = np.exp(expected - expected.max(-1, keepdims=True))
    placed = sharding.put_batch({"image": IMAGES}, e.mesh)["image"]
    found = e.inference("predict")(state.params, {}, placed)
    np.testing.assert_allclose(found, softmax / softmax.sum(-1, keepdims=True), atol=1e-5)
