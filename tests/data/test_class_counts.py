"""The number of examples per class: counted from labels if the source has them, and recorded with the run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import FLAGS

import launch
from imgclf_jax import datasets, losses, programs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.source import Source, read_labels
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import restore


def test_labels_by_one_pass_over_what_has_no_known_ones():
    def read(ids):
        return {"image": [b""] * len(ids), "label": (ids % 4 // 2).astype(np.int32)}

    base = {"train": Source(2501, read, ("a", "b", "c"), ""), "more": Source(6, read, ("a", "b", "c"), "")}
    np.testing.assert_array_equal(read_labels(base["train"]), np.arange(2501) % 4 // 2)
    assert read_labels(sources.take_split(base, "train[:3]+more")).tolist() == [0, 0, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.thorough
def test_a_run_records_the_counts_and_is_evaluated_without_its_training_data(tmp_path):
    """The balanced loss on the test split, for a run whose training split is gone."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 8, 16])
    data = {"x_train": rng.integers(0, 256, (64, 6, 6), np.uint8), "y_train": labels,
            "x_test": rng.integers(0, 256, (30, 6, 6), np.uint8), "y_test": np.repeat([0, 1, 2], 10)}  # fmt: skip
    np.savez(tmp_path / "data.npz", **data)
    flags = [*FLAGS, f"--workdir={tmp_path / 'run'}", f"--config.data.source=arrays({str(tmp_path / 'data.npz')!r})"]
    assert launch.main([*flags, "--config.loss=softmax(class_weights='balanced')"]) == 0
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]["class_counts"] == [40, 8, 16]
    workdir = Workdir(tmp_path / "run")
    (tmp_path / "data.npz").unlink()
    programs, state, _ = restore(workdir.load_config(), workdir, "latest")
    images = data["x_test"][..., None].astype(np.float32) / 255
    logits = jax.jit(programs.recipe.model.apply)({"params": state.params}, images)
    own = losses.softmax(logits, jnp.asarray(data["y_test"], jnp.int32))
    weights = 64 / (3 * np.array([40, 8, 16]))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    expected = np.mean(np.asarray(own) * weights[data["y_test"]])
    np.testing.assert_allclose(result["test"]["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(programs.recipe.loss(logits, jnp.asarray(data["y_test"]))), expected, rtol=1e-5)


def test_a_class_without_examples_is_named(fake_config):
    fake_config.data.train, fake_config.loss = "train[:2]", "focal(class_weights='balanced')"
    made = programs.programs_for_images(fake_config, datasets.open_train_images(fake_config))
    with pytest.raises(UserError, match="the training split has no example of 2, 3"):
        _ = made.recipe.loss
