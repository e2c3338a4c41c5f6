"""SimCLR and supervised contrastive learning: the papers' equations, and what runs without a trained head give."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import launch
from imgclf_jax import losses, step
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Problem
from imgclf_jax.methods.simclr import contrast, simclr
from imgclf_jax.methods.supcon import supcon

PROBLEM = Problem(
    classes=3, class_names=("a", "b", "c"), image_shape=(6, 6, 1), total=10, head_init=nn.initializers.zeros,
    supervised=losses.softmax, steps=int, normalization="normalize", task=losses.Task.CLASSES, 
    build_augment=lambda text: None,
)  # fmt: skip


class Net(nn.Module):
    """A small backbone."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.relu(nn.Dense(7)(x.reshape(len(x), -1)))


def augment(key, images, *known):
    return images.astype(jnp.float32) / 255 + 0.3 * jax.random.normal(key, images.shape)


def run(method, batch, devices=1, **kwargs):
    """(state before, state after, window) of one step of plain SGD with the learning rate 1."""
    model, optimizer = method.model(Net(), PROBLEM), optax.sgd(1.0)
    train_step = step.make_train_step(model, method, optimizer, optax.constant_schedule(1.0), augment, **kwargs)
    state = step.init_state(model, optimizer, PROBLEM.image_shape, 0)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batch = sharding.put_batch(batch, mesh)
    return state, *jax.jit(train_step)(sharding.put_whole(state, mesh), batch)


def batch(b=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (b, *PROBLEM.image_shape), np.uint8)
    return {"image": images, "label": rng.integers(0, 3, b, np.int32)}


def nt_xent(z, temperature):
    """Equation 1 of arXiv:2002.05709 for each vector, float64; 2k and 2k + 1 are the views of one image."""
    z = z.astype(np.float64)
    sim = lambda i, j: z[i] @ z[j] / np.sqrt(z[i] @ z[i]) / np.sqrt(z[j] @ z[j])  # noqa: E731
    out = []
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        denominator = sum(np.exp(sim(i, k) / temperature) for k in range(len(z)) if k != i)
        out.append(-np.log(np.exp(sim(i, j) / temperature) / denominator))
    return np.array(out)


def l_out(z, labels, temperature):
    """Equation 2 of arXiv:2004.11362 for each vector, float64."""
    z = z.astype(np.float64)
    z /= np.sqrt((z**2).sum(1, keepdims=True))
    out = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        denominator = sum(np.exp(z[i] @ z[a] / temperature) for a in others)
        terms = [np.log(np.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
        out.append(-sum(terms) / len(positives))
    return np.array(out)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_equation_1(temperature):
    z = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    values, nearest = contrast(z, np.arange(10) // 2, temperature)
    np.testing.assert_allclose(values, nt_xent(z, temperature), rtol=2e-5)
    cosine = z @ z.T / np.outer(*[np.linalg.norm(z, axis=1)] * 2) - 9 * np.eye(10)
    np.testing.assert_array_equal(nearest, cosine.argmax(1) // 2 == np.arange(10) // 2)


def test_supcon_is_equation_2():
    """Class 2 has one image, whose only positive is its other view."""
    z = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
    labels = np.repeat([0, 1, 0, 2, 1, 0], 2)
    values, _ = contrast(z, labels, 0.1)
    np.testing.assert_allclose(values, l_out(z, labels, 0.1), rtol=2e-5)
    np.testing.assert_allclose(values[6:8], nt_xent(z, 0.1)[6:8], rtol=2e-5)


def test_a_vector_without_positives_adds_nothing():
    z = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    loss = lambda z: contrast(z, jnp.array([0, 0, 1]), 0.5)[0].sum()  # noqa: E731
    values, nearest = contrast(z, jnp.array([0, 0, 1]), 0.5)
    assert values[2] == 0
    assert nearest[2] == 0
    assert np.isfinite(jax.grad(loss)(z)).all()


def test_collapsed_and_zero_vectors_have_finite_gradients_and_no_accuracy():
    loss = lambda z: contrast(z, jnp.arange(4) // 2, 0.5)[0].sum()  # noqa: E731
    for z in (jnp.zeros((4, 3)), jnp.ones((4, 3))):
        values, nearest = contrast(z, jnp.arange(4) // 2, 0.5)
        np.testing.assert_allclose(values, np.log(3), rtol=1e-6)
        assert not nearest.any()
        assert np.isfinite(jax.grad(loss)(z)).all()


@pytest.mark.parametrize("method", [simclr, supcon])
def test_eight_devices_contrast_the_global_batch(method):
    _, one, sums = run(method(PROBLEM), batch())
    _, eight, of_eight = run(method(PROBLEM), batch(), devices=8)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(sums["loss"], of_eight["loss"], rtol=1e-6)
    assert 0 <= float(sums["contrastive_accuracy"]) == float(of_eight["contrastive_accuracy"])


def test_a_step_trains_backbone_and_projector_and_reads_no_label():
    before, after, sums = run(simclr(PROBLEM), batch())
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert changed["projector"] == {"hidden": {"kernel": True, "bias": True}, "out": {"kernel": True}}
    assert all(jax.tree.leaves(changed["backbone"]))
    assert not any(jax.tree.leaves(changed["head"]))
    assert "correct" not in sums
    unlabeled = {"image": batch()["image"]}
    for a, b in zip(*(jax.tree.leaves(x) for x in (after, run(simclr(PROBLEM), unlabeled)[1])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_contrast_is_within_a_microbatch():
    """So the loss of two microbatches, of 16 vectors each, is below that of the batch: log 31 against log 15."""
    _, _, whole = run(simclr(PROBLEM, temperature=1e6), batch())
    _, _, parts = run(simclr(PROBLEM, temperature=1e6), batch(), accumulate=2)
    np.testing.assert_allclose([whole["loss"] / 16, parts["loss"] / 16], np.log([31, 15]), rtol=1e-4)


def test_nan_in_one_image_is_told():
    def spoiled(key, images, *known):
        return augment(key, images).at[3].set(jnp.nan)

    method, optimizer = simclr(PROBLEM), optax.sgd(1.0)
    model = method.model(Net(), PROBLEM)
    train_step = step.make_train_step(model, method, optimizer, optax.constant_schedule(1.0), spoiled)
    _, sums = jax.jit(train_step)(step.init_state(model, optimizer, PROBLEM.image_shape, 0), batch())
    assert sums["nonfinite_step"] == 0


def test_mistakes_get_a_sentence():
    with pytest.raises(UserError, match="single image; raise batch_size, or lower accumulate"):
        run(simclr(PROBLEM), batch(1))
    with pytest.raises(UserError, match="have targets instead of labels"):
        run(supcon(PROBLEM), {"image": batch()["image"], "target": np.ones((16, 3), np.float32)})
    with pytest.raises(UserError, match=r"simclr\(temperature=0\)"):
        simclr(PROBLEM, temperature=0)
    with pytest.raises(UserError, match=r"supcon\(width=0"):
        supcon(PROBLEM, width=0)


def test_what_needs_a_head_is_refused_in_one_sentence(tmp_path, capsys):
    """Training ends without scores of classes; features are there."""
    workdir = f"--workdir={tmp_path / 'run'}"
    flags = ["--config.method=simclr", "--config.model=mlp(widths=(8,))", "--config.augment=flip_lr|normalize"]
    assert (
        launch.main(
            [
                workdir,
                *flags,
                "--config.total=2 steps",
                "--config.schedule=constant(1e-3)",
                "--config.tensorboard=False",
            ]
        )
        == 0
    )
    assert "accuracy" not in (tmp_path / "run" / "result.json").read_text()
    for command in (
        ["evaluate"], ["report"], ["export", str(tmp_path / "model.stablehlo")], ["evaluate", "--checkpoints=all"],
        ["evaluate", "--corruptions=gaussian_noise"],
    ):  # fmt: skip
        assert launch.main([*command, workdir]) == 1
        assert "trains no head, so this run predicts nothing" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    launch.main(["compare", "--test", str(tmp_path / "run"), str(tmp_path / "again")])
    assert "trains no head, so this run predicts nothing" in "".join(capsys.readouterr())
    assert launch.main(["features", workdir, f"--output={tmp_path / 'features.npz'}"]) == 0
