"""A run's bits follow from config and seed: not from cadences, placement, workers or where it was resumed or killed."""

import json
import random
import signal
import time
from dataclasses import replace

import launched
import pytest
import stress
from methods_check import Check

import launch
from imgclf_jax import config as configs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train

pytestmark = pytest.mark.optimized
NETWORKS = (
    {"model": "cnn(widths=(8, 16), hidden=16)"},
    {"model": "resnet_cifar(8)", "precision": "bfloat16"},
    {"model": "resnet_cifar(8)", "accumulate": "2", "mix": "mixup(0.2)"},
    {"model": "resnet_cifar(8)", "num_seeds": "2"},
    {"model": "vit('Ti', patch=6)", "precision": "bfloat16"},
    {"model": "test_step:Net(norm=True)"},  # Flax's own layers
)


@pytest.mark.parametrize("keys", [
    pytest.param({"model": "airbench(widths=(4,))", "precision": "bfloat16"}, marks=pytest.mark.thorough),
    *(pytest.param(keys, marks=pytest.mark.slow) for keys in NETWORKS),
])  # fmt: skip
def test_every_way_to_train(keys, tmp_path):
    Check("supervised", tmp_path, tmp_path).ways(**keys)


@pytest.mark.usefixtures("one_device")
def test_training_depends_on_neither_placement_nor_workers(fake_config, tmp_path):
    config = fake_config
    config.model = "mlp(widths=(8,))"
    config.total, config.augment = "23 steps", "flip_lr|normalize"
    config.log_every, config.eval_every, config.checkpoint_every = "5 steps", "7 steps", "11 steps"
    results = []
    for config.data.placement, config.data.workers in (("host", 2), ("device", 0)):
        workdir = Workdir(tmp_path / config.data.placement)
        assert train.main(config, workdir) == 0
        results.append((*launched.outcome(workdir.path), json.loads(workdir.result.read_text())["test"]))
    assert results[0] == results[1]
    assert [r["step"] for r in results[0][1] if "train/loss" in r] == [5, 10, 15, 20, 23]


@pytest.mark.thorough
def test_keys_that_may_differ_on_resume_change_no_bit(fake_config, tmp_path):
    """All FREE_KEYS at once: the digest is that of a run that never had them; the record has them and reproduces."""
    whole, moved = Workdir(tmp_path / "whole"), Workdir(tmp_path / "moved")
    assert train.main(fake_config, whole) == 0
    train.main(fake_config, moved, transform_run=lambda run: replace(run, cadences=replace(run.cadences, end=4)))
    other = fake_config.copy_and_resolve_references()
    new = {"log_every": "3 steps", "eval_every": "5 steps", "checkpoint_every": "7 steps", "checkpoint.keep": 1,
           "checkpoint.best": "test/auc", "metrics": "auc", "check_every": "5 steps"}  # fmt: skip
    assert set(new) == set(configs.FREE_KEYS)
    other.update_from_flattened_dict(new)
    assert train.main(other, moved) == 0
    found = {json.loads(place.result.read_text())["params_sha256"] for place in (whole, moved)}
    assert len(found) == 1
    assert configs.flatten(moved.load_config()).items() >= new.items()
    began, resumed = moved.read_snapshots()
    assert [(one["step"], one["keys"]["checkpoint.keep"]) for one in (began, resumed)] == [(0, 2), (4, 1)]
    assert list(launched.records(moved.path, "test/accuracy")) == [5, 10, 12]
    assert launch.main(["reproduce", str(moved.path), f"--output={tmp_path}/again"]) == 0


SHORT = ("--config.data.source=fake(256, (12, 12, 1), 4)", "--config.preprocess=decode(1)|random_resized_crop(10)",
         "--config.preprocess_eval=decode(1)|resize(10)", "--config.mix=mixup(0.2)",
         "--config.augment=flip_lr|flip_alternating|pad_crop(1)|normalize",
         "--config.model=mlp(widths=(16,), dropout=0.1)", "--config.total=500 steps", "--config.batch_size=24",
         "--config.log_every=7 steps", "--config.eval_every=110 steps",
         "--config.checkpoint_every=15 steps")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_killed_at_a_random_moment(tmp_path, capsys):
    """With random crops, flips, mixing and dropout, and logs, evaluations and checkpoints at different steps."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    [process], saved = launched.start(workdir, (*SHORT, "--config.data.workers=2")), workdir / "checkpoints"
    while process.poll() is None and not (saved.exists() and any(f.name.isdigit() for f in saved.iterdir())):
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0.0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for folder in (whole, workdir):
        assert launch.main([f"--workdir={folder}", *SHORT]) == 0
    assert "resuming at step" in capsys.readouterr().err
    assert launched.outcome(workdir) == launched.outcome(whole)
    digests = [(folder / "digests.jsonl").read_text().splitlines() for folder in (workdir, whole)]
    assert digests[0] == digests[1]
    assert json.loads(digests[0][-1])["params_sha256"] == launched.outcome(whole)[0]
    steps = [json.loads(line)["step"] for line in digests[0]]
    assert steps == sorted({0, *(1 << n for n in range(9)), *range(15, 500, 15), 500})


@pytest.mark.slow
def test_disturbed_by_a_plan(tmp_path):
    """Kills, signals, a full disk and damaged files, for two minutes."""
    assert stress.disturb(120, 7, tmp_path) == 0
