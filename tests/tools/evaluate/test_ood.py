"""`evaluate --ood` by OpenOOD's formulas in NumPy, and by scikit-learn's curves."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn import metrics as sk

import launch
from imgclf_jax.tools.evaluate import ood
from imgclf_jax.tools.evaluate.intervals import with_intervals

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("rounded", [1, 8])
def test_measures_are_those_of_scikit_learn(rounded):
    """Other images are the positives, and have lower scores. Weights count as repetitions, as in a bootstrap."""
    rng = np.random.default_rng(0)
    values = np.round(np.concatenate([rng.normal(1, 1, 120), rng.normal(0, 1, 80)]), rounded)
    other = np.arange(200) >= 120
    weights = rng.integers(0, 3, (3, 200)).astype(float)
    found = ood.measure(values, other, weights)
    for i, own in enumerate(weights.astype(int)):
        y, s = np.repeat(other, own), np.repeat(-values, own)
        fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
        precision, recall, _ = sk.precision_recall_curve(y, s)
        assert found["AUROC"][i] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
        assert found["FPR95"][i] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
        assert found["AUPR"][i] == pytest.approx(sk.auc(recall, precision), abs=1e-12)


def test_one_other_image_is_in_every_resample():
    values, other = np.append(np.arange(50.0), 20.5), np.arange(51) == 50
    found = with_intervals(lambda weights: ood.measure(values, other, weights), 51, 1, 50)["AUROC"]
    assert found["low"] < found["value"] == 29 / 50 < found["high"]


def test_scores_are_those_of_openood():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    train = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4)) + 3 * np.eye(4)[labels]
    logits, features = rng.normal(size=(7, 3)) * 4, rng.normal(size=(7, 4))
    found = ood.fit(np.float32(train), labels)(np.float32(logits), np.float32(features))
    means = np.stack([train[labels == c].mean(0) for c in range(3)])
    precision = np.linalg.inv(np.cov((train - means[labels]).T, bias=True))
    distances = [[(x - m) @ precision @ (x - m) for m in means] for x in features]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, features)]
    nearest = np.sort(((unit[1][:, None] - unit[0]) ** 2).sum(-1), 1)[:, 49]
    expected = {"maximum softmax": softmax(logits, 1).max(1), "maximum logit": logits.max(1),
                "energy": np.log(np.exp(logits).sum(1)), "Mahalanobis": -np.min(distances, 1),
                "nearest neighbors": -np.sqrt(nearest)}  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.thorough
def test_a_folder_and_a_source_give_the_same(run, seeds, tmp_path, capsys, printed):
    """Of one seed and of two. What names no images is refused."""
    noise = np.random.default_rng(0).integers(256, size=(30, 8, 8), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    np.savez(tmp_path / "noise.npz", x_train=noise[:1], y_train=[0], x_test=noise, y_test=np.arange(30) % 10)
    sources = (str(tmp_path), f"arrays('{tmp_path}/noise.npz')/test", f"arrays('{tmp_path}/noise.npz')")
    for workdir in (run, seeds):
        argv = ["evaluate", f"--workdir={workdir}", "--format=json"]
        results = [json.loads(printed(*argv, f"--ood={text}")) for text in sources]
        assert results[0] == results[1] == results[2]
        assert results[0]["other"] == 30
        assert all(0 <= own["low"] < own["value"] < own["high"] <= 1 for own in results[0]["test"].values())
    assert launch.main(["evaluate", f"--workdir={run}", "--ood=nothing"]) == 1
    assert "--ood=nothing: there is no such file or folder" in capsys.readouterr().err
