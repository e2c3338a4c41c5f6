"""SimCLR, FixMatch and mean teacher: degenerate inputs, one pass for all images, eight devices, runs without a head."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import programs
from flax import linen as nn
from PIL import Image
from stepped import FLAGS

import launch
from imgclf_jax import losses, step
from imgclf_jax.augment import ops
from imgclf_jax.core import sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Problem
from imgclf_jax.methods.distill import distill
from imgclf_jax.methods.fixmatch import fixmatch, forward_together, pseudo_label_losses
from imgclf_jax.methods.mean_teacher import mean_teacher, ramp_up
from imgclf_jax.methods.simclr import contrast, simclr, supcon
from imgclf_jax.models.backbones import MLP
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.weights import pretrained

pytestmark = pytest.mark.usefixtures("one_device")


def test_collapsed_and_zero_vectors_have_finite_gradients_and_no_accuracy():
    for z in (np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)):
        values, pull, nearest = jax.jit(lambda z: jax.vjp(
            lambda z: contrast(z, np.arange(4) // 2, 0.5), z, has_aux=True))(z)  # fmt: skip
        np.testing.assert_allclose(values, np.log(3), rtol=1e-6)
        assert not nearest.any()
        assert np.isfinite(pull(jnp.ones(4))).all()


def test_simclr_reads_no_label_and_counts_no_prediction():
    given = {"image": batch(16, 0)["image"]}
    assert "correct" not in jax.eval_shape(lambda given: run(simclr(PROBLEM), given, backbone=MLP((7,)))[2], given)


def test_mistakes_get_a_sentence():
    with pytest.raises(UserError, match="single image contrasts nothing; raise batch_size or lower accumulate"):
        run(simclr(PROBLEM), batch(1, 0))


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("simclr") / "run"
    assert launch.main([f"--workdir={workdir}", *FLAGS, "--config.method=simclr", "--config.model=mlp((8,))"]) == 0
    return workdir


def parameters(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    return dict(tree.named_leaves(checkpoints.restore(checkpoints.steps()[-1], optimizer=False)["state"]["params"]))


@pytest.mark.thorough
def test_what_needs_a_head_is_refused_in_one_sentence(pretrained_run, tmp_path, capsys):
    workdir = f"--workdir={pretrained_run}"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    assert "accuracy" not in (pretrained_run / "result.json").read_text()
    assert not [name for name in parameters(pretrained_run) if name.startswith("head")]
    for command in (
        ["evaluate"], ["export", str(tmp_path / "model.stablehlo")],
        ["evaluate", "--corruptions=gaussian_noise"], ["evaluate", "--attack=pgd"],
        ["predict", str(tmp_path / "x.png")], ["serve", "--port=0"],
        ["explain", str(tmp_path / "x.png")],
    ):  # fmt: skip
        assert launch.main([*command, workdir]) == 1
        assert "trains no head, so this run predicts nothing" in capsys.readouterr().err
    shutil.copytree(pretrained_run, tmp_path / "again")
    launch.main(["compare", "--test", str(pretrained_run), str(tmp_path / "again")])
    assert "trains no head, so this run predicts nothing" in "".join(capsys.readouterr())
    assert launch.main(["features", workdir, f"--output={tmp_path / 'features.npz'}"]) == 0


@pytest.mark.thorough
def test_fine_tuning_begins_from_the_backbone_alone(pretrained_run, caplog):
    own = programs((8, 8, 1), 10, init_from=str(pretrained_run), model="mlp(widths=(8,))")
    with caplog.at_level("INFO"):
        taken = pretrained.load(own).taken
    assert "2 arrays taken; a new head (it has none); left out: projector" in caplog.text
    fresh, tuned = (dict(tree.named_leaves(own.init_state(weights=w).params)) for w in (None, taken))
    assert set(tuned) == set(fresh)
    given = parameters(pretrained_run)
    for name, value in tuned.items():
        np.testing.assert_array_equal(value, (fresh if name.startswith("head") else given)[name])


PROBLEM = Problem(
    classes=3, class_names=("a", "b", "c"), image_shape=(6, 6, 1), head_init=nn.initializers.glorot_uniform(),
    supervised=lambda logits, batch: losses.softmax(logits, batch["label"]), steps=lambda text: int(text.rstrip("%")),
    normalization="normalize(0.5)", task=losses.Task.CLASSES, build_augment=lambda text: ops.build(text, train=True),
)  # fmt: skip


class Net(nn.Module):
    """A small backbone with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchNorm(momentum=0.9, name="norm")(nn.Dense(7)(x.reshape(len(x), -1)), train)
        return nn.Dropout(0.2, deterministic=not train)(nn.relu(x))


def augment(key, images, *known):
    return images.astype(jnp.float32) / 255 + 0.3 * jax.random.normal(key, images.shape)


def batch(b=8, u=24):
    rng = np.random.default_rng(0)

    def stream(n):
        images = rng.integers(0, 256, (n, *PROBLEM.image_shape), np.uint8)
        labels = rng.integers(0, 3, n, np.int32)
        return {"image": images, "label": labels, "id": np.arange(n), "epoch": np.zeros(n, np.int32)}

    return {**stream(b), **({"unlabeled": stream(u)} if u else {})}


def run(method, given, devices=1, backbone=None, **kwargs):
    """(state before, state after, sums) of one step of plain SGD at learning rate 1."""
    make = method.model or (lambda backbone, problem: Classifier(backbone, problem.classes))
    model, optimizer = make(backbone or Net(), PROBLEM), optax.sgd(1.0)
    train_step = step.make_train_step(model, method, optimizer, optax.constant_schedule(1.0), augment, **kwargs)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state = sharding.put_replicated(step.init_state(model, optimizer, PROBLEM.image_shape, 0), mesh)
    return state, *jax.jit(train_step)(state, sharding.put_batch(given, mesh))


def test_infinite_logits_below_the_threshold_add_nothing_and_nan_is_told():
    weak = jnp.array([[0.0, 0.1, 0.0], [9.0, 0.0, 0.0], [jnp.nan, 0.0, 0.0]])
    strong = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    values, mask = pseudo_label_losses(weak, strong, 0.95)
    np.testing.assert_allclose(values, [0.0, np.log(3), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(mask, [0, 1, 0])


def test_one_pass_has_the_statistics_of_all_batches():
    batches = [jax.random.normal(jax.random.key(n), (n, 2, 2, 1)) for n in (4, 12, 6)]
    means = forward_together(lambda x: jnp.broadcast_to(x.mean(), (len(x), 1)), batches)
    np.testing.assert_allclose(means[1], np.concatenate([x.ravel() for x in batches]).mean(), rtol=1e-4)


def test_the_weight_ramps_up_as_in_the_paper():
    wanted = [np.exp(-5 * (1 - min(step, 8) / 8) ** 2) for step in range(10)]
    np.testing.assert_allclose([ramp_up(jnp.int32(step), 8) for step in range(10)], wanted, rtol=1e-6)


def test_the_teacher_has_running_statistics_of_its_own():
    state = run(mean_teacher(PROBLEM), batch(u=0))[1].model_state
    means = [x["batch_stats"]["backbone"]["norm"]["mean"] for x in (state["teacher"]["average"], state)]
    assert np.abs(means[0] - means[1]).max() > 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("method", [
    fixmatch(PROBLEM, threshold=0.5, strong="cutout(2)"), mean_teacher(PROBLEM, ramp="2"), simclr(PROBLEM),
    supcon(PROBLEM),
], ids=["fixmatch", "mean_teacher", "simclr", "supcon"])  # fmt: skip
def test_eight_devices_train_as_one(method):
    """Also where each example of the global batch is compared with all others."""
    (before, one, sums), (_, eight, of_eight) = (run(method, batch(), devices=n) for n in (1, 8))
    assert 0 < sums.get("mask_rate", 4) / 8 < 1
    assert np.isfinite(sums["grad_norm"])
    part = "head" if method.predicts else "projector"
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params[part], one.params[part])
    assert all(jax.tree.leaves(changed))
    np.testing.assert_allclose(sums["loss"], of_eight["loss"], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves((state.params, state.model_state)) for state in (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_distillation_needs_probabilities():
    with pytest.raises(UserError, match="distill needs a loss with probabilities"):
        distill(dataclasses.replace(PROBLEM, link=losses.Link(*[np.asarray] * 4)), "run")
