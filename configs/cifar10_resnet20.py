"""CIFAR-10 with ResNet-20, section 4.2 of He et al. 2015 (arXiv:1512.03385), who report 91.25 %.

    uv run launch.py --config configs/cifar10_resnet20.py --workdir DIR

SGD with momentum 0.9 and weight decay 1e-4, batches of 128, a learning rate of 0.1 divided by 10 at 32,000 and 48,000
of 64,000 steps; crops from images padded by 4 pixels, and flips.

Differences from the paper (`docs/recipes.md`): images are normalized by ImageNet's mean and standard deviation, as for
the public PyTorch weights of these networks, instead of the mean of each pixel; BatchNorm statistics cover 128 images,
where each of two GPUs saw 64. This command evaluates the weights of akamaster/pytorch_resnet_cifar10 (stated accuracy
91.73 %) to 0.9173 on the 10,000 test images:

    uv run launch.py evaluate --config configs/cifar10_resnet20.py --config.init_from=resnet20-12fca82f.th

Training with this recipe has not been measured.

For images in folders `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, add `--config.data.source="folder('DIR')"`.
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
