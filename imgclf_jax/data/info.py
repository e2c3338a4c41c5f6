"""The facts about a data set that outlive it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataInfo:
    """The facts about the data that a trained model needs after the data are gone."""

    train_examples: int
    image_shape: tuple[int, int, int]  # (h, w, c), after the host ops
    class_names: tuple[str, ...]
    fingerprint: str
    class_counts: tuple[int, ...] = ()  # training examples of each class; empty unless the loss needs them
    target_names: tuple[str, ...] = ()  # equal to class_names if examples have targets f32[k]; empty with labels
    sampling: str = ""  # SHA-256 of the weights or ids that data.sampling reads; empty if it reads none
    extra: dict[str, "DataInfo"] = field(default_factory=dict)  # the further streams of `data.extra`, by name
    bits: int = 16  # of encoded grey images of more than 8 bits: see `Source`
