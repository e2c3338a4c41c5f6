"""ImageNet with ViT-S/16 in 90 epochs, as in Beyer et al. 2022 (arXiv:2205.01580), who report 76.5 %.

    uv run launch.py --config configs/imagenet_vit_s16.py --workdir DIR

The recipe is configs/vit_s16_i1k.py of google-research/big_vision; `docs/recipes.md` compares the two line by line.
Fixed sine-cosine positions, mean pooling, a tanh layer before a zero-initialized head; batches of 1024; crops of at
least 5 % of the area, flips, RandAugment with two ops at full strength, mixup 0.2 with one weight per batch; gradients
clipped to norm 1, Adam at 1e-3, 10,000 steps of warmup and cosine decay to zero. The weight decay is 0.1, multiplied by
the learning rate, which equals the original's 1e-4 per step. 22,122,472 parameters, 4.6 G multiply-adds per image.

Differences from the original: GELU is exact (there the tanh approximation), matmuls are in bfloat16, and the first step
has a learning rate of 1e-7 (there 0). One percent of the training images is held out, as there.

This recipe has not been trained here. Tests check its parameters, multiply-adds, ops, optimizer and schedule; a slow
test compiles its train step at full image size. For TFDS's `imagenet2012` see `imagenet_resnet50.py`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "90 epochs"
    config.batch_size = 1024
    config.precision = "bfloat16"
    config.data.source = "tfds('imagenet2012')"
    config.data.train = "train[:99%]"
    config.data.eval = {"val": "train[99%:]", "test": "validation"}
    config.preprocess = "decode(3)|inception_crop(224)"
    config.preprocess_eval = "decode(3)|resize_small(256, method='area')|central_crop(224)"
    config.augment = "flip_lr|randaugment(2, 10, ops='big_vision')|normalize(mean=0.5, std=0.5)"
    config.mix = "mixup(0.2, per_batch=True)"
    config.model = "vit('S', patch=16, positions='sincos', pool='mean', representation=True, head_init='zeros')"
    config.optimizer = "adamw(b2=0.999, weight_decay=0.1, mu_dtype='bfloat16')"
    config.rules.decay = ".*(bias|scale)=0"
    config.clip = 1.0
    config.schedule = "cosine(1e-3, warmup='10k steps')"
    config.log_every = "100 steps"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "1 epochs"
    config.checkpoint.best = "val/accuracy"
    return config
