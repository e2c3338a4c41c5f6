"""Your own images: a folder with one subfolder per class.

    uv run launch.py --config configs/folder.py:PATH --workdir runs/mine

PATH holds `cat/1.jpg`, `dog/2.png`, …, or `train/`, `val/` and `test/` with such folders. The best checkpoint is
chosen on `val`, never on `test`. What is missing is held out of the training images, by a hash of their names: a tenth
for `val`, and a tenth for `test` if there is neither.
"""

from imgclf_jax.config import ConfigDict, default_config, use_folder


def get_config(path: str = "images") -> ConfigDict:
    config = default_config()
    config.total = "30 epochs"
    config.batch_size = 32
    use_folder(config, path)
    config.preprocess = "decode(3)|random_resized_crop(64, scale=(0.6, 1.0))"
    config.preprocess_eval = "decode(3)|resize_small(72)|central_crop(64)"
    config.augment = "flip_lr|normalize(mean=0.5, std=0.25)"
    config.model = "cnn(widths=(32, 64, 128), hidden=128)"
    config.optimizer = "adamw(weight_decay=1e-4)"
    config.schedule = "cosine(1e-3, warmup='5%')"
    config.log_every = "1 epochs"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    config.checkpoint.best = "val/accuracy"
    return config
