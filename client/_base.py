"""What the sync and the asyncio client have in common: how they are made, and what they know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lp_edge.client._book import PortraitBook
from lp_edge.client._channel import Settings, Stubs, is_local
from lp_edge.client._messages import MotionCodec
from lp_edge.client._session import Plan, Session
from lp_edge.client.types import Portrait, ServerInfo, TlsFiles
from lp_edge.errors import NotFoundError

if TYPE_CHECKING:
    from lp_edge.runtime.face_motion import Canonical

__all__ = ["ClientBase"]


class ClientBase:
    """A connection to ``lp-serve``.

    Args:
        target: ``host:port`` or ``unix:/path.sock``.
        token: bearer token; it travels with every call.
        tls: PEM files; None = no encryption.
        insecure: send the token in the clear to another machine.
        timeout_s: deadline of every single call, and how long a stream waits for its start or for room.
        reconnect: try again while the server is not there (UNAVAILABLE), with growing pauses; register portraits again with a server
            that has forgotten them; continue streams. False = every such error is raised.
        reconnect_timeout_s: how long one call or stream tries again.
        keepalive_s: pause between pings that find out whether a silent server is still there, 5 or more.
        max_message_bytes: largest message in either direction.
        canonical: canonical face of the server's bundle, where it is a mesh other than the one that ships with lp-edge; it gives
            expression coefficients their meaning.

    Raises:
        ConfigError: a value is out of range, a file cannot be read, or a token would travel in the clear.

    All calls raise, besides what they name: ServerUnavailable, DeadlineError (no answer in time), AccessError (token or certificate),
    LimitError (a limit of the server, with ``retry_after_s``).
    """

    _grpc: ClassVar[Any]
    """``grpc`` or ``grpc.aio``."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        insecure: bool = False,
        timeout_s: float = 30.0,
        reconnect: bool = True,
        reconnect_timeout_s: float = 60.0,
        keepalive_s: float = 20.0,
        max_message_bytes: int = 64 << 20,
        canonical: Canonical | None = None,
    ) -> None:
        self.settings = Settings(
            target,
            token,
            tls,
            insecure,
            timeout_s,
            reconnect,
            reconnect_timeout_s,
            keepalive_s,
            max_message_bytes,
        )
        self._canonical, self._book = canonical, PortraitBook()
        credentials, options = self.settings.credentials(), self.settings.options
        self._channel: Any = (
            self._grpc.insecure_channel(target, options)
            if credentials is None
            else self._grpc.secure_channel(target, credentials, options)
        )
        self._stubs = Stubs(self._channel)
        self._start()

    def _start(self) -> None:
        """Make what belongs to threads or to the event loop."""
        raise NotImplementedError

    def _codec(self, info: ServerInfo) -> MotionCodec:
        return MotionCodec(info.motion, self._canonical)

    def _session(self, plan: Plan, info: ServerInfo, portraits: Sequence[Portrait]) -> Session:
        return Session(plan, info, portraits, self._codec(info), local=is_local(self.settings.target))

    def _current_ids(self, ids: Iterable[str]) -> list[str]:
        """The server's ids of portraits."""
        return [self._book.current(known_as) for known_as in ids]

    def _sizes(self, ids: Iterable[str], listed: Iterable[Portrait]) -> list[Portrait]:
        """Portraits by their ids, as registering them has answered or as the server lists them.

        Raises:
            NotFoundError: one of them is neither here nor there.
        """
        by_id = {p.id: p for p in listed}
        portraits = [self._book.portrait(known_as) or by_id.get(known_as) for known_as in ids]
        for known_as, portrait in zip(ids, portraits, strict=True):
            if portrait is None:
                raise NotFoundError(
                    f"no portrait {known_as[:6]}…", "expected one that is registered", "register it again"
                )
        return [p for p in portraits if p is not None]

    def _unknown(self, ids: Iterable[str]) -> bool:
        """Whether sizes of some of these portraits are known only to the server."""
        return any(self._book.portrait(known_as) is None for known_as in ids)
