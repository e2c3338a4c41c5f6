"""CIFAR-10 to 94 % in eight epochs: airbench94 with Muon (KellerJordan/cifar10-airbench; mean of 200 runs: 94.01 %).

    uv run launch.py --config configs/cifar10_muon.py --workdir DIR

Test accuracy 0.9383, 0.9409 and 0.9399 with seeds 0, 1 and 2 (mean 0.9397), the first two in 28 and 24 minutes on two
cores of an Intel Xeon with AMX, beside other work, the third in 49 minutes on two cores of one without AMX;
`docs/results/cifar10_muon-SEED.zip` are their bundles.

Differences from the original (`airbench94_muon.py` at 096d14d): the whitening layer's bias trains to the end, not for
three epochs; the head is initialized from a normal distribution, not a uniform one, of the same deviation, 1; matmuls
are in bfloat16 (there float16).

For images in folders `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, add `--config.data.source="folder('DIR')"`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "200 steps"  # eight epochs of 25 batches
    config.batch_size = 2000
    config.precision = "bfloat16"
    config.data.source = "tfds('cifar10')"
    config.data.placement = "device"
    config.preprocess = "decode(3)"
    config.augment = (
        "flip_alternating|pad_crop(2, 'reflect')|normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
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
