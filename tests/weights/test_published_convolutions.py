"""Every convolutional network in the catalog is timm's: names, preprocessing, logits at two sizes, and back by export.

Runs where torch, timm and torchvision are installed; `-s` prints a row for each network.
"""

import importlib.util
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_pretrained import programs

from imgclf_jax.core import tree
from imgclf_jax.models import classifier
from imgclf_jax.tools.export import torch_state
from imgclf_jax.weights import catalog, pretrained

NETWORKS = {name: row for name, row in catalog.NETWORKS.items() if not row.model.startswith("vit(")}
# One name for each network; lukemelas's files beside timm's of the same network.
FIRST = {(row.model, "." in name): name for name, row in reversed(NETWORKS.items())}.values()
SIZES = ((64, 64), (75, 97))
BRANCH_ENDS = r"\.(bn3|pw_proj\.bn|conv3\.bn)\.weight|layer\d\.\d+\.bn2\.weight"

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not importlib.util.find_spec("timm"), reason="torch and timm come with the dependency group `peers`"
    ),
]


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch):
    """Which torch would import, and whose LLVM aborts a process that has TensorFlow's."""
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "." in name])
def test_its_facts_are_timms(name):
    import timm

    row, cfg = NETWORKS[name], timm.get_pretrained_cfg(name)
    assert (cfg.input_size[1], cfg.crop_pct, cfg.interpolation) == (row.size, row.crop, row.interpolation)
    assert (cfg.mean, cfg.std) == row.normalization
    assert cfg.crop_mode == "center"
    assert bool(row.license) == (cfg.license not in ("apache-2.0", "mit", "bsd-3-clause"))


def random_network(name):
    """Its source's network, with random weights, and statistics near those of random images."""
    import timm
    import torch
    import torchvision

    if name == "squeezenet1_1":
        network = torchvision.models.squeezenet1_1(num_classes=5)
    else:
        network = timm.create_model(name.split(".")[0] if "." in name else f"tf_{name}", num_classes=5)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, x in network.named_parameters():
            if x.ndim == 1:
                scale = key.endswith("weight") and ".grn." not in key
                scale *= 0.2 if re.search(BRANCH_ENDS, key) else 1  # else they amplify any rounding by thousands
                x.copy_(scale + (0.3 if ".grn." in key else 0.1) * torch.randn(x.shape, generator=random))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(torch.randn((8, 3, 96, 96), generator=random))
        for key, x in network.named_buffers():
            if key.endswith(("mean", "var")):
                x += 0.1 * x * torch.randn(x.shape, generator=random)
    return network.eval()


def lukemelas(arrays):
    """The names of lukemelas/EfficientNet-PyTorch for timm's of an EfficientNet-Lite."""
    blocks = sorted({tuple(map(int, key.split(".")[1:3])) for key in arrays if key.startswith("blocks.")})
    names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for n, (i, j) in enumerate(blocks):
        layers = ("expand_conv", "bn0", "depthwise_conv", "bn1", "project_conv", "bn2")[0 if i else 2 :]
        theirs = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3") if i else ("conv_dw", "bn1", "conv_pw", "bn2")
        names |= {f"blocks.{i}.{j}.{a}": f"_blocks.{n}._{b}" for a, b in zip(theirs, layers, strict=True)}
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": x for key, x in arrays.items()}


@pytest.mark.parametrize("name", FIRST)
def test_its_logits_are_its_sources(name, tmp_path):
    """From a file: to 1e-12 in float64, in float32 to rounding of the source. Export writes the file's arrays again."""
    import torch

    spec, network = NETWORKS[name].model, random_network(name)
    arrays = {key: x.numpy().copy() for key, x in network.state_dict().items()}
    rename = lukemelas if re.match(r"efficientnet_lite\d$", name) else dict
    save_file(rename(arrays), tmp_path / "x.safetensors")
    own = programs(tmp_path / "x.safetensors", spec, (64, 64, 3), 5)
    taken = pretrained.load(own, whole=True).taken
    state = own.init_state(weights=taken)
    variables = {"params": state.params, **state.model_state}
    differences, exact, rounding = {}, {}, 1e-5
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype == np.float64):
            model = classifier.build(spec, 5, np.dtype(dtype).name).clone(dtype=dtype)
            ours = jax.tree.map(lambda x, dtype=dtype: np.asarray(x, dtype), variables)
            for h, w in SIZES:
                x = np.random.default_rng(h).normal(size=(2, h, w, 3)).astype(np.float32).astype(dtype)
                with torch.no_grad():
                    theirs = network.to(torch.float64 if dtype == np.float64 else torch.float32)(
                        torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()  # fmt: skip
                logits = np.asarray(jax.jit(model.apply)(ours, x))
                assert np.ptp(theirs) > 0.1  # so that being equal says something
                found, own_error = (np.max(np.abs(one - theirs)) / np.max(np.abs(theirs))
                                    for one in (logits, exact.setdefault(h, theirs)))  # fmt: skip
                differences[dtype] = max(found, differences.get(dtype, 0))
                rounding = max(rounding, 3 * own_error)
    library = "torchvision" if name == "squeezenet1_1" else "lukemelas" if rename is lukemelas else "timm"
    written = torch_state.state_dict(own.recipe.model.backbone, variables, library, (64, 64, 3))
    assert written.keys() == rename(arrays).keys()
    for label, array in rename(arrays).items():
        if not label.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(written[label], array, err_msg=label)
    sizes, back = ", ".join(f"{h}x{w}" for h, w in SIZES), len(dict(tree.named_leaves(variables)))
    print(f"\n| {name} | {differences[np.float32]:.1e} | {differences[np.float64]:.1e} | {sizes} | {back} equal |")
    assert differences[np.float32] < rounding
    assert differences[np.float64] < 1e-12
