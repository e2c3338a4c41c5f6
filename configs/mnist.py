"""MNIST from TFDS with the Keras example's network and hyperparameters: Adam at 1e-3, batches of 32, 5 epochs.

    uv run launch.py --config configs/mnist.py --workdir DIR

    seed           0       1       2       3       4     mean
    test accuracy  0.9902  0.9897  0.9862  0.9903  0.9912  0.9895

Training takes 47 to 78 s on two cores of an Intel Xeon with AMX, the first seed beside other work;
`docs/results/mnist-SEED.zip` are the bundles of these runs, which read the images in PNG files:

    --config.data.source="folder('DIR')"    # DIR/train/CLASS/*.png, DIR/test/CLASS/*.png

`fashion_mnist.py` is the same recipe for Fashion-MNIST.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "5 epochs"
    config.batch_size = 32
    config.data.source = "tfds('mnist')"
    config.preprocess = "decode(1)"
    config.augment = "normalize"
    config.model = "cnn(widths=(32, 64), hidden=64)"
    config.optimizer = "adam(eps=1e-7)"
    config.schedule = "constant(1e-3)"
    config.log_every = "100 steps"
    return config
