"""Fashion-MNIST to the accuracy of the Keras example (0.8978) in the shortest time on a CPU.

    uv run launch.py --config configs/fashion_mnist_fast.py --workdir DIR --config.seed=0

A narrower network, whose products are in bfloat16, the whole set kept on the device, one steep cycle of the learning
rate.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "2.5 epochs"
    config.batch_size = 128
    config.precision = "bfloat16"
    config.data.source = "tfds('fashion_mnist')"
    config.data.placement = "device"
    config.preprocess = "decode(1)"
    config.augment = "normalize"
    config.model = "cnn(widths=(16, 32), hidden=128)"
    config.optimizer = "adam(b2=0.95)"
    config.schedule = "one_cycle(1e-2, warmup='10%')"
    config.tensorboard = False  # TensorFlow, which writes its files, takes seconds to import
    config.log_every = "200 steps"
    config.eval_every = ""
    config.checkpoint_every = ""
    return config
