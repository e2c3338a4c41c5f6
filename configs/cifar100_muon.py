"""CIFAR-100 in twelve epochs with airbench94's network and Muon.

    uv run launch.py --config configs/cifar100_muon.py --workdir DIR

Test accuracy 0.6963, 0.7004 and 0.6979 with seeds 0, 1 and 2 (mean 0.6982), in 16 minutes each on two cores of an
Intel Xeon with AMX; `docs/results/cifar100_muon-SEED.zip` are their bundles. The recipe is that of
`airbench71_cifar100.py` at 2783575 of AbdullahButt-00/CIFAR-10-Airbench (71.68 %, mean of 50 runs). Differences,
besides those of `cifar10_muon.py`: groups of 64, 256 and 256 instead of 96, 384 and 384, which need 2.2 times the
FLOPs; an epoch has all images (there 33 full batches).

For images in folders `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, add `--config.data.source="folder('DIR')"`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "396 steps"  # twelve epochs of the original, which drops the last partial batch
    config.batch_size = 1500
    config.precision = "bfloat16"
    config.data.source = "tfds('cifar100')"
    config.data.placement = "device"
    config.preprocess = "decode(3)"
    config.augment = (
        "flip_alternating|pad_crop(2, 'reflect')|normalize(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))"
    )
    config.tta = "flip|translate(1)"
    config.model = "airbench(scale=0.00390625, head_init='normal(1.0)')"  # 1 / 256
    config.loss = "softmax(label_smoothing=0.25)"
    # The original sums the loss over 1500 examples. Its learning rates are 0.32 for convolutions, 0.065 for biases and
    # 0.85 for the head, and the decay of the latter two is 0.0075 over their rate.
    config.optimizer = "muon_sgd(beta=0.6, ns_steps=3, momentum=0.85, weight_decay=7.692308e-5)"
    config.schedule = "linear(0.32)"
    config.rules.lr = ".*(norm.|whiten)/bias=304.6875, head/kernel=3984.375"
    config.rules.decay = "head/kernel=0.07647059"
    config.rules.freeze = ".*whiten/kernel, head/bias"  # the original head has no bias; this one stays zero
    config.log_every = "25 steps"
    config.eval_every = ""
    config.checkpoint_every = ""
    return config
