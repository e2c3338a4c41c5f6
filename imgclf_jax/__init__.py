"""imgclf_jax: image-classification research in JAX, where a batch is a pure function of (seed, step)."""

__version__ = "0.1.0"
