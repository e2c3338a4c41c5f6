"""How far rounding may move a result: the tolerances of tests that compare floating-point numbers.

Processors add up the terms of a sum in different orders (by the width of their vector and matrix units), fuse products
into sums or not, and compute exponentials by different formulas. So the last bits of a result differ. By how much
follows from the dtype, and from how many roundings lie between the inputs and the result.
"""

import math

import jax.numpy as jnp


def rounding(depth: int, dtype=jnp.float32) -> float:
    """The error of a result after `depth` roundings one after the other, relative to the magnitude of its terms.

    A rounding has a relative error of at most u, half of the distance from 1 to the next number. A sum of n terms then
    has an error of at most λ √n u with a probability of 1 - 2 exp(-λ²/2), if the roundings are independent and zero on
    average (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
    41(5)). Here λ is 6, so that about one number in 30 million exceeds it.

    Count a matrix product over k terms as k + 1, a sum of n terms as n, an elementwise operation as 1, an exponential
    or a logarithm as 4, and add up along the longest path. The result serves as `rtol`; times the magnitude of the
    terms, it serves as `atol` (terms that cancel leave a result that is smaller than they are).
    """
    return 6 * math.sqrt(depth) * float(jnp.finfo(dtype).eps) / 2
