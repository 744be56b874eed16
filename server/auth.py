"""Who may ask: API keys, the admin key, and pages of foreign origin.

Every route of the app asks for a key where keys are set, save /health. Routes that change the
server ask for the admin key. Without any key Herd trusts this machine, so a web page must not be
able to speak through the user's browser: foreign origins and rebound host names are refused.

What the routes depend on is async though nothing is awaited: FastAPI runs all else in a thread.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import ServerConfig
from server.errors import ApiError, error_response
from server.state import state_of

OPEN_ROUTES = ("/health",)


async def require_key(request: Request) -> None:
    """Any API key, or the admin's.

    Raises:
        ApiError: 401, none or a wrong one.
    """
    config = state_of(request).config
    route = request.scope.get("route")
    if not config.api_key or getattr(route, "path", None) in OPEN_ROUTES:
        return
    admin = (config.admin_api_key,) if config.admin_api_key else ()
    _check(request, (*config.api_key, *admin))


async def require_admin(request: Request) -> None:
    """The admin key; without one an API key; without any a connection from this machine.

    Raises:
        ApiError: 401 or 403.
    """
    config = state_of(request).config
    if config.admin_api_key is not None:
        _check(request, (config.admin_api_key,))
    elif not config.api_key and not _is_local(request):
        raise ApiError(
            403,
            "This route changes the server. No key is set, so only connections from its own "
            "machine may use it; start the server with --admin-api-key.",
            code="admin_only",
        )


def _check(request: Request, keys: Sequence[str]) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise ApiError(
            401,
            "This route needs an API key. Send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
        )
    found = given.strip().encode("latin-1")  # the bytes, as Starlette decoded them
    # Every key is compared, in constant time: the time taken says nothing about any of them.
    matches = [hmac.compare_digest(found, key.encode()) for key in keys]
    if not any(matches):
        raise ApiError(401, "The API key is not valid here.", code="invalid_api_key")


def _is_local(request: Request) -> bool:
    """From this machine, and not handed on for another one, as a proxy and the page do."""
    hosts = [request.client.host if request.client else ""]
    for header in request.headers.getlist("x-forwarded-for"):
        hosts += [host.strip() for host in header.split(",")]
    return all(host == "" or is_loopback(host) for host in hosts)


def is_loopback(host: str) -> bool:
    """An address of this machine only, or localhost."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class ForeignPageGuard:
    """ASGI middleware: refuses what a web page of another origin sends through a user's browser.

    Only while there is no API key; a foreign page does not know a key. A Host that is not this
    machine's, on a server that listens on the loopback, is DNS rebinding.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._origins = config.allowed_origins
        self._hosts = {host.lower() for host in config.allowed_hosts}
        self._is_on = not config.api_key
        self._checks_host = is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_on and scope["type"] in ("http", "websocket"):
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = _host_name(host)
        is_known = name is not None and (is_loopback(name) or name in self._hosts)
        if self._checks_host and host and not is_known:
            return ApiError(
                403,
                f"Host {host[:100]!r} is not this machine. For a proxy in front of the server "
                f"use --allowed-hosts.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return None
        if host and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return None
        return ApiError(
            403,
            f"Pages of {origin[:100]!r} may not use this server; see --allowed-origins.",
            code="origin_not_allowed",
        )


def _host_name(host: str) -> str | None:
    """The name in a Host header; None where it holds more than a name and a port."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\\\s]+)(:\d{1,5})?", host)
    return match[1].lower() if match else None
