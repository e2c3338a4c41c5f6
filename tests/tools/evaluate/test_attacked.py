"""`evaluate --attack` by a linear model's worst case in closed form, `--corruptions` by images corrupted by hand."""

import json

import jax
import numpy as np
import pytest

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import corrupted
from imgclf_jax.tools.evaluate.corruptions import SEVERITIES, corrupt
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


def printed(run, capsys, *words):
    capsys.readouterr()
    assert launch.main(["evaluate", f"--workdir={run.path}", "--format=json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_one_step_on_a_linear_model_is_the_closed_form(runs, capsys):
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
    found = printed(linear, capsys, f"--attack={FGSM}")
    assert sorted(linear.path.iterdir()) == before  # nothing that `compare` may take for clean predictions
    clean = printed(linear, capsys)
    assert found["test"]["examples"] == 180
    assert found["test"]["accuracy"] == clean["test"]["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert found["test"]["nll"] == pytest.approx(clean["test"]["nll"], rel=1e-6)
    assert found["test"]["attacked_accuracy"] == np.mean(of_worst.argmax(1) == labels)
    assert found["test"]["attacked_nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["attack"] == FGSM
    assert found["step"] == clean["step"]


@pytest.mark.thorough
def test_several_seeds_are_attacked_each_by_itself(runs, capsys):
    """The mean of two, of which the first is that of the run of one seed."""
    one, two = (printed(run, capsys, f"--attack={FGSM}")["test"] for run in runs)
    for name in ("accuracy", "nll", "attacked_accuracy", "attacked_nll"):
        assert abs(one[name] - two[name]) == pytest.approx(two[f"{name}_std"] / 2**0.5, rel=1e-3), name


@pytest.mark.thorough
def test_accuracies_are_those_of_images_corrupted_by_hand(runs, capsys):
    """On one device with a batch size that does not divide the examples, too. The table has the same numbers."""
    run, words = runs[1], "--corruptions=contrast, gaussian_noise"
    found = printed(run, capsys, words)["test"]
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
    assert launch.main(["evaluate", f"--workdir={run.path}", words]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "contrast" in line)
    cells = [cell.strip() for cell in row.strip("│|\n ").split("│")]
    assert cells == ["contrast", *(f"{value:.4f}" for value in (*wanted["contrast"], np.mean(wanted["contrast"])))]

    one = sharding.make_mesh(jax.devices()[:1])
    with config.unlocked():
        config.batch_size = 41
    alone = Programs(Recipe(config, trained.programs.recipe.data), one)
    state = sharding.put_replicated(jax.tree.map(np.asarray, trained.state), one)
    again = corrupted.measure(alone, state, images, ["gaussian_noise"])
    assert [again["gaussian_noise", s] for s in SEVERITIES] == found["corruptions"]["gaussian_noise"]["severities"]
