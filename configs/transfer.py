"""Transfer learning: fine-tunes a trained network, or trains a new head on its features, for other images.

    uv run launch.py --config configs/transfer.py:WEIGHTS --config.data.source="folder('DIR')" --workdir RUN

WEIGHTS is a work directory, a PyTorch file or a .safetensors file (key `init_from`); DIR holds `train/CLASS/…` and
`test/CLASS/…`. This fine-tunes all parameters. Three variants:

    --config.rules.freeze="backbone/.*" --config.schedule="one_cycle(0.5)"    a head on frozen features
    --config.rules.lr="backbone/.*=0.1"                                       a smaller learning rate for the backbone
    --config.init_from=                                                       from scratch, for comparison

Test accuracy on five classes of CIFAR-100 (bicycle, bus, dolphin, mountain, table; 500 training images each, 500 test
images) after five epochs from the public PyTorch weights of ResNet-20 for CIFAR-10 (`cifar10_resnet20.py`):

    all parameters    0.952 ± 0.005    docs/results/transfer.zip
    the head alone    0.853 ± 0.004    docs/results/transfer_frozen.zip
    from scratch      0.751 ± 0.011    docs/results/transfer_scratch.zip

Means and standard deviations are over three seeds, `--config.num_seeds=3`. On two cores of an Intel Xeon (AVX-512) the
three took 324 s together, 72 s with a frozen backbone and 312 s from scratch. With version 0.1.0 the accuracy from
scratch was 0.754 at the learning rate 0.05, and 0.742, 0.744, 0.701 and 0.577 at 0.02, 0.1, 0.2 and 0.5.

The model, the image size and the normalization must match the weights: here ResNet-20 for CIFAR-10.
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
