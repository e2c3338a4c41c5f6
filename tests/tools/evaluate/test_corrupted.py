"""`evaluate --corruptions`: each accuracy is that of images corrupted by hand, whatever the batches and devices."""

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

SETTINGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(16,))",
            "--config.batch_size=96", "--config.total=6 epochs", "--config.num_seeds=2",
            "--config.schedule=constant(2e-2)", "--config.eval_every=6 epochs",
            "--config.data.eval.test=test[:50%]")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    """Two seeds that have learned some of the digits, 8 x 8."""
    workdir = tmp_path_factory.mktemp("corrupted") / "run"
    assert launch.main([f"--workdir={workdir}", *SETTINGS]) == 0
    return Workdir(workdir)


@pytest.mark.thorough
def test_accuracies_are_those_of_images_corrupted_by_hand(run, capsys):
    """On one device with a batch size that does not divide the examples, too. The table has the same numbers."""
    words = ["evaluate", f"--workdir={run.path}", "--corruptions=contrast, gaussian_noise"]
    capsys.readouterr()
    assert launch.main([*words, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["test"]
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
    assert launch.main(words) == 0
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
