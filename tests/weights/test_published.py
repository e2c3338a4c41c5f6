"""Every network in the catalog is its source's: names, preprocessing, logits or features at two sizes, back by export.

Runs where torch, timm and torchvision are installed. `-s` prints a row for each network: a name, the largest
differences in float32 and float64 and, of transformers, of resized positions, the sizes of images, the arrays written.
"""

import contextlib
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_pretrained import programs

from imgclf_jax.core import tree
from imgclf_jax.models import classifier, vit
from imgclf_jax.weights import catalog, pretrained, torch_names

VITS = {name: row for name, row in catalog.NETWORKS.items() if row.model.startswith("vit(")}
FIRST = {row.model: name for name, row in reversed(VITS.items())}  # one name for each network
CONVOLUTIONS = {name: row for name, row in catalog.NETWORKS.items() if name not in VITS}
# One name for each network; lukemelas's files beside timm's of the same network.
FIRST_CONVOLUTIONS = {(row.model, "." in name): name for name, row in reversed(CONVOLUTIONS.items())}.values()
SIZES = ((64, 64), (75, 97))
BRANCH_ENDS = r"\.(bn3|pw_proj\.bn|conv3\.bn)\.weight|layer\d\.\d+\.bn2\.weight"
TIMM, TRANSFORMERS = (not importlib.util.find_spec(name) for name in ("timm", "transformers"))

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(TIMM, reason="torch and timm come with the dependency group `peers`"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch):
    """Its LLVM and TensorFlow's abort a process that has both."""
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("name", [*VITS, *(name for name in CONVOLUTIONS if "." in name)])
def test_its_facts_are_timms(name):
    import timm
    import torch

    row, cfg = catalog.NETWORKS[name], timm.get_pretrained_cfg(name)
    assert (cfg.input_size[1], cfg.crop_pct, cfg.interpolation) == (row.size, row.crop, row.interpolation)
    assert (cfg.mean, cfg.std) == row.normalization
    assert cfg.crop_mode == "center"
    assert bool(row.license) == (cfg.license not in ("apache-2.0", "mit", "bsd-3-clause"))
    if name in VITS:
        with torch.device("meta"):  # the text of a network names all of its layers
            texts = {str(create(one, row.size)) for one in (name, FIRST[row.model])}
        assert len(texts) == 1


def randomize(network):
    """Draws weights of which each matters, by a fixed seed."""
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, x in network.named_parameters():
            noise = torch.randn(x.shape, generator=random)
            if "gamma" in key or "lambda1" in key:
                x.copy_(0.3 + 0.05 * noise)
            elif x.ndim < 2:
                x.copy_(float("norm" in key and "weight" in key) + 0.1 * noise)
            else:
                x.copy_(noise * (0.5 if x.ndim == 3 else x[0].numel() ** -0.5))
    return network.eval()


def create(name, size):
    """timm's network; SigLIP 2's has the activation of big_vision and transformers, which most of timm's lack."""
    import timm

    more = {"act_layer": "gelu_tanh"} if "siglip" in name else {}
    return timm.create_model(name, num_classes=3, img_size=size, **more).eval()


def resized(network, table, dinov2):
    """The positions of a file for the network's size, as the source resizes them."""
    import torch
    from timm.layers import resample_abs_pos_embed

    grid, tokens = network.patch_embed.grid_size, 0 if network.no_embed_class else network.num_prefix_tokens
    if not dinov2:
        return resample_abs_pos_embed(table, grid, None, tokens)
    table = table.double()  # in float32, places on the grid of 37 are rounded to 2e-6
    patches = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)  # as facebookresearch/dinov2
    factors = tuple((n + 0.1) / 37 for n in grid)
    patches = torch.nn.functional.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@contextlib.contextmanager
def angles_in(dtype, patched):
    """timm creates networks and computes angles in this dtype; otherwise those are float32."""
    import torch
    from timm.layers import pos_embed_sincos as module

    owners = (module, *(x for x in vars(module).values() if isinstance(x, type)))
    for function in (x for owner in owners for x in vars(owner).values() if hasattr(x, "__defaults__")):
        defaults = tuple(dtype if x is torch.float32 else x for x in function.__defaults__ or ())
        patched.setattr(function, "__defaults__", defaults or None)
    torch.set_default_dtype(dtype)
    patched.setattr(torch, "float32", dtype)
    try:
        yield
    finally:
        patched.undo()
        torch.set_default_dtype(torch.float32)


def features(own, taken, image):
    """Our features in the image's dtype, and the variables."""
    with jax.enable_x64(image.dtype == np.float64):
        params = {"params": own.state_shape.params}
        variables = tree.map_named({key: jnp.asarray(x, image.dtype) for key, x in taken.items()}.get, params)
        model = own.recipe.plain_model
        model = model.clone(backbone=model.backbone.clone(dtype=image.dtype))
        return np.asarray(model.apply(variables, jnp.asarray(image), method="features")), variables


@pytest.mark.parametrize("name", FIRST.values())
def test_features_are_timms_at_two_sizes(name, tmp_path, monkeypatch, capsys):
    import torch

    row, file = VITS[name], tmp_path / "x.safetensors"
    source = randomize(create(name, row.size))
    written = {key: x.numpy() for key, x in source.state_dict().items()}
    save_file(written, file)
    side, worst, tables = source.patch_embed.patch_size[0], {32: 0.0, 64: 0.0}, 0.0
    for h, w in ((row.size, row.size), (6 * side, 8 * side)):
        own = programs(file, row.model, (h, w, 3), 3)
        taken = pretrained.load(own, whole=True).taken
        for bits in worst:
            image = np.random.default_rng(0).standard_normal((1, h, w, 3)).astype(f"float{bits}")
            dtype = torch.from_numpy(image).dtype
            with monkeypatch.context() as patched, angles_in(dtype, patched), torch.no_grad():
                network = create(name, (h, w))
                fits = {key: x for key, x in source.state_dict().items() if key != "pos_embed" or h == w}
                network.load_state_dict(fits, strict=False)
                if getattr(network, "pos_embed", None) is not None and h != w:
                    table = resized(network, source.pos_embed, row.size == 518 and "reg4" not in name)
                    network.pos_embed.copy_(torch.from_numpy(taken["params/backbone/positions_embedding"]))
                    tables = max(tables, float((table - network.pos_embed).abs().max()))
                tokens = network.forward_features(torch.from_numpy(image.transpose(0, 3, 1, 2)))
                expected = network.forward_head(tokens, pre_logits=True).numpy()
            found, variables = features(own, taken, image)
            assert found.shape == expected.shape
            worst[bits] = max(worst[bits], float(np.abs(found - expected).max()))
        if h == w:
            backbone = own.recipe.plain_model.backbone
            torch_state = pytest.importorskip("imgclf_jax.tools.export.torch_state")
            back = torch_state.state_dict(backbone, variables, torch_state.naming(backbone), (h, w, 3))
    with capsys.disabled():
        sizes = f"{row.size} x {row.size}, {6 * side} x {8 * side}"
        print(f"\n| {name} | {worst[32]:.1e} | {worst[64]:.1e} | {tables:.1e} | {sizes} | {len(back)} |")
    assert worst[32] <= 1e-5
    assert worst[64] <= 1e-12
    assert tables <= 2e-6
    assert back.keys() == written.keys()
    assert all(np.array_equal(back[key], x) for key, x in written.items())


TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
WIDE = TINY | {"intermediate_size": 192}
V3 = "rope='dinov3', positions='none', registers=4, layer_scale=1.0, norm='layer_norm(epsilon=1e-5)', qkv_bias='qv'"
HUB = [
    ("Dinov2", TINY, "layer_scale=1.0"),
    ("Dinov2WithRegisters", TINY, "layer_scale=1.0, registers=4, positions='patches'"),
    ("DINOv3ViT", WIDE | {"num_register_tokens": 4}, V3),
    (
        "DINOv3ViT",
        WIDE | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        f"{V3}, mlp='swiglu'",
    ),
    ("ViT", WIDE | {"layer_norm_eps": 1e-6}, ""),
    ("CLIP", {"vision_config": WIDE}, "pre_norm=True, norm='layer_norm(epsilon=1e-5)', activation='quick_gelu'"),
    ("Siglip", {"vision_config": WIDE}, "pool='map', activation='gelu_tanh'"),
]


@pytest.mark.skipif(TRANSFORMERS, reason="transformers is needed beside the dependency group `peers`")
@pytest.mark.parametrize(("name", "config", "spec"), HUB)
def test_files_of_transformers(name, config, spec, tmp_path, monkeypatch):
    import torch
    import transformers

    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    network = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    randomize(network).save_pretrained(tmp_path)
    own = programs(tmp_path / "model.safetensors", f"vit('Ti', patch=8, {spec})", (32, 32, 3), 3)
    weights = pretrained.load(own)
    image = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        out = getattr(network, "vision_model", network)(torch.from_numpy(image.transpose(0, 3, 1, 2)))
    expected = out.pooler_output if name in ("CLIP", "Siglip") else out.last_hidden_state[:, 0]
    head = {f"params/head/{leaf}": np.zeros(shape) for leaf, shape in (("kernel", (48, 3)), ("bias", 3))}
    np.testing.assert_allclose(features(own, head | weights.taken, image)[0], expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_arrays_of_big_vision_are_those_that_timm_reads(stacked, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    rng, d, blocks = np.random.default_rng(0), 48, {}
    head = {f"{part}/{leaf}": (d, 3, 16) if leaf == "kernel" else (3, 16)
            for part in ("query", "key", "value") for leaf in ("kernel", "bias")}  # fmt: skip
    attention = {f"MultiHeadDotProductAttention_0/{name}": shape for name, shape in
                 (head | {"out/kernel": (3, 16, d), "out/bias": (d,)}).items()}  # fmt: skip
    mlp = {"MlpBlock_0/Dense_0/kernel": (d, 192), "MlpBlock_0/Dense_0/bias": (192,),
           "MlpBlock_0/Dense_1/kernel": (192, d), "MlpBlock_0/Dense_1/bias": (d,)}  # fmt: skip
    norms = {f"LayerNorm_{i}/{leaf}": (d,) for i in (0, 1) for leaf in ("scale", "bias")}
    for name, shape in (attention | mlp | norms).items():
        every = {"encoderblock": (2, *shape)} if stacked else dict.fromkeys(("encoderblock_0", "encoderblock_1"), shape)
        blocks |= {f"Transformer/{block}/{name}": one for block, one in every.items()}
    pool = {"probe": (1, 1, d)} | attention | mlp | {key: shape for key, shape in norms.items() if "0" in key}
    shapes = blocks | {f"MAPHead_0/{name}": shape for name, shape in pool.items()} | {
        "embedding/kernel": (8, 8, 3, d), "embedding/bias": (d,), "pos_embedding": (1, 16, d),
        "Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}  # fmt: skip
    arrays = {f"params/img/{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "x.npz", **arrays, **{"params/txt/head/bias": np.zeros(3, np.float32)})
    network = VisionTransformer(32, 8, num_classes=0, embed_dim=d, depth=2, num_heads=3, class_token=False,
                                global_pool="map")  # fmt: skip
    network.load_pretrained(str(tmp_path / "x.npz"))
    found = torch_names.as_timm(arrays)
    assert found.keys() == network.state_dict().keys()
    assert all(np.array_equal(found[key], x.numpy()) for key, x in network.state_dict().items())


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
        network.train()(torch.randn((16, 3, 75, 97), generator=random))
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


@pytest.mark.parametrize("name", FIRST_CONVOLUTIONS)
def test_its_logits_are_its_sources(name, tmp_path):
    """From a file: to 1e-12 in float64, in float32 to rounding of the source. Export writes the file's arrays again."""
    import torch

    spec, network = CONVOLUTIONS[name].model, random_network(name)
    arrays = {key: x.numpy().copy() for key, x in network.state_dict().items()}
    rename = lukemelas if re.match(r"efficientnet_lite\d$", name) else dict
    save_file(rename(arrays), tmp_path / "x.safetensors")
    own = programs(tmp_path / "x.safetensors", spec, (64, 64, 3), 5, mesh="fsdp=-1")  # one copy, not one a device
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
    torch_state = pytest.importorskip("imgclf_jax.tools.export.torch_state")
    written = torch_state.state_dict(own.recipe.model.backbone, variables, library, (64, 64, 3))
    assert written.keys() == rename(arrays).keys()
    for label, array in rename(arrays).items():
        if not label.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(written[label], array, err_msg=label)
    sizes, back = ", ".join(f"{h}x{w}" for h, w in SIZES), len(dict(tree.named_leaves(variables)))
    print(f"\n| {name} | {differences[np.float32]:.1e} | {differences[np.float64]:.1e} | {sizes} | {back} equal |")
    assert differences[np.float32] < rounding
    assert differences[np.float64] < 1e-12
