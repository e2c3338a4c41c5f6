"""Facts about a data set, from its metadata or from flags, for a planned run."""

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, prepare, sources, splits
from imgclf_jax.data.source import DataInfo
from imgclf_jax.data.stream import Images


def describe(
    config: ConfigDict, shape: tuple[int, int, int] | None = None, classes: int | None = None,
    targets: int | None = None, examples: int | None = None, count_classes: bool = False,
) -> DataInfo:  # fmt: skip
    """Returns the DataInfo of the training images, without reading images if all facts are given, or from TFDS.

    The facts are the shape (h, w, c) after the host ops, the numbers of classes, or of targets per example, and of
    examples; None reads them from the data's metadata. Raises UserError, naming the flags, if that is not possible.
    """
    counts: tuple[int, ...] = ()
    has_targets, classes = bool(targets), targets or classes
    extra = datasets.open_train_images(config).describe().extra if config.data.extra else {}  # the data must be present
    if None in (shape, classes, examples):
        try:
            call = spec.parse_one(config.data.source)
            if call.name == "tfds":
                own = _describe_tfds(config, *call.args, **call.kwargs)
            else:
                train = sources.take_split(datasets.open_data(config), config.data.train)
                info = Images(train, config.preprocess).describe(count_classes)
                own, counts = (info.image_shape, len(info.class_names), info.train_examples), info.class_counts
                has_targets = bool(info.target_names) if classes is None else has_targets
        except UserError as e:
            raise UserError(f"{e}; or describe the data: --shape=224,224,3 --classes=1000 (or --targets=N) "
                            "--examples=1281167") from e  # fmt: skip
        shape = shape or own[0]
        classes, examples = classes or own[1], examples or own[2]
    if shape is None or not classes or not examples:
        raise UserError("dryrun: the data are not prepared, so the number of examples is unknown; pass --examples=N")
    names = tuple(str(i) for i in range(classes))
    if count_classes and len(counts) != classes:
        counts = (max(1, examples // classes),) * classes
    return DataInfo(examples, shape, names, "", counts, target_names=names if has_targets else (), extra=extra)


def _describe_tfds(
    config: ConfigDict, name: str, data_dir: str = "", manual_dir: str = ""
) -> tuple[tuple[int, int, int], int, int | None]:
    """Returns (image shape after the host ops, classes, training examples if the data set is prepared)."""
    del manual_dir
    sizes, classes, shape = prepare.metadata(name, data_dir or config.data.data_dir)
    height, width, channels = (known or usual for known, usual in zip(shape, (375, 500, 3), strict=True))
    image = decode.build(config.preprocess)[0](np.zeros((height, width, channels), np.uint8), 0, 0)
    parts = splits.resolve(config.data.train, sizes) if sizes else []
    return image.shape, classes, sum(part.stop - part.start for part in parts) or None
