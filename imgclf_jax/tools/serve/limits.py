"""Limits on requests, and the shares of clients in what all requests use."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a request and of all requests together."""

    body_bytes: int = 20_000_000
    body_seconds: float = 15.0  # for sending the body
    images: int = 64  # per request
    answer_seconds: float = 30.0
    # Totals over all requests. A client may take no more than it leaves free.
    requests: int = 256  # concurrent requests whose bodies have arrived; each image of a request counts
    small_body_bytes: int = 256_000  # the largest small body
    small_bodies_bytes: int = 32_000_000
    large_bodies_bytes: int = 96_000_000


class Refused(Exception):
    """Refuses a request with an HTTP status and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Share:
    """A total that clients share. A client may take no more than it leaves free, so one never takes all."""

    def __init__(self, total: int) -> None:
        self._free, self._taken = total, Counter[str]()

    def take(self, client: str, number: int) -> bool:
        """Takes `number` more for the client; returns False, without taking any, if that is too many."""
        if self._taken[client] + number > self._free - number:
            return False
        self._free -= number
        self._taken[client] += number
        return True

    def give_back(self, client: str, number: int) -> None:
        """Returns `number` that the client had taken."""
        self._free += number
        self._taken[client] -= number
        if not self._taken[client]:
            del self._taken[client]

    @contextlib.contextmanager
    def held(self, client: str, number: int, message: str) -> Iterator[None]:
        """Inside, the client holds `number`. Raises Refused with the message if that is too many."""
        if not self.take(client, number):
            raise Refused(503, message)
        try:
            yield
        finally:
            self.give_back(client, number)
