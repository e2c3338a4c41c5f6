"""SupCon: supervised contrastive pretraining of a backbone."""

import jax

from imgclf_jax.methods import Batch, Method, Problem
from imgclf_jax.methods.simclr import contrastive


def supcon(problem: Problem, temperature: float = 0.1, width: int = 128, hidden: int = 0) -> Method:
    """Pretrains the backbone with L_out, equation 2 of Khosla et al. 2020 (arXiv:2004.11362).

    The positives of a view are all other views of its class in the global batch, or in its microbatch with
    `accumulate`; at least the second view of the same image. Projector and head are as in `simclr`: train the head
    afterwards, for example by the command `probe`. `contrastive_accuracy` is the fraction of views whose most similar
    view in the batch is of the same class.
    """

    def classes(batch: Batch) -> jax.Array:
        labels: jax.Array = batch["label"]
        return labels

    return contrastive("supcon", classes, temperature, width, hidden)
