"""Fashion-MNIST with the network and hyperparameters of a Keras example: Adam at 1e-3, batches of 32, 5 epochs.

The example is `benchmarks/peers/keras_example.py`; `docs/recipes.md` compares both.

    uv run launch.py train --config configs/fashion_mnist.py --workdir DIR --config.seed=0

Offline, add `--config.data.manual_dir=FOLDER` with the four original .gz files in FOLDER.

    seed           0       1       2       3       4     mean
    test accuracy  0.8986  0.9059  0.8986  0.9047  0.9105  0.9037

Training takes 58 to 67 s on two cores of an Intel Xeon (AVX-512), beside other work;
`docs/results/fashion_mnist-SEED.zip` are the bundles of these runs.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "5 epochs"
    config.batch_size = 32
    config.data.source = "tfds('fashion_mnist')"
    config.preprocess = "decode(1)"
    config.augment = "normalize"  # pixels / 255, as the example does
    config.model = "cnn(widths=(32, 64), hidden=64)"
    config.optimizer = "adam(eps=1e-7)"
    config.schedule = "constant(1e-3)"
    config.log_every = "100 steps"
    return config
