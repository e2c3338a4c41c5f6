"""Imbalanced grayscale medical images: chest X-rays of PneumoniaMNIST (Yang et al. 2023, MedMNIST v2).

    uv run launch.py --config configs/medical.py:DIR --workdir RUN

After 30 epochs on the 624 test images, next to the paper's ResNet-18 at the same 28×28 pixels:

    seed                      0       1       2       mean    published
    accuracy                  0.9215  0.9263  0.9359  0.9279  0.854
    area under the ROC curve  0.9877  0.9865  0.9885  0.9876  0.944
    mean recall of a class    0.8987  0.9060  0.9171  0.9073

The best checkpoints on `val` have accuracies of 0.9183, 0.9295 and 0.9263 and areas of 0.9854, 0.9833 and 0.9884: the
524 images of `val` hardly tell checkpoints apart. These runs took 5.3 to 6.3 minutes on two cores of an Intel Xeon
(AVX-512), beside light work; `docs/results/medical-SEED.zip` are their bundles.

The 4,708 training images come from two public copies, neither complete, so they are not numbered as in MedMNIST.

DIR holds `train/CLASS/…`, `val/CLASS/…` and `test/CLASS/…`. The loss weights both classes equally. The checkpoint with
the best area under the ROC curve on `val` is kept, and `uv run launch.py evaluate --workdir RUN` evaluates it.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config(path: str = "xrays") -> ConfigDict:
    config = default_config()
    config.total = "30 epochs"
    config.batch_size = 128
    config.precision = "bfloat16"
    config.data.source = f"folder({path!r})"
    config.data.eval = {"val": "val", "test": "test"}
    config.data.placement = "device"
    config.preprocess = "decode(1)|resize(28)"
    config.augment = "pad_crop(2)|color_jitter(brightness=0.2, contrast=0.2)|normalize(mean=0.5, std=0.25)"
    config.model = "resnet_cifar(depth=20)"
    config.loss = "softmax(class_weights='balanced')"
    config.optimizer = "add_decayed_weights(5e-4)|sgd(momentum=0.9, nesterov=True)"
    config.schedule = "one_cycle(0.05)"
    config.metrics = "auc|balanced_accuracy"
    config.log_every = "1 epochs"
    config.eval_every = "1 epochs"
    config.checkpoint_every = ""
    config.checkpoint.best = "val/auc"
    return config
