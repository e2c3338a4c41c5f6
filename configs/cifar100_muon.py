"""CIFAR-100 in twelve epochs with airbench94's network and Muon (KellerJordan/cifar10-airbench).

    uv run launch.py --config configs/cifar100_muon.py --workdir DIR

Training with this recipe has not been measured. It is that of `cifar10_muon.py`, for half as many epochs more.

For images in folders `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, add `--config.data.source="folder('DIR')"`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "300 steps"  # twelve epochs of 25 batches
    config.batch_size = 2000
    config.precision = "bfloat16"
    config.data.source = "tfds('cifar100')"
    config.data.placement = "device"
    config.preprocess = "decode(3)"
    config.augment = (
        "flip_alternating|pad_crop(2, 'reflect')|normalize(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))"
    )
    config.tta = "flip|translate(1)"
    config.model = "airbench(scale=0.00390625, head_init='normal(1.0)')"  # 1 / 256
    config.loss = "softmax(label_smoothing=0.2)"
    # The original sums the loss over 2000 examples. Its learning rates are 0.24 for convolutions, 0.053 for biases and
    # 0.67 for the head, and the decay of the latter two is 0.004 over their rate.
    config.optimizer = "muon_sgd(beta=0.6, ns_steps=3, momentum=0.85, weight_decay=3.773585e-5)"
    config.schedule = "linear(0.24)"
    config.rules.lr = ".*(norm.|whiten)/bias=441.6667, head/kernel=5583.333"
    config.rules.decay = "head/kernel=0.07910448"
    config.rules.freeze = ".*whiten/kernel, head/bias"  # the original head has no bias; this one stays zero
    config.log_every = "25 steps"
    config.eval_every = ""
    config.checkpoint_every = ""
    return config
