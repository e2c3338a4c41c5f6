"""SimCLR and supervised contrastive learning: degenerate features, and the outputs of runs without a trained head."""

import shutil

import jax
import numpy as np
import pytest
from cases import programs
from PIL import Image
from stepped import FLAGS
from test_semi_supervised import PROBLEM, batch, run

import launch
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods.simclr import contrast, simclr
from imgclf_jax.models.backbones import MLP
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.weights import pretrained

pytestmark = pytest.mark.usefixtures("one_device")


def test_collapsed_and_zero_vectors_have_finite_gradients_and_no_accuracy():
    for z in (np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)):
        values, nearest = contrast(z, np.arange(4) // 2, 0.5)
        gradients = jax.grad(lambda z: contrast(z, np.arange(4) // 2, 0.5)[0].sum())(z)
        np.testing.assert_allclose(values, np.log(3), rtol=1e-6)
        assert not nearest.any()
        assert np.isfinite(gradients).all()


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
    return dict(tree.named_leaves(checkpoints.restore_any(checkpoints.steps()[-1])["state"]["params"]))


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
