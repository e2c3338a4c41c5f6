"""The module of a user's method: a Classifier with a projector, and state of its own."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.models.classifier import Classifier


class Prototypes(Classifier):
    """A Classifier with a projector and, as its state, a running mean of the projections of each class."""

    def setup(self) -> None:
        super().setup()
        self.projector = nn.Dense(6)
        self.means = self.variable("prototypes", "means", jnp.zeros, (self.num_classes, 6))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = self.features(images, train)
        if self.is_initializing():
            self.project(features)
        logits: jax.Array = self.head(features)
        return logits

    def project(self, features: jax.Array) -> jax.Array:
        """f32[b, 6], from features [b, d] in the precision of the run."""
        out: jax.Array = self.projector(features.astype(jnp.float32))
        return out
