"""Weights for PyTorch: the fixtures list the names and layouts of every array in the published models."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from test_stablehlo import made

import imgclf_jax
import launch
from imgclf_jax import config as configs
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import classifier, convnext, resnet, vit
from imgclf_jax.tools.export import command as export
from imgclf_jax.tools.export import torch_state
from imgclf_jax.weights import files, torch_names

FIXTURES = Path(__file__).parents[2] / "weights" / "fixtures"
MODELS = json.loads((FIXTURES / "torch_models.json").read_text())
# Whose names a fixture has, by its own name; the authors' of ConvNeXt are imported only.
WHOSE = {name: whose for name in MODELS for whose in ("torchvision", "timm", "akamaster", "xternalz") if whose in name}


def drawn(label, shape):
    """Different numbers for each array, so that none can be mistaken for another."""
    rng = np.random.default_rng(list(label.encode()))
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if "full" in name else ()) for name in WHOSE
])  # fmt: skip
def test_it_is_the_inverse_of_what_is_imported(name, monkeypatch):
    """Arrays with PyTorch's names, loaded into our model and written again: the same names, shapes and values."""
    for depth in (18, 50) if "full" not in name else ():
        monkeypatch.setitem(resnet._STAGES, depth, (1, 2, 1, 1))
    if "full" not in name:
        monkeypatch.setitem(convnext._VARIANTS, "T", ((1, 2, 1, 1), (8, 16, 24, 32)))
        monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
        monkeypatch.setitem(vit._MIXER, "S", (48, 2, 24, 192))
    fixture = MODELS[name]
    model = classifier.build(fixture["model"], fixture["classes"], "float32")
    shape = (fixture["size"], fixture["size"], 3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    own = dict(tree.named_leaves(variables))
    theirs = {label: drawn(label, tuple(shape)) for label, shape in fixture["shapes"].items()}
    taken = {}
    for label, array in theirs.items():
        place = torch_names.own_name(model.backbone, label, own)
        taken[place] = torch_names.own_layout(array, place, own[place].shape)
    written = torch_state.state_dict(model.backbone, tree.replace(variables, taken), WHOSE[name], shape)
    counts = {label for label in written if label.endswith("num_batches_tracked")}
    assert written.keys() - counts == theirs.keys()
    assert {label.rpartition(".")[0] for label in counts} == {
        label.rpartition(".")[0] for label in theirs if label.endswith("running_mean")}  # fmt: skip
    for label, array in theirs.items():
        np.testing.assert_array_equal(written[label], array, err_msg=label)
        assert written[label].flags.c_contiguous


def zeros_of(spec):
    """A backbone and variables of its classifier."""
    model = classifier.build(spec, 5, "float32")
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3))))
    return model.backbone, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)


SHARED = {
    "params/backbone/dense/kernel": (3, 2), "params/backbone/dense/scale": (2,),  # weight normalization
    "params/backbone/own/kernel": (4, 3), "params/backbone/own/weight": (3, 4),
    "params/backbone/norm/mean": (2,), "batch_stats/backbone/norm/mean": (2,), "batch_stats/backbone/norm/var": (2,),
    "params/backbone/head/kernel": (2, 5), "params/head/kernel": (2, 5), "memory/backbone/dense/bias": (5, 2),
    "params/backbone/dense/bias": (2,),
    "params/backbone/attn/weight": (2,), "params/backbone/cls": (2,), "params/backbone/cls_token": (3,),
    "params/backbone/conv/mean": (2,), "params/backbone/a.b/kernel": (2, 2), "params/backbone/a/b/kernel": (2, 2),
    "params/projector/dense/kernel": (3, 2),
}  # fmt: skip


def test_variables_that_would_share_a_name_are_all_written_and_read_back():
    """The `kernel` and the `scale` of one module were both called `weight`, and the file held only the last one."""
    backbone, own = classifier.build("mlp", 5, "float32").backbone, {n: drawn(n, shape) for n, shape in SHARED.items()}
    written = torch_state.state_dict(backbone, traverse_util.unflatten_dict(own, sep="/"), "own", (2, 2, 3))
    del own["params/projector/dense/kernel"]  # no classifier has it
    found = {label: torch_names.own_name(backbone, label, SHARED) for label in written if "num_batches" not in label}
    assert sorted(found.values()) == sorted(own)
    for label, name in found.items():
        np.testing.assert_array_equal(torch_names.own_layout(written[label], name, SHARED[name]), own[name])
    assert {"dense.kernel", "dense.scale", "own.weight", "norm.running_var", "head.weight"} <= written.keys()
    assert written["dense.kernel"].shape == (2, 3)


@pytest.mark.parametrize("names", ["timm", "torchvision"])
def test_a_layer_that_the_library_lacks_is_refused(names, shallow):
    """Neither library's ViT has a dense layer and tanh before the head, as in the recipe of `imagenet_vit_s16.py`."""
    backbone, zeros = zeros_of("vit('Ti', patch=8, representation=True)")
    message = rf"params/backbone/representation/\w+ of ViT has no name in {names}'s model; pass --names=own"
    with pytest.raises(UserError, match=message):
        torch_state.state_dict(backbone, zeros, names, (16, 24, 3))
    assert "representation.weight" in torch_state.state_dict(backbone, zeros, "own", (16, 24, 3))


def test_torchvisions_vit_needs_a_class_token(shallow):
    """It stores `class_token` and classifies by it, whereas timm's can average the tokens instead."""
    backbone, zeros = zeros_of("vit('Ti', patch=8, pool='mean')")
    with pytest.raises(UserError, match=r"torchvision's ViT needs a class token.*pool='mean'.*--names=timm"):
        torch_state.state_dict(backbone, zeros, "torchvision", (16, 24, 3))


def test_fixed_positions_are_written():
    """timm's ViT has positions as parameters."""
    backbone, zeros = zeros_of("vit('Ti', patch=8, positions='sincos', pool='mean')")
    written = torch_state.state_dict(backbone, zeros, "timm", (16, 24, 3))
    np.testing.assert_array_equal(written["pos_embed"], vit.sincos_positions(2, 3, 192)[None])


def test_names_that_a_backbone_does_not_have_are_refused():
    vit_backbone = classifier.build("vit('Ti', patch=8)", 5, "float32").backbone
    with pytest.raises(UserError, match="allowed: own, timm, torchvision"):
        torch_state.naming(vit_backbone, "akamaster")
    assert torch_state.naming(classifier.build("mlp", 5, "float32").backbone) == "own"


pytestmark = pytest.mark.usefixtures("one_device")

FLAGS = ["--config.total=2 steps", "--config.preprocess=decode(3)", "--config.data.source=fake(64, (12, 12, 3), 4)",
         "--config.schedule=constant(1e-2)", "--config.eval_every=", "--config.batch_size=16"]  # fmt: skip


@pytest.mark.thorough
def test_a_file_is_read_back_as_weights(tmp_path, capsys):
    """By `init_from`: the run and the file have the same metrics."""
    run, file, flags = tmp_path / "run", tmp_path / "a.safetensors", [*FLAGS, "--config.model=resnet_cifar(8)"]
    assert launch.main([*flags, f"--workdir={run}"]) == 0
    assert launch.main(["export", str(file), f"--workdir={run}"]) == 0
    assert "named by the scheme akamaster" in capsys.readouterr().out
    kernel = np.asarray(imgclf_jax.load(run).state.params["head"]["kernel"])
    np.testing.assert_array_equal(files.read(file, lambda label, shape: True)["linear.weight"], kernel.T)
    assert launch.main(["evaluate", f"--config.init_from={file}", *flags, "--format=json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert launch.main(["evaluate", f"--workdir={run}", "--format=json"]) == 0
    assert from_file["test"] == json.loads(capsys.readouterr().out)["test"]


@pytest.mark.thorough
def test_several_seeds_are_a_file_each(tmp_path):
    run, flags = tmp_path / "run", [*FLAGS, "--config.model=mlp(widths=(4,))", "--config.num_seeds=2"]
    assert launch.main([*flags, f"--workdir={run}", "--config.seed=5"]) == 0
    assert launch.main(["export", str(tmp_path / "a.safetensors"), f"--workdir={run}"]) == 0
    kernels = np.asarray(imgclf_jax.load(run).state.params["head"]["kernel"])
    for seed, kernel in zip((5, 6), kernels, strict=True):
        read = files.read(tmp_path / f"a.seed{seed}.safetensors", lambda label, shape: True)
        np.testing.assert_array_equal(read["head.weight"], kernel.T)


def test_a_model_is_written_in_the_same_bytes_each_time(tmp_path, monkeypatch):
    """Or a run that started from the file would say that its weights have changed."""
    file, (model, _), contents = tmp_path / "a.safetensors", made("mlp(widths=(8,))"), set()
    monkeypatch.setattr(export, "load_trained", lambda *_: model)
    (tmp_path / "config.json").write_text(configs.to_json(model.config))
    for _ in range(3):
        assert launch.main(["export", str(file), f"--workdir={tmp_path}"]) == 0
        contents.add(file.read_bytes())
    assert len(contents) == 1
    with safe_open(file, "np") as found:
        assert found.metadata()["model"] == "mlp(widths=(8,))"
        np.testing.assert_array_equal(found.get_tensor("head.bias"), model.state.params["head"]["bias"])


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_hold_nan_are_not_written(averaged, tmp_path, monkeypatch, capsys):
    """As `predict` refuses their outputs. Only what is evaluated counts: an average of weights replaces them."""
    file, (model, _) = tmp_path / "a.safetensors", made("mlp(widths=(8,))")
    head = model.state.params["head"]
    params = model.state.params | {"head": head | {"kernel": head["kernel"].at[1, 0].set(jnp.nan)}}
    state = model.state.replace(params=params, eval_variables=model.state.evaluated if averaged else None)
    monkeypatch.setattr(export, "load_trained", lambda *_: model._replace(state=state))
    (tmp_path / "config.json").write_text(configs.to_json(model.config))
    assert launch.main(["export", str(file), f"--workdir={tmp_path}"]) == (0 if averaged else 1)
    message = "error: export: step 0 holds NaN, as in params/head/kernel; export another --checkpoint"
    assert (message in capsys.readouterr().err) == (not averaged) == (not file.exists())
