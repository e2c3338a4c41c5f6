"""`evaluate --corruptions`: each accuracy is that of images corrupted by hand, whatever the batches and devices."""

import json

import jax
import numpy as np
import pytest

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

SETTINGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(16,))",
            "--config.batch_size=96", "--config.total=6 epochs", "--config.num_seeds=2",
            "--config.schedule=constant(2e-2)", "--config.eval_every=6 epochs",
            "--config.data.eval.test=test[:50%]")  # fmt: skip
NAMES = ["contrast", "gaussian_noise"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    """Two seeds that have learned some of the digits, 8 x 8."""
    workdir = tmp_path_factory.mktemp("corrupted") / "run"
    assert launch.main([f"--workdir={workdir}", *SETTINGS]) == 0
    return Workdir(workdir)


@pytest.fixture(scope="module")
def printed(run) -> dict:
    """The JSON that the command prints."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        words = ["evaluate", f"--workdir={run.path}", f"--corruptions={','.join(NAMES)}", "--format=json"]
        assert launch.main(words) == 0
    return json.loads("\n".join(lines))


def by_hand(run, names):
    """(the accuracy on clean images, {name: accuracies}) of the library's predictions, one corrupted set at a time."""
    config = run.load_config()
    trained = restore(config, run, "")
    (images,) = open_evals(trained.programs, datasets.open_data(config)).values()
    positions = np.arange(len(images))
    batch = images.read(positions, positions)

    def accuracy(shown):
        return np.mean(trained.predict(shown).argmax(-1) == batch["label"])

    wanted = {
        name: [accuracy(np.stack([corrupt(name, severity, image, i) for i, image in enumerate(batch["image"])]))
               for severity in SEVERITIES]
        for name in names
    }  # fmt: skip
    return accuracy(batch["image"]), wanted


@pytest.mark.thorough
def test_accuracies(run, printed):
    """Those of the library's ensemble predictions, for images corrupted one set at a time."""
    clean, wanted = by_hand(run, NAMES)
    found = printed["test"]
    assert found["examples"] == 180
    assert found["clean"] == pytest.approx(clean)
    assert found["clean"] > 0.5
    for name in NAMES:
        assert found["corruptions"][name]["severities"] == pytest.approx(wanted[name])
        assert found["corruptions"][name]["mean"] == pytest.approx(np.mean(wanted[name]))
    assert found["mean_corruption_accuracy"] == pytest.approx(np.mean(list(wanted.values())))
    assert wanted["contrast"][4] < wanted["contrast"][0]


@pytest.mark.thorough
def test_other_batches_and_devices(run, printed):
    """One device, and a batch size that does not divide the examples."""
    config = run.load_config()
    programs, state, _ = restore(config, run, "")
    with config.unlocked():
        config.batch_size = 41
    one = sharding.make_mesh(jax.devices()[:1])
    alone = Programs(Recipe(config, programs.recipe.data), one)
    state = sharding.put_replicated(jax.tree.map(np.asarray, state), one)
    (images,) = open_evals(alone, datasets.open_data(config)).values()
    found = corrupted.measure(alone, state, images, ["gaussian_noise"])
    assert found["clean", 0] == printed["test"]["clean"]
    assert [found["gaussian_noise", s] for s in range(1, 6)] == printed["test"]["corruptions"]["gaussian_noise"][
        "severities"
    ]


@pytest.mark.thorough
def test_table(run, printed, capsys):
    """One row per corruption, and the means."""
    assert launch.main(["evaluate", f"--workdir={run.path}", "--corruptions=contrast"]) == 0
    out = capsys.readouterr().out
    found = printed["test"]["corruptions"]["contrast"]
    row = next(line for line in out.splitlines() if "contrast" in line)
    assert [cell.strip() for cell in row.strip("│|\n ").split("│")] == [
        "contrast", *(f"{value:.4f}" for value in (*found["severities"], found["mean"]))
    ]  # fmt: skip
    assert f"accuracy of the ensemble of 2 seeds {printed['test']['clean']:.4f}" in out


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "message"), [
    (["--corruptions=pixelat"], "--corruptions: unknown corruption 'pixelat': did you mean 'pixelate'"),
    (["--corruptions=contrast,"], "--corruptions: unknown corruption ''"),
    (["--corruptions=all", "--checkpoints=all"], "--checkpoints and --corruptions print different things"),
    (["--corruptions=all", "--predictions=a.csv"], "--corruptions and --predictions print different things"),
])  # fmt: skip
def test_mistakes(run, capsys, words, message):
    assert launch.main(["evaluate", f"--workdir={run.path}", *words]) == 1
    assert message in capsys.readouterr().err


def test_names():
    assert corrupted.parse("all") == list(CORRUPTIONS)
    assert corrupted.parse("pixelate, contrast") == ["pixelate", "contrast"]
    with pytest.raises(UserError, match="allowed: all, brightness"):
        corrupted.parse("noise")
