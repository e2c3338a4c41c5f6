"""The default config: scikit-learn's 1,797 handwritten digits, resized from 8×8 to 28×28, with the Keras example's CNN.

    uv run launch.py --config configs/digits.py --config.seed=0

Test accuracy on 360 digits with seeds 0 to 4: 0.9917, 0.9944, 0.9889, 0.9917, 0.9917 (mean 0.9917), in 11 to 16 s
from start to exit on two cores of an Intel Xeon (AMX). `docs/results/digits-SEED.zip` are their bundles.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "30 epochs"
    config.batch_size = 64
    config.data.source = "digits"
    config.preprocess = "decode(1)|resize(28)"
    config.augment = "pad_crop(2)|normalize"
    config.model = "cnn"
    config.schedule = "cosine(2e-3, warmup='1 epochs')"
    config.log_every = "1 epochs"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    return config
