"""CIFAR-10 with ResNet-20 as in section 4.2 of He et al. 2015 (arXiv:1512.03385), who report 91.25 %.

    uv run launch.py --config configs/cifar10_resnet20.py --workdir DIR

Stochastic gradients with momentum 0.9 and weight decay 1e-4, batches of 128, a rate of 0.1 divided by ten at 32,000 and
48,000 of 64,000 steps; crops from images padded by 4, and flips.

What differs, by `docs/recipes.md`: means and deviations are ImageNet's, as for the public PyTorch weights of these
networks, and not the mean of each pixel; batch norm sees 128 images at a time, where each of two GPUs saw 64. The
weights of akamaster/pytorch_resnet_cifar10 (stated accuracy 91.73 %) are evaluated by

    uv run launch.py evaluate --config configs/cifar10_resnet20.py --config.init_from=resnet20-12fca82f.th

which gives 0.9173 on the 10,000 test images. Training with this recipe here has not been measured.

Images in folders of classes, `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, by `--config.data.source="folder('DIR')"`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "64000 steps"
    config.batch_size = 128
    config.data.source = "tfds('cifar10')"
    config.preprocess = "decode(3)"
    config.augment = "pad_crop(4)|flip_lr|normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    config.model = "resnet_cifar(depth=20)"
    config.optimizer = "add_decayed_weights(1e-4)|sgd(momentum=0.9)"
    config.schedule = "step(0.1, at=('32000 steps', '48000 steps'))"
    config.log_every = "100 steps"
    config.eval_every = "10 epochs"
    config.checkpoint_every = "10 epochs"
    return config
