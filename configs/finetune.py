"""Your own images, from ImageNet weights: fine-tunes EfficientNet-Lite0 on a folder with one subfolder per class.

    uv run launch.py --config configs/finetune.py:PHOTOS --workdir runs/mine

PHOTOS is as for `folder.py`, which trains from nothing. Published weights of another network, if you have the file:

    --config.init_from="timm('resnet50.tv_in1k', 'FILE')"

The model, its image size and normalization follow from `init_from`.
"""

from imgclf_jax.config import ConfigDict, default_config, use_folder


def get_config(path: str = "images") -> ConfigDict:
    config = default_config()
    use_folder(config, path)
    config.init_from = "efficientnet_lite0"
    config.model = config.preprocess = ""
    config.augment = "flip_lr"
    config.total = "10 epochs"
    config.stop = "val/loss, patience 3 epochs"
    config.batch_size = 32
    config.optimizer = "adamw(weight_decay=0.01)"
    config.schedule = "cosine(1e-3, warmup='10%')"
    config.rules.layer_decay = 0.8
    config.ema = 0.98
    config.log_every = "1 epochs"
    config.checkpoint.best = "val/loss"
    return config
