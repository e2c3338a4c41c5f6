"""ImageNet with ViT-S/16 in 90 epochs: Beyer et al. 2022 (arXiv:2205.01580), who report 76.5 % (90 epochs).

    uv run launch.py --config configs/imagenet_vit_s16.py --workdir DIR

Fixed sine-cosine positions, features averaged over the tokens, batches of 1024, RandAugment of two operations at
magnitude 10, mixup 0.2, gradients clipped to norm 1, AdamW at 1e-3 with a decay of 1e-4 per step (the paper's, which is
not multiplied by the rate: 0.1 here), 10,000 steps of warmup, then a cosine to zero. 21,974,632 parameters, 4.6 G
multiply-adds an image.

Not trained here: tests hold its parameters, multiply-adds and schedule, and slow ones compile it at full size and train
two steps on made-up images. For TFDS's `imagenet2012` see `imagenet_resnet50.py`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "90 epochs"
    config.batch_size = 1024
    config.precision = "bfloat16"
    config.data.source = "tfds('imagenet2012')"
    config.data.eval.test = "validation"
    config.preprocess = "decode(3)|random_resized_crop(224, scale=(0.05, 1.0))"
    config.preprocess_eval = "decode(3)|resize_small(256)|central_crop(224)"
    config.augment = "flip_lr|randaugment(2, 10)|normalize(mean=0.5, std=0.5)"
    config.mix = "mixup(0.2)"
    config.model = "vit('S', patch=16, positions='sincos', pool='mean')"
    config.optimizer = "adamw(b2=0.999, weight_decay=0.1)"
    config.rules.decay = ".*(bias|scale)=0"
    config.clip = 1.0
    config.schedule = "cosine(1e-3, warmup='10k steps')"
    config.log_every = "100 steps"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "1 epochs"
    config.checkpoint.best = "test/accuracy"
    return config
