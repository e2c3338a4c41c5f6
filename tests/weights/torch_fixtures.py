"""What PyTorch's models are, for tests: with PyTorch, torchvision and timm it writes fixtures/torch_models.json.

    python tests/weights/torch_fixtures.py

No weights are stored: both sides draw them by `draw`, from their names. Stored are names, shapes and logits. Two models
are in no package, and their entries stay as they are: the ResNets of akamaster/pytorch_resnet_cifar10 and of
xternalz/WideResNet-pytorch. `torch.save` and safetensors wrote the small files, with what `test_files.py` says, and
timm's `resample_abs_pos_embed` made positions.json of `draw("pos_embed", (1, 17, 3))`.
"""

import functools
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
        "timm convnext": (ConvNeXt(num_classes=5, depths=(1, 2, 1, 1), dims=(8, 16, 24, 32)), "convnext('T')", 64),
        "torchvision vit": (tv.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=5), "vit('Ti', patch=8)", 32),
        "timm vit": (VisionTransformer(32, 8, 3, 5, embed_dim=48, depth=2, num_heads=3), "vit('Ti', patch=8)", 32),
        "timm mixer": (MlpMixer(5, 32, patch_size=8, num_blocks=2, embed_dim=48), "mixer('S', patch=8)", 32),
        **_vits(),
    }  # fmt: skip


def _vits() -> dict:
    """One small network for each kind of vision transformer in the catalog, of timm's or other names."""
    import open_clip.transformer
    import transformers
    from timm.layers import LayerNorm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    eps = functools.partial(LayerNorm, eps=1e-5)
    small = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "depth": 2, "num_heads": 3}
    hub = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    rope, v3 = {"use_rot_pos_emb": True}, {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True}
    v3 |= {"use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False, "init_values": 1.0, "norm_layer": eps}
    eva = {"mlp_ratio": 8 / 3, "swiglu_mlp": True, "ref_feat_shape": (16, 16)}
    ours3 = ("patch=8, positions='none', rope='dinov3', class_token=True, registers=4, pool='mean', layer_scale=1.0, "
             "norm='layer_norm(epsilon=1e-5)', qkv_bias='qv', mlp='swiglu'")  # fmt: skip
    ours2 = "patch=8, rope='eva02', class_token=True, pool='mean', fc_norm=True, mlp_ratio=2.6667, qkv_bias='qv'"
    clip = "patch=8, pre_norm=True, norm='layer_norm(epsilon=1e-5)', activation='quick_gelu'"
    gated = transformers.DINOv3ViTConfig(
        **hub, intermediate_size=192, use_gated_mlp=True, num_register_tokens=4, hidden_act="silu"
    )
    siglip = transformers.SiglipVisionConfig(**hub, intermediate_size=192)
    tower = open_clip.transformer.VisionTransformer(32, 8, 48, 2, 3, 4.0, act_layer=open_clip.transformer.QuickGELU)
    tower.proj = None
    found = {
        "timm vit dinov2": (VisionTransformer(**small, init_values=1.0, reg_tokens=4, no_embed_class=True),
                            "patch=8, layer_scale=1.0, registers=4, positions='patches'"),
        "timm vit clip": (VisionTransformer(**small, pre_norm=True, act_layer="quick_gelu", norm_layer=eps), clip),
        "timm vit siglip": (VisionTransformer(**small, class_token=False, global_pool="map", act_layer="gelu_tanh"),
                            "patch=8, pool='map', activation='gelu_tanh'"),
        "timm vit sbb": (VisionTransformer(**small, class_token=False, no_embed_class=True, reg_tokens=1, mlp_ratio=5,
                                           global_pool="avg"),
                         "patch=8, registers=1, positions='patches', pool='mean', fc_norm=True, mlp_ratio=5.0"),
        "timm eva dinov3": (Eva(**small, **rope, **v3, swiglu_mlp=True, swiglu_align_to=8), ours3),
        "timm eva eva02 S": (Eva(**small, **rope, **eva), f"{ours2}, mlp='swiglu_packed'"),
        "timm eva eva02 B": (Eva(**small, **rope, **eva, scale_mlp=True, qkv_fused=False),
                             f"{ours2}, mlp='swiglu', mlp_norm=True, qkv_fused=False"),
        "transformers dinov3 without head": (transformers.DINOv3ViTModel(gated),
                                             ours3.replace("class_token=True, ", "").replace("'mean'", "'cls'")),
        "transformers siglip without head": (transformers.SiglipVisionModel(siglip),
                                             "patch=8, pool='map', activation='gelu_tanh'"),
        "open_clip vit without head": (tower, clip),
    }  # fmt: skip
    return {name: (model, f"vit('Ti', {spec})", 32) for name, (model, spec) in found.items()}


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
            logits = getattr(logits, "pooler_output", logits)
        first = [[round(x, 7) for x in row[:5]] for row in logits.tolist()]
        out[name] = {"model": spec, "size": size, "classes": logits.shape[1], "logits": first, "shapes": shapes}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in out.items())
    (FOLDER / "torch_models.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    _write_models()
