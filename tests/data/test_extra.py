"""Extra streams: the specs in `data.extra`, and their batches next to those of the training split."""

import jax
import numpy as np
import pytest

from imgclf_jax import datasets, programs
from imgclf_jax.core import rng, sharding
from imgclf_jax.data import placement, sources, stream

MORE = {"unlabeled": "fake(30, (5, 6, 3), 4)/train|batch_size(24)|preprocess('decode(3)|resize(4, 7)')"
                     "|sampling('balanced')", "held": "train[50%:]"}  # fmt: skip


@pytest.fixture
def config(fake_config):
    fake_config.batch_size = 16
    with fake_config.unlocked():
        fake_config.data.extra = MORE
    return fake_config


def spec_of(config, **changes):
    sizes = tuple((name, one.batch_size) for name, one in datasets.extra_streams(config).items())
    return stream.StreamSpec(**{"seed": 5, "batch_size": 16, "num_seeds": 2, "extra": sizes} | changes)


def test_what_a_spec_says(config):
    config.data.extra.held = "train[10%:]+test"
    assert datasets.extra_streams(config) == {
        "held": datasets.ExtraStream("", "train[10%:]+test", 16, "decode(1)", "permutation"),
        "unlabeled": datasets.ExtraStream("fake(30, (5, 6, 3), 4)", "train", 24, "decode(3)|resize(4, 7)", "balanced"),
    }
    for text, source, split in [("digits()", "digits()", ""), ("folder('a|b/c')", "folder('a|b/c')", ""),
                                ("folder('a/b')/test[5:]", "folder('a/b')", "test[5:]")]:  # fmt: skip
        config.data.extra.held = f"{text}|batch_size(8)"
        assert datasets.extra_streams(config)["held"] == datasets.ExtraStream(
            source, split, 8, "decode(1)", "permutation"
        )


def test_streams_do_not_touch_each_other(config):
    """Adding or renaming a stream changes no other, and no seed shares a stream with another name."""
    images = datasets.open_train_images(config)
    [(_, whole)] = stream.batches(images, spec_of(config), [3])
    [(_, alone)] = stream.batches(images, spec_of(config, extra=(("held", 16),)), [3])
    [(_, none)] = stream.batches(images, spec_of(config, extra=()), [3])
    jax.tree.map(np.testing.assert_array_equal, alone, {k: v for k, v in whole.items() if k != "unlabeled"})
    jax.tree.map(np.testing.assert_array_equal, none, {k: whole[k] for k in ("image", "label")})
    images.extra["renamed"] = images.extra["held"]
    [(_, other)] = stream.batches(images, spec_of(config, extra=(("renamed", 16),)), [3])
    assert other["renamed"]["id"].tolist() != whole["held"]["id"].tolist()


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_batch_holds_those_of_the_further_streams(config, place):
    """For both seeds, interleaved; keyed by seed, name and step; with the shapes that the programs expect."""
    images, spec, mesh = datasets.open_train_images(config), spec_of(config), sharding.make_mesh()
    shapes = programs.programs_for_images(config, images).batch_shape
    assert {name: shapes[name]["image"].shape for name in MORE} == {"unlabeled": (24, 4, 7, 3), "held": (16, 12, 12, 1)}
    base = {"unlabeled": sources.open_splits("fake(30, (5, 6, 3), 4)")["train"],
            "held": sources.take_split(datasets.open_data(config), "train[50%:]")}  # fmt: skip
    for step, batch in placement.batches(place, images, spec, [2, 3], mesh):
        assert batch.keys() == {"image", "label", *MORE}
        assert batch["image"].shape == (32, 12, 12, 1)
        for name in MORE:
            b = len(shapes[name]["label"])
            assert {k: (v.shape, v.dtype) for k, v in batch[name].items()} == {
                k: ((2 * b, *v.shape[1:]), v.dtype) for k, v in shapes[name].items()}  # fmt: skip
            for seed in (5, 6):
                at = np.arange(step * b, (step + 1) * b)
                ids = images.extra[name].sampler.ids(seed ^ rng.name_hash(name), at)
                own = {k: np.asarray(v)[seed - 5 :: 2] for k, v in batch[name].items()}
                np.testing.assert_array_equal(own["id"], ids)
                np.testing.assert_array_equal(own["label"], base[name].read(ids)["label"])
                np.testing.assert_array_equal(own["image"], images.extra[name].read(ids, at)["image"])
    assert np.asarray(batch["unlabeled"]["label"])[::2].reshape(-1, 4).sum(1).tolist() == [6] * 6  # balanced


def test_any_process_reads_its_rows_of_every_stream(config):
    images, spec = datasets.open_train_images(config), spec_of(config)
    [(_, whole)] = stream.batches(images, spec, [3])
    rows = {16: np.arange(1, 16, 2), 24: np.arange(6, 12)}
    [(_, part)] = stream.batches(images, spec, [3], rows.__getitem__)
    for own, all_, size in ((part, whole, 16), *((part[name], whole[name], size) for name, size in spec.extra)):
        for name in ("image", "label"):
            expected = all_[name].reshape(-1, 2, *all_[name].shape[1:])[rows[size]]
            np.testing.assert_array_equal(own[name].reshape(expected.shape), expected)
