"""A trained network to other images: its features kept or trained further, a new head.

    uv run launch.py --config configs/transfer.py:WEIGHTS --config.data.source="folder('DIR')" --workdir RUN

WEIGHTS is a work directory, a PyTorch file or a .safetensors (key `init_from`), DIR holds `train/CLASS/…` and
`test/CLASS/…`. This trains all parameters; three variants of it:

    --config.rules.freeze="backbone/.*" --config.schedule="one_cycle(0.5)"    the head alone, on the network's features
    --config.rules.lr="backbone/.*=0.1"                                       the network by small steps
    --config.init_from=                                                       from scratch, to compare

Five classes of CIFAR-100 (bicycle, bus, dolphin, mountain, table; 500 training images each), from the public PyTorch
weights of ResNet-20 for CIFAR-10 (`cifar10_resnet20.py`), five epochs, accuracy on 500 test images:

    all parameters    0.945 ± 0.013
    the head alone    0.853 ± 0.008
    from scratch      0.760 ± 0.022, at the rate 0.05; in version 0.1.0 0.754, and at 0.02, 0.1, 0.2 and 0.5: 0.742,
                      0.744, 0.701, 0.577

Means and standard deviations of three seeds, `--config.num_seeds=3`, on two cores of an AMD EPYC. On two cores of an
Intel Xeon (Sapphire Rapids) they take two minutes, with the network kept one.

Model, size of the images, means and deviations are those of the weights: here ResNet-20 for CIFAR-10.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config(weights: str = "") -> ConfigDict:
    config = default_config()
    config.init_from = weights
    config.total = "5 epochs"
    config.batch_size = 128
    config.precision = "bfloat16"
    config.data.source = "tfds('cifar100')"
    config.preprocess = "decode(3)|resize(32)"
    config.augment = "pad_crop(4)|flip_lr|normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    config.model = "resnet_cifar(depth=20)"
    config.optimizer = "add_decayed_weights(5e-4)|sgd(momentum=0.9, nesterov=True)"
    config.schedule = "one_cycle(0.05)"
    config.log_every = "1 epochs"
    config.eval_every = ""
    config.checkpoint_every = ""
    return config
