"""Traffic signs from a folder of images: GTSRB, 43 classes (Stallkamp et al. 2012).

    uv run launch.py --config configs/traffic_signs.py:DIR --workdir RUN

On the 12,630 test images, next to published accuracies of 0.988 (people), 0.983 (one network; Sermanet and LeCun 2011)
and 0.9946 (a committee of networks; Cireşan et al. 2012):

    seed                    0       1       2     mean
    accuracy           0.9972  0.9964  0.9968  0.9968
    balanced accuracy  0.9968  0.9956  0.9968  0.9964

Seed 0 took 37 minutes on two cores of an Intel Xeon (AVX-512, no AMX), the others 13 and 10 on one with AMX;
`docs/results/traffic_signs-SEED.zip` are the bundles.

DIR holds `train/SIGN/…` and `test/SIGN/…`. There are no flips, since the mirror image of a sign may be another sign. Do
not split off random training images for validation: they come in tracks of 30 images of the same physical sign.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config(path: str = "signs") -> ConfigDict:
    config = default_config()
    config.total = "8 epochs"
    config.batch_size = 256
    config.precision = "bfloat16"
    config.data.source = f"folder({path!r})"
    config.data.placement = "device"
    config.preprocess = "decode(3)|resize(32)"
    config.augment = (
        "pad_crop(3, 'reflect')|color_jitter(brightness=0.4, contrast=0.4)"
        "|normalize(mean=(0.34, 0.312, 0.321), std=(0.276, 0.265, 0.271))"
    )
    config.tta = "translate(1)"
    config.model = "airbench"
    config.loss = "softmax(label_smoothing=0.1)"
    config.optimizer = "add_decayed_weights(0.00133)|sgd(momentum=0.85, nesterov=True)|lookahead(5, 0.2262, power=3)"
    config.schedule = "triangle(0.75, warmup='23%', start=0.2, end=0.05)"
    config.rules.lr = ".*norm./bias=64"
    config.rules.decay = ".*norm./bias=0.0156"
    config.rules.freeze = ".*whiten/kernel"
    config.metrics = "balanced_accuracy"
    config.log_every = "50 steps"
    config.eval_every = ""
    config.checkpoint_every = ""
    return config
