"""Face recognition from few images per person: ORL, 40 people with 10 images each (Samaria and Harter 1994).

    uv run launch.py --config configs/faces.py:DIR --workdir RUN

Training uses five images of each person, the test the other 200. Test accuracy for draws 0 to 4 of the training images:
1.0000, 0.9950, 0.9850, 0.9900, 0.9900 (mean 0.9920), where an image is 0.005. Lawrence et al. 1997 report 0.962 with
five images per person. A run takes 164 to 184 s on two cores of an Intel Xeon (AVX-512); `docs/results/faces-DRAW.zip`
are their bundles.

DIR holds `PERSON/…`, here `s1/1.pgm` to `s40/10.pgm`. For another draw of the training images, add
`--config.data.source="folder('DIR', train_per_class=5, draw=1)"`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config(path: str = "faces") -> ConfigDict:
    config = default_config()
    config.total = "150 epochs"
    config.batch_size = 40
    config.precision = "bfloat16"
    config.data.source = f"folder({path!r}, train_per_class=5)"
    config.data.placement = "device"
    config.preprocess = "decode(1)|resize(48, 40)"
    config.augment = (
        "flip_lr|pad_crop(4, 'reflect')|color_jitter(brightness=0.2, contrast=0.2)|normalize(mean=0.45, std=0.2)"
    )
    config.tta = "flip|translate(1)"
    config.model = "resnet_cifar(depth=20)"
    config.loss = "softmax(label_smoothing=0.1)"
    config.optimizer = "add_decayed_weights(5e-4)|sgd(momentum=0.9, nesterov=True)"
    config.schedule = "one_cycle(0.05)"
    config.log_every = "10 epochs"
    config.eval_every = "50 epochs"
    config.checkpoint_every = ""
    return config
