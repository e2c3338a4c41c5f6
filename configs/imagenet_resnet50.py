"""ImageNet with ResNet-50 in 90 epochs, as in Goyal et al. 2017 (arXiv:1706.02677), who report 76.3 to 76.4 %.

    uv run launch.py --config configs/imagenet_resnet50.py --workdir DIR

Batches of 256 at a learning rate of 0.1, divided by 10 after 30, 60 and 80 epochs; for batches of 256 k, multiply the
learning rate by k and add `warmup='5 epochs'` to the schedule. Nesterov momentum, no weight decay on BatchNorm, zero
initial scale at the end of each block, a head initialized with standard deviation 0.01. Evaluation is on the central
224 of 256 pixels. 25,557,032 parameters, 4.1 G multiply-adds per image.

Differences from the paper (`docs/recipes.md`): matmuls are in bfloat16, a warmup starts near 0 (there at 0.1), crops
and sizes are torchvision's, to the pixel in evaluation. BatchNorm statistics cover 32 images, as on each GPU there, on
any number of devices. The result is that of the last epoch; the paper reports the median of the last five.

This recipe has not been trained here. Tests check its parameters, multiply-adds, ops and schedule; a slow test compiles
its train step at full image size. TFDS prepares `imagenet2012` from manually downloaded archives in
`--config.data.manual_dir=FOLDER`. For images in folders `DIR/train/CLASS/…` and `DIR/val/CLASS/…`, add
`--config.data.source="folder('DIR')" --config.data.eval.test=val`.
"""

from imgclf_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.total = "90 epochs"
    config.batch_size = 256
    config.precision = "bfloat16"
    config.data.source = "tfds('imagenet2012')"
    config.data.eval.test = "validation"
    config.preprocess = "decode(3)|random_resized_crop(224)"
    config.preprocess_eval = "decode(3)|resize_small(256, like='torchvision')|central_crop(224, like='torchvision')"
    config.augment = "flip_lr|normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    config.model = "resnet(depth=50, head_init='normal(0.01)')"
    config.batch_norm = "groups(32)"
    config.optimizer = "add_decayed_weights(1e-4)|sgd(momentum=0.9, nesterov=True)"
    config.rules.decay = "backbone/.*(bias|scale)=0"  # all of BatchNorm; the head's bias decays
    config.schedule = "step(0.1, at=('30 epochs', '60 epochs', '80 epochs'))"
    config.log_every = "100 steps"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "1 epochs"
    return config
