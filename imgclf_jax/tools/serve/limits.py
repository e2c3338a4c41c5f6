"""Limits on requests, and what all requests share."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may take, and how many there may be."""

    body_bytes: int = 20_000_000
    body_seconds: float = 15.0  # in which a client must have sent it
    images: int = 64  # of one request
    answer_seconds: float = 30.0
    # What all requests share. A client may take no more of it than it leaves free.
    requests: int = 256  # answered at once, once their bodies are here; one of several images counts as several
    small_body_bytes: int = 256_000  # up to which a body is small
    small_bodies_bytes: int = 32_000_000
    large_bodies_bytes: int = 96_000_000


class Refused(Exception):
    """A request that is not answered: the HTTP status and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Share:
    """A number of something that requests share. A client may take no more than it leaves free, so never the last."""

    def __init__(self, total: int) -> None:
        self._free, self._taken = total, Counter[str]()

    def take(self, client: str, number: int) -> bool:
        """Whether the client may have so many more, and has them now."""
        if self._taken[client] + number > self._free - number:
            return False
        self._free -= number
        self._taken[client] += number
        return True

    def give_back(self, client: str, number: int) -> None:
        """The client has so many no longer."""
        self._free += number
        self._taken[client] -= number
        if not self._taken[client]:
            del self._taken[client]

    @contextlib.contextmanager
    def held(self, client: str, number: int, message: str) -> Iterator[None]:
        """So many are the client's, inside. Raises Refused with the message if it may have no more."""
        if not self.take(client, number):
            raise Refused(503, message)
        try:
            yield
        finally:
            self.give_back(client, number)
