"""Imagenette at 128 pixels in five epochs: airbench94's kind of network and Muon, for photographs.

    uv run launch.py --config configs/imagenette.py --workdir DIR

Accuracy 0.9004 with seed 0, 0.8996 with seed 1, 0.9055 with seed 2, mean 0.9018, in 27 to 52 minutes on two cores of
an Intel Xeon (AMX); seed 0 ran beside other work. `docs/results/imagenette-0.zip` to `-2.zip` are their bundles.

The leaderboard of github.com/fastai/imagenette, at ba8db39, has 87.43 % for 128 pixels and five epochs, the mean of
five runs. By its rules training starts from random weights, and evaluation uses no test-time augmentation and no larger
images. The files are its ten classes at 160 pixels, 9,469 images to train and 3,925 to validate.

For images in folders `DIR/train/CLASS/…` and `DIR/val/CLASS/…`, add
`--config.data.source="folder('DIR')" --config.data.eval.test=val`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "5 epochs"  # 185 steps
    config.batch_size = 256
    config.precision = "bfloat16"
    config.data.source = "tfds('imagenette/160px-v2')"
    config.data.eval.test = "validation"
    config.preprocess = "decode(3)|random_resized_crop(128, scale=(0.35, 1))"
    config.preprocess_eval = "decode(3)|resize_small(146, like='torchvision')|central_crop(128, like='torchvision')"
    config.augment = "flip_lr|normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    config.model = "airbench(widths=(64, 128, 256, 512, 512), scale=0.00390625, head_init='normal(1.0)')"
    config.loss = "softmax(label_smoothing=0.2)"
    # The learning rates and decays of `cifar10_muon.py`, for the mean of 256 examples instead of 2000.
    config.optimizer = "muon_sgd(beta=0.6, ns_steps=3, momentum=0.85, weight_decay=2.95e-4)"
    config.schedule = "linear(0.24)"
    config.rules.lr = ".*(norm.|whiten)/bias=56.5, head/kernel=715"
    config.rules.decay = "head/kernel=0.0791"
    config.rules.freeze = ".*whiten/kernel, head/bias"
    config.log_every = "20 steps"
    config.eval_every = "1 epochs"
    config.checkpoint_every = ""
    return config
