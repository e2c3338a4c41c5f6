"""`init_from` in whole runs: training, evaluation and prediction start from weights."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch_format
from cases import flags
from PIL import Image
from test_pretrained import programs
from torch_fixtures import draw

import launch
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.sources import fake
from imgclf_jax.programs import Programs
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.weights import pretrained

# An MLP takes the weights of a PyTorch model whose modules are called as its own are.
MLP = {f"{name}.{leaf}": draw(f"{name}.{leaf}", shape) for name, size in (("dense0", (16, 144)), ("head", (10, 16)))
       for leaf, shape in (("weight", size), ("bias", size[:1]))}  # fmt: skip


ARGV = flags("data.source=fake(32, (12, 12, 1), 10)", "augment=normalize", "total=2 steps",
             "schedule=constant(1e-3)", "eval_every=", "tensorboard=False")  # fmt: skip


@pytest.fixture
def mlp(tmp_path) -> Path:
    return torch_format.save(tmp_path / "mlp.pth", MLP)


def programs_of_mlp(init_from: Path) -> Programs:
    return programs(init_from, "mlp(widths=(16,))", (12, 12, 1), augment="normalize")


def run(workdir: Path, *argv: str) -> int:
    return launch.main(["train", f"--workdir={workdir}", *ARGV, *argv])


def saved(workdir: Path, step: int, best: str = "") -> dict:
    """The variables of a checkpoint."""
    checkpoints = Checkpoints(workdir / "checkpoints", best=best, read_only=True)
    state = checkpoints.restore_any(step)["state"]
    return {"params": state["params"], **(state.get("model_state") or {})}


@pytest.mark.thorough
def test_training_starts_from_the_weights_and_resumes_without_them(tmp_path, mlp, capsys):
    """At a learning rate of zero they are what is saved; the record names the file, but a resumed run needs no file."""
    flags = (f"--config.init_from={mlp}", "--config.schedule=constant(0.0)")
    assert run(tmp_path / "run", *flags) == 0
    params = dict(tree.named_leaves(saved(tmp_path / "run", 2)))
    taken = pretrained.load(programs_of_mlp(mlp)).taken
    assert set(params) == set(taken)
    assert all(np.array_equal(params[name], taken[name]) for name in params)
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["init_from"] == {"path": str(mlp), "sha256": hashlib.sha256(mlp.read_bytes()).hexdigest()}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == str(mlp)
    mlp.unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert run(tmp_path / "run", *flags) == 0
    assert "resuming at step 2" in capsys.readouterr().err
    assert run(tmp_path / "other", *flags) == 1
    assert "there is no file or work directory" in capsys.readouterr().err
    assert not (tmp_path / "other" / "config.json").exists()  # so that the mended command is no other run


def remembering_sgd(learning_rate):
    """Keeps the initial parameters."""
    keep = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    return optax.chain(keep, optax.sgd(learning_rate))


def test_an_optimizer_that_keeps_parameters_gets_these(mlp):
    """The optimizer's state follows from the weights, not from the random values."""
    like = programs_of_mlp(mlp)
    like.recipe.config.optimizer = "test_init_from:remembering_sgd"
    state = like.init_state(weights=pretrained.load(like).taken)
    kept = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (144, 16)]
    np.testing.assert_array_equal(kept[0], MLP["dense0.weight"].T)


@pytest.mark.thorough
def test_a_work_directory(tmp_path, mlp, capsys):
    """The best checkpoint's weights, whichever optimizer made them; the head is initialized for other classes."""
    first = tmp_path / "first"
    flags = ("--config.checkpoint.best=test/accuracy", "--config.eval_every=1 steps")
    assert run(first, f"--config.init_from={mlp}", *flags, "--config.optimizer=sgd(momentum=0.9)") == 0
    weights = pretrained.load(programs_of_mlp(first), whole=True)
    best = Checkpoints(first / "checkpoints", best="test/accuracy", read_only=True).best_step()
    variables = saved(first, best, "test/accuracy")
    expected = dict(tree.named_leaves(variables))
    assert set(weights.taken) == set(expected)
    assert all(np.array_equal(weights.taken[name], expected[name]) for name in expected)
    assert weights.source == {"path": str(first), "step": best, "sha256": tree.sha256(variables)}
    assert run(tmp_path / "second", f"--config.init_from={first}",
               "--config.data.source=fake(32, (12, 12, 1), 5)") == 0  # fmt: skip
    assert "2 arrays taken; a new head (10 classes in it, 5 here)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"2 arrays of the model missing in it \(params/backbone/dense1/bias"):
        pretrained.load(programs(first, "mlp(widths=(16, 16))", (12, 12, 1)))


@pytest.mark.thorough
def test_a_work_directory_of_a_network_with_running_means(tmp_path):
    """They are loaded like the parameters, from the averages of a run that averages its weights."""
    like = programs(tmp_path)
    init = jax.jit(lambda seed: like.recipe.model.init(jax.random.key(seed), np.zeros((1, 32, 32, 3), np.float32)))
    own, other = (dict(init(seed)) for seed in (3, 4))
    own["batch_stats"] = jax.tree.map(lambda x: x + 1, own["batch_stats"])
    params, stats = own["params"], {"batch_stats": own["batch_stats"]}
    averages = {"params": other["params"], "model_state": {"batch_stats": other["batch_stats"]},
                "eval_variables": (params, stats)}  # fmt: skip
    (tmp_path / "config.json").write_text('{"checkpoint": {"best": ""}}')
    data = {"train_examples": 64, "image_shape": (32, 32, 3), "class_names": [str(i) for i in range(10)]}
    (tmp_path / "provenance.json").write_text(json.dumps({"data": data | {"fingerprint": "x"}}))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, {"state": averages})
    checkpoints.close()
    taken, expected = pretrained.load(like, whole=True).taken, dict(tree.named_leaves(own))
    assert "batch_stats/backbone/bn1/mean" in expected
    assert all(np.array_equal(taken[name], x) for name, x in expected.items())


def test_evaluate_and_predict_without_a_run(tmp_path, mlp, monkeypatch, capsys):
    """The metrics and predictions of the weights, in NumPy, with the source's class names; no run is created."""
    monkeypatch.chdir(tmp_path)
    flags = [*ARGV, f"--config.init_from={mlp}"]
    assert launch.main(["evaluate", *flags, "--format=json"]) == 0
    own = json.loads(capsys.readouterr().out)
    examples = fake(32, (12, 12, 1), 10)["test"].read(np.arange(32))
    images = examples["image"].reshape(32, -1) / 255
    hidden = np.maximum(images @ MLP["dense0.weight"].T + MLP["dense0.bias"], 0)
    logits = hidden @ MLP["head.weight"].T + MLP["head.bias"]
    assert (own["step"], own["test"]["examples"]) == (0, 32)
    assert own["test"]["accuracy"] == np.mean(np.argmax(logits, -1) == examples["label"])
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), examples["label"]]
    assert own["test"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    Image.fromarray(examples["image"][3, :, :, 0]).save("x.png")
    assert launch.main(["predict", "x.png", *flags, "--format=json"]) == 0
    top = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert [p["class"] for p in top] == [str(c) for c in np.argsort(-logits[3])[:3]]
    assert not (tmp_path / "runs").exists()
    assert launch.main(["evaluate", f"--workdir={tmp_path}", *flags]) == 2
    assert "drop either" in capsys.readouterr().err
