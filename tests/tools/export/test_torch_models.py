"""Files of weights in the models of torchvision and timm themselves: they load strictly, and give our logits.

The other models run in a process of their own, which cannot import this package.
"""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from imgclf_jax.core import tree
from imgclf_jax.models import classifier
from imgclf_jax.tools.export import torch_state

SIZE, CLASSES = 64, 5
TIMM_VIT = f"timm.create_model('vit_tiny_patch16_224', img_size={SIZE}, num_classes={CLASSES}"
MODELS = [
    ("resnet(18)", "torchvision", f"torchvision.models.resnet18(num_classes={CLASSES})"),
    ("resnet(50)", "timm", f"timm.create_model('resnet50', num_classes={CLASSES})"),
    ("convnext('T')", "torchvision", f"torchvision.models.convnext_tiny(num_classes={CLASSES})"),
    ("convnext('T')", "timm", f"timm.create_model('convnext_tiny', num_classes={CLASSES})"),
    ("vit('Ti', patch=16)", "torchvision",
     f"torchvision.models.VisionTransformer({SIZE}, 16, 12, 3, 192, 768, num_classes={CLASSES})"),
    ("vit('Ti', patch=16)", "timm", f"{TIMM_VIT})"),
    ("vit('Ti', patch=16, positions='sincos', pool='mean')", "timm",
     f"{TIMM_VIT}, class_token=False, global_pool='avg', fc_norm=False)"),
    ("mixer('S', patch=16)", "timm", f"timm.create_model('mixer_s16_224', img_size={SIZE}, num_classes={CLASSES})"),
]  # fmt: skip
PROGRAM = """
import sys
sys.modules["imgclf_jax"] = None
import numpy as np, timm, torch, torchvision
from safetensors.torch import load_file
images = torch.from_numpy(np.load("images.npy").transpose(0, 3, 1, 2).copy())
for number, model in enumerate(sys.argv[1:]):
    model = eval(model).eval()
    model.load_state_dict(load_file(f"{number}.safetensors"), strict=True)
    with torch.no_grad():
        np.save(f"{number}.npy", model(images).numpy())
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm and torchvision come with the group `peers`")
def test_they_load_strictly_and_give_the_same_logits(tmp_path):
    """With every parameter and statistic random, so that a missing one would show."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)

    def disturbed(name, x):
        noise = 0.05 * rng.standard_normal(x.shape).astype(np.float32)
        return x + (np.abs(noise) if name.endswith("/var") else noise)

    logits = []
    for number, (spec, names, _) in enumerate(MODELS):
        model = classifier.build(spec, CLASSES, "float32")
        variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.asarray(images)))
        variables = tree.map_named(disturbed, variables)
        state = torch_state.state_dict(model.backbone, variables, names, (SIZE, SIZE, 3))
        save_file(state, tmp_path / f"{number}.safetensors")
        logits.append(np.asarray(jax.jit(model.apply)(variables, images)))
    makers = [make for *_, make in MODELS]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *makers], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, found in enumerate(logits):
        expected = np.load(tmp_path / f"{number}.npy")
        assert np.ptp(expected) > 0.1
        most = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=most, err_msg=str(MODELS[number]))
