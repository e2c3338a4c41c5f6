"""Your own images: a folder with one subfolder per class.

    uv run launch.py --config configs/folder.py:PATH --workdir runs/mine

PATH holds `cat/1.jpg`, `dog/2.png`, …; a tenth of the images, chosen by a hash of their names, is held out as `test`.
If PATH holds `train/` with `val/` or `test/` or both, these splits are used instead, and the best checkpoint is chosen
on `val` if there is one, else on `test`.
"""

from imgclf_jax.config import ConfigDict, default_config, split_folders


def get_config(path: str = "images") -> ConfigDict:
    config = default_config()
    config.total = "30 epochs"
    config.batch_size = 32
    config.data.source = f"folder({path!r})"
    splits: dict[str, str] = {}
    for name, role in split_folders(path).items():
        splits.setdefault(role, name)
    train = splits.pop("train", "train")
    config.data.train = train if splits else f"{train}[:90%]"
    evals = splits or {"test": f"{train}[90%:]"}  # `val` first
    config.data.eval = evals
    config.preprocess = "decode(3)|random_resized_crop(64, scale=(0.6, 1.0))"
    config.preprocess_eval = "decode(3)|resize_small(72)|central_crop(64)"
    config.augment = "flip_lr|normalize(mean=0.5, std=0.25)"
    config.model = "cnn(widths=(32, 64, 128), hidden=128)"
    config.optimizer = "adamw(weight_decay=1e-4)"
    config.schedule = "cosine(1e-3, warmup='5%')"
    config.log_every = "1 epochs"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    config.checkpoint.best = f"{next(iter(evals))}/accuracy"
    return config
