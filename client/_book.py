"""The portraits that a client knows: pictures to register again, and the ids under which a server has them now."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lp_edge.client.types import Portrait

if TYPE_CHECKING:
    from lp_edge.client._messages import Registration

__all__ = ["PortraitBook", "ids_of"]


def ids_of(portraits: str | Portrait | Iterable[str | Portrait]) -> tuple[str, ...]:
    """Ids of one portrait or several, given as such or as ids."""
    several = (portraits,) if isinstance(portraits, (str, Portrait)) else tuple(portraits)
    return tuple(p if isinstance(p, str) else p.id for p in several)


class PortraitBook:
    """Portraits by the id under which the user knows them; safe to use from several threads.

    A server that was started again gives new ids; users keep the old one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portraits: dict[str, Portrait] = {}
        self._registrations: dict[str, Registration] = {}
        self._now: dict[str, str] = {}  # the user's id -> the server's, where they differ

    def add(self, portrait: Portrait, registration: Registration) -> None:
        """Keep what was registered."""
        with self._lock:
            self._portraits[portrait.id] = portrait
            self._registrations[portrait.id] = registration

    def forget(self, known_as: str) -> None:
        """The user has deleted it."""
        with self._lock:
            for table in (self._portraits, self._registrations, self._now):
                table.pop(known_as, None)

    def moved(self, known_as: str, now: str) -> None:
        """The server has it under another id."""
        with self._lock:
            self._now[known_as] = now

    def current(self, known_as: str) -> str:
        """The server's id."""
        with self._lock:
            return self._now.get(known_as, known_as)

    def known_as(self, current: str) -> str:
        """The user's id."""
        with self._lock:
            return next((old for old, now in self._now.items() if now == current), current)

    def portrait(self, known_as: str) -> Portrait | None:
        """What registering it has answered; None where another client did."""
        with self._lock:
            return self._portraits.get(known_as)

    def registration(self, known_as: str) -> Registration | None:
        """How to register it again."""
        with self._lock:
            return self._registrations.get(known_as)

    def missing(self, ids: Iterable[str], on_server: set[str]) -> list[tuple[str, Registration]]:
        """Those of ``ids`` that the server does not have and this client could register again."""
        found = ((known_as, self.registration(known_as)) for known_as in dict.fromkeys(ids))
        return [(k, r) for k, r in found if r is not None and self.current(k) not in on_server]
