"""`evaluate --corruptions`: each accuracy is that of images corrupted by hand, whatever the batches and devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import corrupted, corruptions, frost
from imgclf_jax.tools.evaluate.chosen_corruptions import parse
from imgclf_jax.train.evaluation import open_evals
from imgclf_jax.trained import Trained, restore

SETTINGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(16,))",
            "--config.batch_size=96", "--config.total=6 epochs", "--config.num_seeds=2",
            "--config.schedule=constant(2e-2)", "--config.eval_every=6 epochs",
            "--config.data.eval.test=test[:50%]")  # fmt: skip
NAMES = ["contrast", "shot_noise"]


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


def by_hand(run, names, photographs=()):
    """(the accuracy on clean images, {name: accuracies}) of the library's predictions, one corrupted set at a time."""
    config = run.load_config()
    programs, state, step = restore(config, run, "")
    trained = Trained(programs, state, step)
    (images,) = open_evals(programs, datasets.open_data(config)).values()
    places = np.arange(len(images))
    batch = images.read(places, places)
    wanted = {}
    for name in names:
        run_op = jax.jit(corruptions.apply, static_argnums=0)
        for severity in corruptions.SEVERITIES:
            tables = corruptions.make_tables(name, severity, images.shape, photographs)
            key = corruptions.make_key(name, severity, 0)
            changed = np.asarray(run_op(name, batch["image"], tables, key, jnp.asarray(places, jnp.int32)))
            wanted.setdefault(name, []).append(np.mean(trained.predict(changed).argmax(-1) == batch["label"]))
    return np.mean(trained.predict(batch["image"]).argmax(-1) == batch["label"]), wanted


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
    assert printed["left_out"] == []


@pytest.mark.thorough
def test_frost(run, tmp_path, capsys):
    """With the folder of its photographs, behind which the digits are hardly visible."""
    random = np.random.default_rng(0)
    for name in frost.FILES:
        Image.fromarray(random.integers(256, size=(60, 70, 3), dtype=np.uint8)).save(tmp_path / name)
    names, photographs = parse("all", str(tmp_path))
    assert names == list(corruptions.CORRUPTIONS)
    words = ["--corruptions=frost", f"--frost={tmp_path}", "--format=json"]
    assert launch.main(["evaluate", f"--workdir={run.path}", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = by_hand(run, ["frost"], photographs)[1]["frost"]
    assert found["test"]["corruptions"]["frost"]["severities"] == pytest.approx(wanted)
    assert found["test"]["clean"] > wanted[4]
    assert found["left_out"] == []


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
    found = corrupted.measure(alone, state, images, ["shot_noise"])
    assert found["clean", 0] == printed["test"]["clean"]
    assert [found["shot_noise", s] for s in range(1, 6)] == printed["test"]["corruptions"]["shot_noise"]["severities"]


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
    assert "frost" not in out


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "message"), [
    (["--corruptions=fogg"], "--corruptions: unknown corruption 'fogg': did you mean 'fog'"),
    (["--corruptions=fog,frost"],
     "download the folder ImageNet-C/create_c of github.com/hendrycks/robustness and add --frost=DIR"),
    (["--corruptions=fog", "--frost=."], "--frost names photographs, but --corruptions lacks frost"),
    (["--corruptions=all", "--frost=nowhere"],
     "--frost=nowhere: the folder lacks frost1.png, frost2.png, frost3.png, frost4.jpg"),
    (["--frost=."], "--frost needs --corruptions: add --corruptions=all"),
    (["--corruptions=,"], "--corruptions must be 'all', or names separated by commas"),
    (["--corruptions=all", "--checkpoints=all"], "drop --checkpoints and --predictions"),
    (["--corruptions=all", "--predictions=a.csv"], "drop --checkpoints and --predictions"),
])  # fmt: skip
def test_mistakes(run, capsys, words, message):
    assert launch.main(["evaluate", f"--workdir={run.path}", *words]) == 1
    assert message in capsys.readouterr().err


def test_all_are_all():
    assert parse("all", "") == ([name for name in corruptions.CORRUPTIONS if name != "frost"], ())
    assert parse("fog, all", "")[0] == sorted(parse("all", "")[0], key=lambda name: name != "fog")
    with pytest.raises(UserError, match="frost overlays photographs"):
        parse("all,frost", "")
    assert parse("fog, snow,fog", "") == (["fog", "snow"], ())
    with pytest.raises(UserError, match="allowed: all, brightness"):
        parse("noise", "")
