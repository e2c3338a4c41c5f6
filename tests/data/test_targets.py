"""Targets f32[n, k] instead of labels, from files and the user's own sources, in every batch."""

import dataclasses

import jax
import numpy as np
import pytest
from test_arrays import npz

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sampling, sources, stream
from imgclf_jax.data.source import Source, read_examples
from imgclf_jax.programs import programs_for_images
from imgclf_jax.train.evaluation import check_targets

N, K = 40, 3
X = np.random.default_rng(0).integers(0, 256, (N, 5, 4, 1), np.uint8)
T = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)
NAMES = ("height", "width", "age")


def regression(targets=T):
    """A user's own source with targets, whose images are decoded each time."""
    return Source(N, lambda ids: {"image": X[ids]}, NAMES, "own", targets)


@pytest.mark.parametrize(("dtype", "shape"), [("f8", (K,)), ("f4", ()), ("u1", (14,))])
def test_arrays_read_targets(tmp_path, dtype, shape):
    y = (np.random.default_rng(2).normal(size=(N, *shape)) * 5).astype(dtype)
    source = sources.open_splits(npz(tmp_path, x_train=X, train_targets=y, test_images=X, test_targets=y))["test"]
    examples = read_examples(source, np.array([3, 1, 3]))
    assert examples.keys() == {"image", "target"}
    assert examples["target"].dtype == np.float32
    np.testing.assert_array_equal(examples["target"], y.reshape(N, -1)[[3, 1, 3]].astype(np.float32))
    assert source.target_names == (tuple(map(str, range(*shape))) if shape else ("target",))


@pytest.mark.parametrize(("data", "message"), [
    ({"x_train": X, "y_train": T[:, 0] > 0, "train_targets": T}, "holds x_train and "),
    ({"x_train": X, "train_targets": T, "x_test": X, "y_test": np.arange(N)},
     "holds y_test and train_targets; give every split labels, or every split targets"),
    ({"x_train": X, "train_targets": np.where(T.max() == T, np.nan, T)}, "is nan; targets must be finite"),
    ({"x_train": X, "train_targets": np.where(T.max() == T, 1e39, T.astype(float))}, "is inf; targets must be finite"),
    ({"x_train": X, "train_targets": T[:5]}, "x_train is uint8[40, 5, 4, 1] and train_targets is float32[5, 3]"),
    ({"x_train": X, "train_targets": T.astype(complex)}, "train_targets is complex128[40, 3]; expected"),
    ({"x_train": X, "train_targets": T, "class_names": ["a", "b"]}, "targets are float32[40, 3]; expected"),
    ({"x_train": X, "train_targets": T, "class_names": NAMES, "target_names": NAMES}, "keep one"),
    ({"x_train": X, "train_targets": T, "x_test": X, "test_targets": T[:, :2]}, "test_targets: Source: targets"),
])  # fmt: skip
def test_targets_in_arrays_are_checked(tmp_path, data, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(npz(tmp_path, **data))
    assert message in str(e.value)


def test_splits_read_targets():
    base = {"train": regression(), "extra": regression(-T), "labels": sources.fake(8, (5, 4, 1))["train"]}
    source = sources.take_split(base, "train[30:]+extra[5:20]")
    order = np.random.default_rng(0).permutation(source.size)
    examples = read_examples(source, order)
    assert examples.keys() == {"image", "target"}
    np.testing.assert_array_equal(examples["target"], np.concatenate([T[30:], -T[5:20]])[order])
    assert source.target_names == NAMES
    with pytest.raises(UserError, match=r"split 'train\+labels': it joins splits with labels and splits with targets"):
        sources.take_split(base, "train+labels")


@pytest.mark.parametrize("place", ["host", "device"])
def test_batches_hold_the_targets_of_their_examples(place):
    """With either placement, interleaved for several seeds, and with the shapes that the programs expect."""
    mesh, images = sharding.make_mesh(), stream.Images(regression(), "decode(1)", 5)
    spec = stream.StreamSpec(5, 16, num_seeds=2)
    shapes = placement.batch_shape(spec.rows, images.shape, K, mesh)
    for step, batch in placement.batches(place, images, spec, range(2, 5), mesh):
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
        for seed in (5, 6):
            ids = sampling.example_ids(seed, step, 16, N)
            np.testing.assert_array_equal(batch["target"][seed - 5 :: 2], T[ids])
            np.testing.assert_array_equal(batch["image"][seed - 5 :: 2], X[ids])


def test_targets_of_all_examples_and_streams_fit_the_loss(fake_config):
    soft = np.eye(3, dtype=np.float32)[np.arange(N) % 3]
    fits = regression(soft)
    wrong = dataclasses.replace(regression(np.where(np.arange(N)[:, None] == 37, 40 * soft - 3, soft)),
                                example_name="cats/{}.jpg".format)  # fmt: skip
    fake_config.loss, fake_config.preprocess = "sigmoid", "decode(1)"
    programs = programs_for_images(fake_config, stream.Images(fits, "decode(1)"))
    for source, extra in ((wrong, fits), (fits, wrong)):
        images = stream.Images(source, "decode(1)", extra={"more": stream.Images(extra, "decode(1)")})
        with pytest.raises(UserError, match=r"^loss='sigmoid': cats/37.jpg has the target \[-3.0, 37.0, -3.0\]"):
            check_targets(programs, images)
    check_targets(programs, stream.Images(fits, "decode(1)"))
