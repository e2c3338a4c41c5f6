"""`init_from`: what fits is loaded and the rest is reported; PyTorch's weights give PyTorch's logits in our models."""

import contextlib
import hashlib
import json
import logging
import re
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from cases import thorough
from flax import linen as nn
from safetensors.numpy import save_file
from torch_fixtures import draw

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import one_per_line
from imgclf_jax.models import classifier, convnext, resnet, vit
from imgclf_jax.programs import Programs
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.digests import Digests
from imgclf_jax.weights import pretrained, torch_names

MODELS = json.loads((Path(__file__).parent / "fixtures" / "torch_models.json").read_text())
RESNET20 = {name: draw(name, tuple(shape)) for name, shape in MODELS["akamaster resnet20"]["shapes"].items()}


def resnet8() -> dict[str, np.ndarray]:
    """Those of ResNet-20's arrays that ResNet-8 has."""
    return {name: x for name, x in RESNET20.items() if not name.startswith("layer") or name.split(".")[1] == "0"}


@pytest.fixture
def file(tmp_path) -> Path:
    return torch_format.save(tmp_path / "resnet8.pth", resnet8())


def programs(init_from, model="resnet_cifar(8)", shape=(32, 32, 3), classes=10, **keys) -> Programs:
    keys = {"init_from": str(init_from), "model": model, "preprocess": "decode(3)"} | keys
    return cases.programs(shape, classes, **keys)


def test_all_of_a_file(file, caplog):
    """Every array is loaded unchanged, except for its layout; the report and the record say so."""
    with caplog.at_level(logging.INFO, "imgclf_jax"):
        weights = pretrained.load(programs(file), whole=True)
    state = programs(file).init_state(weights=weights.taken)
    start = dict(tree.named_leaves({"params": state.params, **state.model_state}))
    assert set(weights.taken) == set(start)
    kernel = start["params/backbone/layer2_0/conv1/kernel"]
    np.testing.assert_array_equal(kernel, RESNET20["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(start["params/head/kernel"], RESNET20["linear.weight"].T)
    variance = start["batch_stats/backbone/bn1/var"]
    np.testing.assert_array_equal(variance, RESNET20["bn1.running_var"])
    assert weights.source == {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert caplog.messages == [f"init_from={str(file)!r}: {len(start)} arrays taken"]


@pytest.mark.parametrize(("gone", "reason"), [("linear", "it has none"), ("linear.bias", "another width, or a part")])
def test_a_file_without_a_head(tmp_path, gone, reason):
    arrays = {name: x for name, x in resnet8().items() if not name.startswith(gone)}
    found = programs(torch_format.save(tmp_path / "x.pth", arrays))
    weights = pretrained.load(found)
    assert weights.head == reason
    assert not weights.faults
    with pytest.raises(UserError, match=rf"not a complete model: it lacks the head \({reason}\)"):
        pretrained.load(found, whole=True)


@pytest.mark.parametrize(("change", "fragment"), [
    (lambda a: a.pop("layer1.0.bn2.running_mean"), r"1 arrays of the model missing in it \(batch_stats/backbone/"),
    (lambda a: a.update({"fc_norm.bias": a["bn1.bias"]}),
     r"1 arrays in it that the model does not have \(fc_norm.bias\)"),
    (lambda a: a.update({"conv1.weight": np.zeros((8, 3, 3, 3))}),
     r"1 arrays of another shape \(conv1.weight: \[3, 3, 3, 8\] in it, \[3, 3, 3, 16\] here\)"),
])  # fmt: skip
def test_any_other_difference_is_an_error_unless_allowed(tmp_path, caplog, change, fragment):
    arrays = resnet8()
    change(arrays)
    file = torch_format.save(tmp_path / "x.pth", arrays)
    with pytest.raises(UserError, match=fragment) as e:
        pretrained.load(programs(file))
    assert "init_strict=False" in str(e.value)
    weights = pretrained.load(programs(file, init_strict=False))
    assert fragment.split(" (")[0].split(r" \(")[0].split(".*")[0].strip() in caplog.text
    assert len(weights.taken) >= len(resnet8()) - 1


def test_weights_of_another_model(file, tmp_path):
    """One sentence, strict or not, if nothing but the head could fit."""
    for more in ({}, {"init_strict": False}):
        with pytest.raises(UserError, match=r"nothing in it fits model='mlp\(widths=\(64,\)\)'") as e:
            pretrained.load(programs(file, "mlp(widths=(64,))", **more))
        assert len(str(e.value)) < 900
    for path in (tmp_path / "nope.pth", Path("/dev/zero")):
        with pytest.raises(UserError, match="there is no file or work directory"):
            pretrained.load(programs(path))
    with pytest.raises(UserError, match="this directory holds no run"):
        pretrained.load(programs(tmp_path))


def test_positions_are_resized_as_timm_does(tmp_path, monkeypatch, caplog):
    """The class token's stays, the grid is resampled: up, down, and to one that is not square."""
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    expected = json.loads((Path(__file__).parent / "fixtures" / "positions.json").read_text())
    arrays = {name: draw(name, tuple(shape)) for name, shape in MODELS["timm vit"]["shapes"].items()}
    small = draw("pos_embed", (1, 17, 3))
    arrays["pos_embed"] = np.tile(small, 16)  # width 48
    file = torch_format.save(tmp_path / "vit.pth", arrays)
    for name, table in expected.items():
        h, w = map(int, name.split("x"))
        with caplog.at_level(logging.INFO, "imgclf_jax"):
            weights = pretrained.load(programs(file, "vit('Ti', patch=8)", (8 * h, 8 * w, 3), 5))
        assert f"positions resized (4x4 to {h}x{w})" in caplog.text
        got = weights.taken["params/backbone/positions_embedding"]
        np.testing.assert_allclose(got, np.tile(table, 16), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(got[:, 0], arrays["pos_embed"][:, 0])


def write_run(folder: Path, programs: Programs, shape: tuple, names=("0", "1"), **keys: str) -> dict:
    """Records a run on images of this shape, whose checkpoint has the initial parameters, which are returned."""
    checkpoints, digests = Checkpoints(folder / "checkpoints"), Digests(folder, 0, 1)
    params = programs.init_state().params
    digests.record(0, params)
    checkpoints.save(0, {"state": {"params": params, "model_state": {}}})
    digests.close()
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(programs.recipe.config.to_dict() | keys))
    data = {"train_examples": 64, "image_shape": shape, "class_names": list(names), "fingerprint": "x"}
    (folder / "provenance.json").write_text(json.dumps({"data": data}))
    return params


SMALL_MLP = {name: draw(name, shape) for name, shape in (
    ("dense0.weight", (4, 9)), ("dense0.bias", (4,)), ("head.weight", (2, 4)), ("head.bias", (2,)))}  # fmt: skip


@pytest.mark.parametrize(("key", "recorded", "error"), [
    ("augment", "pad_crop(2)|normalize(mean=0.4)", "was trained with augment='pad_crop(2)|normalize(mean=0.4)', and "
     "this command has augment='normalize': its predictions would be wrong; give both the same"),
    ("augment", "flip_lr|normalize", ""),  # random ops are those of training
    ("augment", "elsewhere:scale", "was trained with augment='elsewhere:scale', and"),
    ("loss", "sigmoid", "was trained with loss='sigmoid', and this command has loss='softmax'"),
    ("loss", "softmax(label_smoothing=0.1)", ""),
    ("model", "mlp((4,), activation='tanh')", """was trained with model="mlp((4,), activation='tanh')", and"""),
    ("model", "mlp( widths=(4,) )", ""),
    ("class_names", ("cat", "dog"), "has the classes ['cat', 'dog']…, and data.source="),
    ("class_names", ("1", "0"), "its predictions would have wrong names; name the source of its classes"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "run"])
def test_a_complete_model_predicts_as_its_run(tmp_path, kind, key, recorded, error):
    """Arrays also fit other classes, another normalization, link or activation."""
    where = tmp_path / "a.safetensors" if kind == "file" else tmp_path
    of_two = programs(where, "mlp(widths=(4,))", (3, 3, 1), 2, augment="normalize", preprocess="decode(1)")
    if kind == "file":
        save_file(SMALL_MLP, where, {key: one_per_line(recorded) if key == "class_names" else recorded})
    else:
        write_run(tmp_path, of_two, (3, 3, 1), **{"names" if key == "class_names" else key: recorded})
    assert len(pretrained.load(of_two).taken) == 4
    with pytest.raises(UserError, match=re.escape(error)) if error else contextlib.nullcontext():
        pretrained.load(of_two, whole=True)


@pytest.mark.thorough
def test_positions_of_a_grid_that_is_not_square(tmp_path, monkeypatch):
    """That of a run is of its images, and `export` writes it; any other file's is square or has as many patches."""
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    model, wide = "vit('Ti', patch=8, pool='mean')", (32, 48, 3)  # pixels: 4 by 6 patches
    run, file = tmp_path / "run", tmp_path / "vit.safetensors"
    run.mkdir()
    arrays = {name: draw(name, tuple(shape)) for name, shape in MODELS["timm vit"]["shapes"].items()}
    table = write_run(run, programs(run, model, wide), wide)["backbone"]["positions_embedding"]
    del arrays["cls_token"]
    save_file(arrays | {"pos_embed": np.asarray(table)}, file, {"grid": "4x6"})
    for path, classes in ((run, 10), (file, 5)):
        for h, w in ((4, 6), (6, 4), (4, 4)):
            got = pretrained.load(programs(path, model, (8 * h, 8 * w, 3), classes)).taken
            expected = jax.image.resize(table.reshape(4, 6, 48), (h, w, 48), "cubic", antialias=True)
            found = got["params/backbone/positions_embedding"]
            np.testing.assert_allclose(found.reshape(h, w, 48), expected, atol=1e-6)
    save_file(arrays | {"pos_embed": np.asarray(table)}, file)
    found = pretrained.load(programs(file, model, (48, 32, 3), 5)).taken["params/backbone/positions_embedding"]
    np.testing.assert_array_equal(found, table)  # as timm takes as many
    with pytest.raises(UserError, match=r"pos_embed: \[1, 24, 48\] in it, \[1, 16, 48\] here"):
        pretrained.load(programs(file, model, (32, 32, 3), 5))


class Flat(nn.Module):
    """A backbone without a table here."""

    axes: tuple[int, ...] = (0, 1, 2, 3)
    torch_names = ((r"layers\.0", "backbone.fc1"), ("out", "head"))

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4, name="fc1")(x.transpose(self.axes).reshape(x.shape[0], -1))


@pytest.mark.parametrize(("arguments", "layer", "head"), [
    ("", "fc1", "head"), ("", "layers.0", "out"), ("axes=(0, 3, 1, 2)", "fc1", "head")])  # fmt: skip
def test_a_pytorch_model_of_a_backbone_without_a_table(tmp_path, arguments, layer, head):
    """PyTorch flattens images [c, h, w]: its logits, here in NumPy, are ours."""
    arrays = {f"{name}.{leaf}": x for name, w in ((layer, draw("a.weight", (4, 18))), (head, draw("b.weight", (3, 4))))
              for leaf, x in (("weight", w), ("bias", w[:, 0]))}  # fmt: skip
    file, images = torch_format.save(tmp_path / "x.pth", arrays), draw("x.image", (5, 2, 3, 3))
    own = programs(file, f"{__name__}:Flat({arguments})", (2, 3, 3), 3)
    state = own.init_state(weights=pretrained.load(own, whole=True).taken)
    hidden = images.transpose(0, 3, 1, 2).reshape(5, -1) @ arrays[f"{layer}.weight"].T + arrays[f"{layer}.bias"]
    logits = hidden @ arrays[f"{head}.weight"].T + arrays[f"{head}.bias"]
    np.testing.assert_allclose(own.recipe.model.apply({"params": state.params}, images), logits, atol=1e-6)
    save_file(arrays, tmp_path / "old.safetensors", {"names": "own"})  # as `export` wrote it
    old = pretrained.load(programs(tmp_path / "old.safetensors", f"{__name__}:Flat({arguments})", (2, 3, 3), 3))
    np.testing.assert_array_equal(old.taken["params/backbone/fc1/kernel"], arrays[f"{layer}.weight"].T)


def test_a_flattened_image_that_two_layers_may_read(tmp_path):
    file = torch_format.save(tmp_path / "x.pth", {"dense0.weight": np.zeros((12, 12))})
    with pytest.raises(UserError, match=r"one of params/backbone/dense0/kernel, \S*dense1/kernel reads them"):
        pretrained.load(programs(file, "mlp(widths=(12, 8))", (2, 2, 3), 3))


@pytest.mark.parametrize("ema", ["model_ema", "state_dict_ema"])
def test_a_checkpoint_with_averages(tmp_path, caplog, ema):
    """They are taken, and the log names the others; `FILE::NAME` chooses."""
    raw, mean = ({name: x + i for name, x in resnet8().items()} for i in (0, 1))
    wrapped = {"n_averaged": np.zeros(()), **{f"module._orig_mod.model.{name}": x for name, x in mean.items()}}
    file = torch_format.save_nested(tmp_path / "x.pth", {"model": raw, ema: wrapped})
    for name, expected in (("", mean), (f"::{ema}", mean), ("::model", raw)):
        kernel = pretrained.load(programs(f"{file}{name}"), whole=True).taken["params/head/kernel"]
        np.testing.assert_array_equal(kernel, expected["linear.weight"].T)
    assert f"{ema!r} is taken; choose another by 'FILE::model'" in caplog.text
    with pytest.raises(UserError, match=r"no named weights under 'best' \(it has: 'model', "):
        pretrained.load(programs(f"{file}::best"))


def test_the_variant_of_a_resnet_is_said(tmp_path, caplog, shallow):
    """timm's resnetblur18 has the names and shapes of torchvision's ResNet-18, and other numbers."""
    file = torch_format.save(tmp_path / "x.pth", {"bn1.weight": np.ones(64)})
    with caplog.at_level(logging.INFO, "imgclf_jax"):
        pretrained.load(programs(file, "resnet(18)", init_strict=False))
    assert re.search("assuming torchvision's ResNet, .* without the blur pooling of timm's resnetblur", caplog.text)


def test_quantized_weights_are_refused(tmp_path):
    save_file({name: x.astype(np.int8) for name, x in SMALL_MLP.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"(weight|bias) holds int8 and not floating-point numbers, as quantized"):
        pretrained.load(programs(tmp_path / "x.safetensors", "mlp(widths=(4,))", (3, 3, 1), 2))


def test_what_no_transformer_has(tmp_path, monkeypatch):
    """Positions for an image as large as a town, in 64 bytes; a name of ours; queries and keys of different widths."""
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    model = "vit('Ti', patch=8)"

    def load(**shapes):
        tensors = {"norm.bias": (48,)} | {name.replace("__", "."): shape for name, shape in shapes.items()}
        items = {name: torch_format.tensor("0", 16, 0, shape, (0,) * len(shape)) for name, shape in tensors.items()}
        file = torch_format.write(tmp_path / "vit.pth", items, {"0": bytes(64)})
        return pretrained.load(programs(file, model, (32, 32, 3), 5, init_strict=False))

    weights = load(**{"pos_embed": (1, 18, 48), "params/backbone/norm/scale": (48,)})
    assert set(weights.taken) == {"params/backbone/norm/bias"}
    assert weights.unused == ["params/backbone/norm/scale"]
    assert weights.misfits == ["pos_embed: [1, 18, 48] in it, [1, 17, 48] here"]
    with pytest.raises(UserError, match="arrays that are larger than the file"):
        load(pos_embed=(1, 400_000_001, 48))
    with pytest.raises(UserError, match="holds arrays that do not fit together"):
        load(layers__0__attention__q_proj__weight=(8, 4), layers__0__attention__k_proj__weight=(8, 2))


# Those without a head have its features instead of logits.
FEW = ["akamaster resnet20", "torchvision resnet basic", "torchvision vit", "timm vit dinov2", "timm vit sbb",
       "timm eva eva02 B", "open_clip vit without head", "transformers dinov3 without head",
       "transformers siglip without head"]  # fmt: skip


@pytest.fixture
def _small_variants(monkeypatch):
    """The variants of the fixtures, in place of the published ones."""
    for depth in (18, 50):
        monkeypatch.setitem(resnet._STAGES, depth, (1, 2, 1, 1))
    monkeypatch.setitem(convnext._VARIANTS, "T", ((1, 2, 1, 1), (8, 16, 24, 32)))
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    monkeypatch.setitem(vit._MIXER, "S", (48, 2, 24, 192))


def converted(name: str) -> tuple:
    """(our model, its variables from weights drawn by PyTorch's names, images)."""
    fixture = MODELS[name]
    model = classifier.build(fixture["model"], fixture["classes"], "float32")
    images = jnp.asarray(draw("image", (2, fixture["size"], fixture["size"], 3)))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    own = dict(tree.named_leaves(variables))
    found, arrays = {}, {label: draw(label, tuple(shape)) for label, shape in fixture["shapes"].items()}
    if isinstance(model.backbone, vit.ViT):
        arrays = torch_names.as_timm(arrays)
    for label, array in arrays.items():
        place = torch_names.own_name(model.backbone, label, own)
        assert place is not None, label
        assert place not in found, label
        found[place] = torch_names.own_layout(array, place, own[place].shape)
    head = {
        place: np.zeros(x.shape)
        for place, x in own.items()
        if place.startswith("params/head/") and "without head" in name
    }
    assert {k: v.shape for k, v in (head | found).items()} == {k: v.shape for k, v in own.items()}  # each once, and all
    return model, tree.map_named((head | found).get, variables), images


@pytest.mark.usefixtures("_small_variants")
@pytest.mark.parametrize("name", [*FEW, *thorough(*(name for name in MODELS if name not in FEW))])
def test_logits_are_pytorchs(name):
    model, variables, images = converted(name)
    method = "features" if "without head" in name else None
    logits = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False, method=method))(variables, images))[:, :5]
    expected = np.array(MODELS[name]["logits"])
    assert np.ptp(expected) > 0.1  # so that being equal says something
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


SPECS = ("resnet(18)", "resnet(50)", "resnet_cifar(8)", "wide_resnet(10, 1)", "convnext('T')", "vit('Ti', patch=8)",
         "mixer('S', patch=8)")  # fmt: skip


@pytest.mark.usefixtures("_small_variants")
@pytest.mark.parametrize("spec", SPECS)
def test_our_own_names_are_read_back(spec):
    """Beside a table too; the tests of export write the libraries' names."""
    model = classifier.build(spec, 5, "float32")
    own = dict(tree.named_leaves(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))))
    labels = torch_names.torch_names(model.backbone, own, "own")
    assert len({*labels.values()}) == len(own)
    assert {torch_names.own_name(model.backbone, label, own): label for label in labels.values()} == labels


@pytest.mark.parametrize(("spec", "names"), [
    ("convnext('T')", {  # facebookresearch/ConvNeXt's
        "downsample_layers.0.0.weight": "stem_conv/kernel", "downsample_layers.0.1.bias": "stem_norm/bias",
        "downsample_layers.3.0.weight": "downsample3_norm/scale", "stages.2.8.gamma": "stage2_8/gamma",
        "downsample_layers.3.1.weight": "downsample3_conv/kernel", "stages.2.8.dwconv.weight": "stage2_8/dwconv/kernel",
        "stages.2.8.norm.weight": "stage2_8/norm/scale", "norm.weight": "norm/scale", "stages.2.9.gamma": None,
    }),
    ("vit('Ti', patch=8)", {  # of torchvision's published files, which predate the numbers in its MLP
        "encoder.layers.encoder_layer_7.mlp.linear_1.weight": "block7/mlp/fc1/kernel",
        "encoder.layers.encoder_layer_7.mlp.linear_2.weight": "block7/mlp/fc2/kernel",
    }),
])  # fmt: skip
def test_other_names_of_published_files(spec, names):
    model = classifier.build(spec, 5, "float32")
    own = dict(tree.named_leaves(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))))
    found = {label: torch_names.own_name(model.backbone, label, own) for label in names}
    assert found == {label: place and f"params/backbone/{place}" for label, place in names.items()}
