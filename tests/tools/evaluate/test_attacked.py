"""`evaluate --attack` and `--corruptions`: a linear model's worst case in closed form, and the authors' corruptions.

`fixtures/corruptions.npz` has what `make_cifar_c.py` and `make_imagenet_c.py` of github.com/hendrycks/robustness return
for the pictures of this file: whole images of 32 pixels, two rows of those of 224.
"""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import corrupted
from imgclf_jax.tools.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from imgclf_jax.train.evaluation import open_evals
from imgclf_jax.trained import restore

EPS = 0.15
FGSM = f"pgd(eps={EPS}, steps=1, step_size={EPS}, random_start=False)"
SETTINGS = ("--config.preprocess=decode(1)", "--config.augment=flip_lr|normalize(0.4, 0.3)", "--config.batch_size=96",
            "--config.model=mlp(widths=())", "--config.total=6 epochs", "--config.schedule=constant(2e-2)",
            "--config.eval_every=6 epochs", "--config.data.eval.test=test[:50%]",
            "--config.tensorboard=False")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A softmax regression of the digits, 8 x 8, of one seed and of two; 180 of them are evaluated."""
    folder = tmp_path_factory.mktemp("attacked")
    for seeds in (1, 2):
        assert launch.main([f"--workdir={folder / str(seeds)}", *SETTINGS, f"--config.num_seeds={seeds}"]) == 0
    return Workdir(folder / "1"), Workdir(folder / "2")


def evaluated(run, printed, *words):
    return json.loads(printed("evaluate", f"--workdir={run.path}", "--format=json", *words))


@pytest.mark.thorough
def test_one_step_on_a_linear_model_is_the_closed_form(runs, printed):
    """The gradient of the loss is kernel (p - onehot), so the step is eps times its sign, clipped to 0 to 1."""
    linear, config = runs[0], runs[0].load_config()
    programs, state, _ = restore(config, linear, "")
    (images,) = open_evals(programs, datasets.open_data(config)).values()
    given = images.read(np.arange(180), np.arange(180))
    x, labels = given["image"].reshape(180, -1) / 255.0, given["label"]
    kernel, bias = (np.float64(state.params["head"][name]) for name in ("kernel", "bias"))
    logits = (x - 0.4) / 0.3 @ kernel + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    worst = np.clip(x + EPS * np.sign((p - np.eye(10)[labels]) @ kernel.T), 0, 1)
    of_worst = (worst - 0.4) / 0.3 @ kernel + bias
    nll = np.log(np.exp(of_worst).sum(1)) - of_worst[np.arange(len(x)), labels]
    before = sorted(linear.path.iterdir())
    found = evaluated(linear, printed, f"--attack={FGSM}")
    assert sorted(linear.path.iterdir()) == before  # nothing that `compare` may take for clean predictions
    clean = evaluated(linear, printed)
    assert found["test"]["examples"] == 180
    assert found["test"]["accuracy"] == clean["test"]["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert found["test"]["nll"] == pytest.approx(clean["test"]["nll"], rel=1e-6)
    assert found["test"]["attacked_accuracy"] == np.mean(of_worst.argmax(1) == labels)
    assert found["test"]["attacked_nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["attack"] == FGSM
    assert found["step"] == clean["step"]


@pytest.mark.thorough
def test_several_seeds_are_attacked_each_by_itself(runs, printed):
    """The mean of two, of which the first is that of the run of one seed."""
    one, two = (evaluated(run, printed, f"--attack={FGSM}")["test"] for run in runs)
    for name in ("accuracy", "nll", "attacked_accuracy", "attacked_nll"):
        assert abs(one[name] - two[name]) == pytest.approx(two[f"{name}_std"] / 2**0.5, rel=1e-3), name


@pytest.mark.thorough
def test_accuracies_are_those_of_images_corrupted_by_hand(runs, printed):
    """On one device with a batch size that does not divide the examples, too. The table has the same numbers."""
    run, words = runs[1], "--corruptions=contrast, gaussian_noise"
    found = evaluated(run, printed, words)["test"]
    config = run.load_config()
    trained = restore(config, run, "")
    (images,) = open_evals(trained.programs, datasets.open_data(config)).values()
    positions = np.arange(len(images))
    batch = images.read(positions, positions)

    def accuracy(shown):
        return np.mean(trained.predict(shown).argmax(-1) == batch["label"])

    wanted = {name: [accuracy(np.stack([corrupt(name, severity, image, i) for i, image in enumerate(batch["image"])]))
                     for severity in SEVERITIES] for name in ("contrast", "gaussian_noise")}  # fmt: skip
    assert (found["examples"], found["clean"]) == (180, pytest.approx(accuracy(batch["image"])))
    assert found["clean"] > 0.5
    for name, own in wanted.items():
        assert found["corruptions"][name] == {"severities": pytest.approx(own), "mean": pytest.approx(np.mean(own))}
    assert found["mean_corruption_accuracy"] == pytest.approx(np.mean(list(wanted.values())))
    assert wanted["contrast"][4] < wanted["contrast"][0]
    lines = printed("evaluate", f"--workdir={run.path}", words).splitlines()
    row = next(line for line in lines if "contrast" in line)
    cells = [cell.strip() for cell in row.strip("│|\n ").split("│")]
    assert cells == ["contrast", *(f"{value:.4f}" for value in (*wanted["contrast"], np.mean(wanted["contrast"])))]

    one = sharding.make_mesh(jax.devices()[:1])
    with config.unlocked():
        config.batch_size = 41
    alone = Programs(Recipe(config, trained.programs.recipe.data), one)
    state = sharding.put_replicated(jax.tree.map(np.asarray, trained.state), one)
    again = corrupted.measure(alone, state, images, ["gaussian_noise"])
    assert [again["gaussian_noise", s] for s in SEVERITIES] == found["corruptions"]["gaussian_noise"]["severities"]


def picture(side: int, channels: int = 3, height: int = 0) -> np.ndarray:
    """Smooth color waves with hard edges, noise, black and white in them: uint8[height, side, channels]."""
    random = np.random.default_rng(side + channels)
    h = height or side
    y, x = np.mgrid[:h, :side] / side
    out = np.empty((h, side, channels))
    for c in range(channels):
        a, b, p = random.uniform(1, 9, 3)
        out[..., c] = 128 + 100 * np.sin(a * x + p) * np.cos(b * y)
    out[h // 4 : h // 2, side // 3 : side // 2] = random.integers(0, 256, channels)
    out += random.normal(0, 8, out.shape)
    out[-3:, -4:], out[:2, :2] = 255, 0
    return np.clip(out, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "pixelate"])
@pytest.mark.parametrize("side", [32, 224])
def test_the_authors_programs(side, name, severity):
    """At most one level apart, where a value is close to a whole one, and nearly everywhere equal."""
    with np.load(Path(__file__).with_name("fixtures") / "corruptions.npz") as file:
        wanted = file[f"{side}/{name}/{severity}"]
    found = corrupt(name, severity, picture(side), 0)
    assert found.dtype == np.uint8
    difference = np.abs((found if side == 32 else found[56::112]).astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.04


@pytest.mark.parametrize("shape", [(8, 8, 1), (33, 45, 3), (90, 90, 3)], ids=str)
def test_jpeg_is_that_of_pillow(shape):
    image = picture(shape[1], shape[2], height=shape[0])
    qualities = (25, 18, 15, 10, 7) if shape[0] > 84 else (80, 65, 58, 50, 40)
    for severity, quality in zip(SEVERITIES, qualities, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        found = corrupt("jpeg_compression", severity, image, 0)
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)).reshape(shape))


@pytest.mark.parametrize(("side", "stds"), [(64, (0.04, 0.06, 0.08, 0.09, 0.10)), (96, (0.08, 0.12, 0.18, 0.26, 0.38))])
def test_noise_is_normal(side, stds):
    for severity, std in zip(SEVERITIES, stds, strict=True):
        found = corrupt("gaussian_noise", severity, np.full((side, side, 3), 128, np.uint8), 7)
        inner = found[(found > 0) & (found < 255)]
        inner = inner + np.random.default_rng(0).random(inner.size)
        law = stats.norm(128, std * 255)
        share = law.cdf(255) - law.cdf(1)
        assert stats.kstest(inner, lambda x, law=law, share=share: (law.cdf(x) - law.cdf(1)) / share).pvalue > 1e-3


def test_noise_depends_on_the_position():
    one, again, other = (corrupt("gaussian_noise", 5, picture(16), i) for i in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_gray_images_keep_their_shape_and_others_are_refused(name):
    assert corrupt(name, 5, np.full((1, 300, 1), 200, np.uint8), 0).shape == (1, 300, 1)
    with pytest.raises(UserError, match="these have 4 channels"):
        corrupt(name, 1, np.zeros((8, 8, 4), np.uint8), 0)
