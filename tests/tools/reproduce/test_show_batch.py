"""`launch.py show-batch`: the ids are the stream's, and the pixels are the model's inputs in training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import launch
from imgclf_jax import datasets, losses, step
from imgclf_jax.augment import mixing, ops
from imgclf_jax.config import default_config
from imgclf_jax.data import sampling, sources, stream
from imgclf_jax.programs import programs_for_images
from imgclf_jax.tools.pages import contact_sheet
from imgclf_jax.tools.reproduce.show_batch import batch_at

pytestmark = pytest.mark.usefixtures("one_device")

K, BATCH, SEED = 7, 12, 5  # in the second epoch
AUGMENT = "flip_lr|flip_alternating|pad_crop(2)|normalize(mean=0.25, std=0.5)|cutout(4)"


class Spy(nn.Module):
    """A model that keeps its inputs as state."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        self.variable("seen", "images", jnp.zeros, images.shape).value = images
        return jnp.zeros((images.shape[0], 4)) + self.param("w", nn.initializers.zeros, ())


@pytest.mark.thorough
def test_the_batch_is_what_the_step_gives_the_model():
    """The whole train step, with a model that keeps its images."""
    config = default_config()
    config.data.source, config.preprocess = "fake(60, (8, 8, 3), 4)", "decode(3)|random_resized_crop(8)"
    config.preprocess_eval, config.total, config.model = "decode(3)|resize(8)", "10 steps", "mlp(widths=(4,))"
    config.seed, config.batch_size, config.augment, config.mix = SEED, BATCH, AUGMENT, "mixup(1.0)"
    images = stream.Images(sources.take_split(datasets.open_data(config), "train"), config.preprocess, SEED)
    programs = programs_for_images(config, images)
    found, raw = (batch_at(programs, images, K, raw) for raw in (False, True))
    assert found.ids.tolist() == sampling.example_ids(SEED, K, BATCH, 60).tolist()
    positions = np.arange(K * BATCH, (K + 1) * BATCH)
    assert found.epochs.tolist() == (positions // 60).tolist()
    given = images.read(found.ids, positions)
    np.testing.assert_array_equal(raw.arrays["image"], given["image"])
    batch = given | {"id": found.ids.astype(np.int32), "epoch": found.epochs.astype(np.int32)}

    schedule = optax.constant_schedule(0.1)
    train_step = step.make_train_step(
        Spy(), losses.build("softmax", (), tuple("0123")), optax.sgd(schedule), schedule,
        ops.build(AUGMENT, train=True), mix=mixing.build(config.mix),
    )  # fmt: skip
    params = {"w": jnp.zeros(())}
    model_state = {"seen": {"images": jnp.zeros((BATCH, 8, 8, 3))}}
    opt_state = optax.sgd(schedule).init(params)
    state = step.TrainState(jnp.uint32(SEED), jnp.int32(K), jnp.int32(0), params, model_state, opt_state)
    seen = jax.jit(train_step)(state, batch)[0].model_state["seen"]["images"]
    np.testing.assert_allclose(found.arrays["image"], seen, rtol=0, atol=1e-6)  # two programs may round differently
    assert np.abs(found.arrays["image"] - np.asarray(seen)).mean() < 1e-8
    np.testing.assert_array_equal(found.arrays["other"], np.roll(given["label"], 1))


def test_the_picture_has_the_pixels():
    """Enlarged by an integer factor, in rows, in the order of the batch."""
    images = np.random.default_rng(0).integers(256, size=(40, 28, 28, 1), dtype=np.uint8)
    sheet = np.asarray(contact_sheet.draw(images, [["id 1", "cat"]] * 40))
    cell, columns = 84 + 6, (1400 - 6) // 90
    for place, image in enumerate(images):
        y, x = 6 + place // columns * (84 + 2 * 15 + 6), 6 + place % columns * cell
        expected = np.repeat(np.repeat(np.repeat(image, 3, 0), 3, 1), 3, 2)
        np.testing.assert_array_equal(sheet[y : y + 84, x : x + 84], expected)


@pytest.mark.thorough
def test_of_a_config_and_of_a_run(tmp_path, monkeypatch, capsys, printed):
    """Without a run only the data are read; for a run its own config applies."""
    monkeypatch.chdir(tmp_path)
    config = {"data.source": "fake(60, (8, 8, 1), 4)", "preprocess": "decode(1)", "batch_size": 12, "total": "10 steps",
              "augment": "pad_crop(2)", "model": "mlp(widths=(4,))", "tensorboard": False,
              "schedule": "constant(1e-3)", "checkpoint_every": "", "eval_every": ""}  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in config.items()]
    found = json.loads(printed("show-batch", f"--step={K}", *words, "--count=5", "--format=json"))
    assert [one["id"] for one in found["examples"]] == sampling.example_ids(0, K, 12, 60)[:5].tolist()
    assert [one["label"] for one in found["examples"]] == [{str(one["id"] % 4): 1.0} for one in found["examples"]]
    assert (tmp_path / "batch-7.png").is_file()
    assert launch.main([*words, "--config.total=2 steps", "--config.num_seeds=2", "--config.seed=3",
                        f"--workdir={tmp_path}/run"]) == 0  # fmt: skip
    out = printed("show-batch", f"--workdir={tmp_path}/run", "--step=1", "--raw").splitlines()
    ids = ", ".join(map(str, sampling.example_ids(3, 1, 12, 60)[:6]))
    assert out == [f"step 1 of 2, the first of 2 seeds: the first 12 of 12 examples, ids {ids}, …",
                   f"wrote {tmp_path}/run/batch-1.png"]  # fmt: skip
    assert (tmp_path / "run" / "batch-1.png").is_file()
    assert launch.main(["show-batch", f"--workdir={tmp_path}/run", "--step=2"]) == 1
    assert "--step=2: must be 0 to 1, because the run has 2 steps" in capsys.readouterr().err
