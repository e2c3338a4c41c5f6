"""What PyTorch's models are, for tests: with PyTorch, torchvision and timm it writes fixtures/torch_models.json.

    python tests/weights/torch_fixtures.py

No weights are stored: both sides draw them by `draw`, from their names. Stored are names, shapes and logits. Two models
are in no package, and their entries stay as they are: the ResNets of akamaster/pytorch_resnet_cifar10 and of
xternalz/WideResNet-pytorch. `torch.save` and safetensors wrote the small files, with what `test_files.py` says, and
timm's `resample_abs_pos_embed` made positions.json of `draw("pos_embed", (1, 17, 3))`.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures"


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32[shape], uniform, with a scale that suits the kind of parameter, from a stream keyed by `name`."""
    bits = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    x = ((bits >> np.uint64(40)) * 2.0**-23 - 1).astype(np.float32).reshape(shape)  # [-1, 1)
    leaf = name.rpartition(".")[2]
    if leaf == "image":
        return (x + 1) / 2
    if leaf in ("bias", "in_proj_bias", "running_mean"):
        return x / 4
    if leaf in ("running_var", "gamma", "layer_scale") or len(shape) == 1:
        return 1 + x / 2
    if leaf in ("class_token", "cls_token", "pos_embedding", "pos_embed"):
        return x
    return x * np.float32((3 / math.prod(shape[1:])) ** 0.5)


def _models() -> dict:
    """Name → (module, the model spec, image size)."""
    import torchvision.models as tv
    from timm.models.convnext import ConvNeXt
    from timm.models.mlp_mixer import MlpMixer
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 1)]
    return {
        # Of other depths and widths than the published ones, which the tests put into the variants' tables.
        "torchvision resnet basic": (ResNet(BasicBlock, [1, 2, 1, 1], 5), "resnet(18)", 64),
        "torchvision resnet bottleneck": (ResNet(Bottleneck, [1, 2, 1, 1], 5), "resnet(50)", 64),
        "torchvision convnext": (tv.ConvNeXt(blocks, num_classes=5), "convnext('T')", 64),
        "timm convnext": (
            ConvNeXt(num_classes=5, depths=(1, 2, 1, 1), dims=(8, 16, 24, 32)), "convnext('T')", 64
        ),
        "torchvision vit": (tv.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=5), "vit('Ti', patch=8)", 32),
        "timm vit": (
            VisionTransformer(32, 8, num_classes=5, embed_dim=48, depth=2, num_heads=3), "vit('Ti', patch=8)", 32
        ),
        "timm mixer": (MlpMixer(5, 32, patch_size=8, num_blocks=2, embed_dim=48), "mixer('S', patch=8)", 32),
    }  # fmt: skip


def _write_models() -> None:
    import torch

    out = json.loads((FOLDER / "torch_models.json").read_text())
    for name, (model, spec, size) in _models().items():
        shapes = {}
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if not key.endswith("num_batches_tracked"):
                    shapes[key] = list(tensor.shape)
                    tensor.copy_(torch.from_numpy(draw(key, tuple(tensor.shape))))
            image = draw("image", (2, size, size, 3))
            logits = model.eval().double()(torch.from_numpy(image).permute(0, 3, 1, 2).double())
        first = [[round(x, 7) for x in row[:5]] for row in logits.tolist()]
        out[name] = {"model": spec, "size": size, "classes": logits.shape[1], "logits": first, "shapes": shapes}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in out.items())
    (FOLDER / "torch_models.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    _write_models()
