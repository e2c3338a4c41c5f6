"""Classes of an evaluation set without a training example: what is warned of, and what is not."""

import unicodedata

import numpy as np
import pytest

from imgclf_jax.data import sampling, sources, stream
from imgclf_jax.data.arrays import array_source
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import setup
from imgclf_jax.train.unseen_classes import unseen_class_warnings


def images(names, labels, sampled="permutation", **more):
    source = array_source(np.zeros((len(labels), 2, 2, 1), np.uint8), np.array(labels, np.int32), tuple(names), **more)
    return stream.Images(source, "decode(1)", sampler=sampling.build(sampled, source))


E = "Caf\u00e9"


@pytest.mark.parametrize(("names", "train", "test", "said"), [
    (("Cat", "cat", "dog"), [0, 2], [1, 1, 2],
     "2 examples of the evaluation set test are of the class 'cat', which has no training example; did you mean "
     "'Cat'?"),
    (("0", "00", "01", "1"), [1, 2], [0, 3, 3],
     "3 examples of the evaluation set test are of 2 classes, such as '0', which have no training example; did you "
     "mean '00'?"),
    ((unicodedata.normalize("NFD", E), E), [1], [0],
     f"1 example of the evaluation set test is of the class {unicodedata.normalize('NFD', E)!r}, which has no training "
     f"example; did you mean {E!r}?"),
    (("a", "b", "c"), [0, 1], [2, 0],
     "1 example of the evaluation set test is of the class 'c', which has no training example"),
    (("a", "b", "c"), [0, 1, 2], [2, 2], ""),
    (("a", "b", "c"), [0, 1], [0], ""),
])  # fmt: skip
def test_a_class_is_evaluated_that_no_training_example_has(names, train, test, said):
    """Folders `train/Cat` and `test/cat`, or labels 00 and 0 of a table: all examples counted as wrong, silently."""
    assert unseen_class_warnings(images(names, train), {"test": images(names, test)}) == [said] * bool(said)


def test_the_examples_that_a_sampling_leaves_out_train_no_class(tmp_path):
    np.save(tmp_path / "ids.npy", [0, 3])
    evals = {"test": images("abc", [0, 1, 2]), "val": images("abc", [0, 2])}
    for sampled, weights in ((f"subset({str(tmp_path / 'ids.npy')!r})", None), ("weighted", np.array([1, 0, 0, 2]))):
        [sentence] = unseen_class_warnings(images("abc", [0, 1, 1, 2], sampled, weights=weights), evals)
        assert sentence.startswith("1 example of the evaluation set test is of the class 'b'")
    assert unseen_class_warnings(images("abc", [0, 1, 1, 2], "balanced"), evals) == []


def test_data_without_known_labels_draw_no_warning():
    """Targets, and labels that would take a pass over all examples."""
    pixels, labeled = np.zeros((3, 2, 2, 1), np.uint8), images("ab", [0, 1])
    of_targets = stream.Images(array_source(pixels, np.eye(3, 1, dtype=np.float32), ("t",)), "decode(1)")
    unknown = stream.Images(sources.fake(9, (2, 2, 1), 2)["test"], "decode(1)")
    for train, test in ((of_targets, of_targets), (labeled, unknown), (unknown, labeled)):
        assert unseen_class_warnings(train, {"test": test}) == []


def test_a_run_warns(fake_config, tmp_path, caplog):
    images = np.zeros((32, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.arange(32) % 2, x_test=images, y_test=np.arange(32) % 3)
    fake_config.data.source, fake_config.model = f"arrays({str(tmp_path / 'data.npz')!r})", "mlp(widths=(2,))"
    setup.set_up(fake_config, Workdir(tmp_path))
    assert "10 examples of the evaluation set test are of the class '2', which has no training example" in caplog.text
