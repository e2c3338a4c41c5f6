"""Weights for PyTorch: the fixtures list the names and layouts of every array in the published models."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import flags
from flax import linen as nn
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


@pytest.mark.parametrize("name", WHOSE)
def test_it_is_the_inverse_of_what_is_imported(name, monkeypatch):
    """Arrays with PyTorch's names, loaded into our model and written again: the same names, shapes and values."""
    for depth in (18, 50):
        monkeypatch.setitem(resnet._STAGES, depth, (1, 2, 1, 1))
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
    written = torch_state.state_dict(model.backbone, tree.map_named(taken.get, variables), WHOSE[name], shape)
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
    "params/backbone/a.b/kernel": (2, 2), "params/backbone/a/b/kernel": (2, 2), "params/projector/dense/kernel": (3, 2),
}  # fmt: skip


def test_variables_that_would_share_a_name_are_all_written_and_read_back():
    backbone, own = classifier.build("mlp", 5, "float32").backbone, {n: drawn(n, shape) for n, shape in SHARED.items()}
    written = torch_state.state_dict(backbone, traverse_util.unflatten_dict(own, sep="/"), "own", (2, 2, 3))
    del own["params/projector/dense/kernel"]  # no classifier has it
    found = {label: torch_names.own_name(backbone, label, SHARED) for label in written if "num_batches" not in label}
    assert sorted(found.values()) == sorted(own)
    for label, name in found.items():
        np.testing.assert_array_equal(torch_names.own_layout(written[label], name, SHARED[name]), own[name])
    assert {"dense.kernel", "dense.scale", "own.weight", "norm.running_var", "head.weight"} <= written.keys()
    assert written["dense.kernel"].shape == (2, 3)


@pytest.mark.parametrize(("arguments", "names", "message"), [
    ("representation=True", "timm", r"params/backbone/representation/\w+ of ViT has no name in timm's model"),
    ("pool='mean'", "torchvision", r"torchvision's ViT needs a class token.*pool='mean'.*--names=timm"),
])  # fmt: skip
def test_what_the_librarys_model_lacks_is_refused(arguments, names, message, shallow):
    backbone, zeros = zeros_of(f"vit('Ti', patch=8, {arguments})")
    with pytest.raises(UserError, match=message):
        torch_state.state_dict(backbone, zeros, names, (16, 24, 3))


def test_fixed_positions_are_written():
    """timm's ViT has positions as parameters."""
    backbone, zeros = zeros_of("vit('Ti', patch=8, positions='sincos', pool='mean')")
    written = torch_state.state_dict(backbone, zeros, "timm", (16, 24, 3))
    np.testing.assert_array_equal(written["pos_embed"], vit.sincos_positions(2, 3, 192)[None])


pytestmark = pytest.mark.usefixtures("one_device")

FLAGS = flags("total=2 steps", "preprocess=decode(3)", "data.source=fake(64, (12, 12, 3), 4)",
              "schedule=constant(1e-2)", "eval_every=")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_file_is_read_back_as_weights(tmp_path, printed, seeds):
    """By `init_from`: the run and the file have the same metrics. Each of several seeds has a file."""
    run, file, flags = tmp_path / "run", tmp_path / "a.safetensors", [*FLAGS, "--config.model=resnet_cifar(8)"]
    assert launch.main([*flags, f"--workdir={run}", f"--config.num_seeds={seeds}", "--config.seed=5"]) == 0
    assert "named by the scheme akamaster" in printed("export", str(file), f"--workdir={run}")
    kernels = np.asarray(imgclf_jax.load(run).state.params["head"]["kernel"]).reshape(seeds, 64, 4)
    for seed, kernel in enumerate(kernels, 5):
        own = file if seeds == 1 else tmp_path / f"a.seed{seed}.safetensors"
        np.testing.assert_array_equal(files.read(own)[0]["linear.weight"], kernel.T)
    if seeds == 2:
        return
    from_file = json.loads(printed("evaluate", f"--config.init_from={file}", *flags, "--format=json"))
    assert from_file["test"] == json.loads(printed("evaluate", f"--workdir={run}", "--format=json"))["test"]


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


@pytest.mark.parametrize("model", ["resnet(18, variant='D')", "convnext('V2-Atto')"])
def test_what_torchvision_lacks_has_timms_names(model):
    assert torch_state.naming(classifier.build(model, 4, "float32").backbone) == "timm"


def test_weights_of_swapped_parts_have_no_published_names():
    """PyTorch's model would load them and compute something else."""
    assert torch_state.naming(resnet.ResNetCIFAR(8)) == "akamaster"
    named = classifier.build("resnet_cifar(8, norm='batch_norm')", 4, "float32").backbone
    assert torch_state.naming(named) == "akamaster"
    for backbone in (resnet.ResNetCIFAR(8, activation=nn.gelu), resnet.ResNetCIFAR(8, block=resnet.Bottleneck)):
        assert torch_state.naming(backbone) == "own"
        with pytest.raises(UserError, match="unknown names of a ResNetCIFAR 'akamaster'"):
            torch_state.naming(backbone, "akamaster")


def test_weights_that_hold_nan_are_not_written(tmp_path, monkeypatch, capsys):
    file, (model, _) = tmp_path / "a.safetensors", made("mlp(widths=(8,))")
    head = model.state.params["head"]
    params = model.state.params | {"head": head | {"kernel": head["kernel"].at[1, 0].set(jnp.nan)}}
    monkeypatch.setattr(export, "load_trained", lambda *_: model._replace(state=model.state.replace(params=params)))
    (tmp_path / "config.json").write_text(configs.to_json(model.config))
    assert launch.main(["export", str(file), f"--workdir={tmp_path}"]) == 1
    assert "step 0 holds NaN, as in params/head/kernel; export another --checkpoint" in capsys.readouterr().err
    assert not file.exists()
