"""The examples with the highest loss, by their logits."""

import numpy as np
import pytest
from test_metrics import predicted

from imgclf_jax import losses
from imgclf_jax.tools.report import top_losses


@pytest.mark.parametrize(("link", "gaps"), [
    (losses.SOFTMAX, [110, 90, 250, -2, -40]), (losses.SIGMOID, [0, 0, 0, -3, -40]),
])  # fmt: skip
def test_the_highest_losses_are_of_the_logits(link, gaps):
    """Float32 probabilities are 0 from a gap of about 90 on."""
    own = predicted([[0, 110], [0, 90], [0, 250], [3, 1], [40, 0]], np.zeros(5, np.int32), link)
    np.testing.assert_allclose(top_losses.label_losses(own), np.logaddexp(0.0, gaps), rtol=1e-6)
    if link is losses.SOFTMAX:
        assert top_losses.highest_losses(own, 4).tolist() == [2, 0, 1, 3]
