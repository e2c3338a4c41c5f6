"""What the tests of files with changes share: the changes, and what every answer must be."""

from hypothesis import strategies as st

from imgclf_jax.core.errors import UserError

MAX = 1_000_000_000  # bytes of memory that reading any file may take, see the fixture `a_gigabyte`


def answered(read, *arguments, longest=1000):
    """What `read` gives, or None for a sentence of fewer than `longest` characters; other errors are failures."""
    try:
        return read(*arguments)
    except UserError as e:
        text, cause = str(e), e
        assert text
        assert "\n" not in text
        assert len(text) < longest
        while cause:
            assert not isinstance(cause, MemoryError)
            cause = cause.__cause__ or cause.__context__
        return None


SIZES = st.one_of(
    st.integers(0, 6), st.sampled_from([-1, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64])
)
BYTES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3)


def with_bytes(content, changes, cut=0):
    """Some bytes set, each counted from the end where its place is odd, and the end cut off."""
    out = bytearray(content)
    for place, value in changes:
        if out:
            out[(-1 if place % 2 else 1) * (place // 2 % len(out))] = value
    return bytes(out[: len(out) - cut])
