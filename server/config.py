"""What a user can set about the HTTP side. Each field is one flag; its docstring is the flag's
help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import require


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """HTTP server, keys and limits."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network interface (then set --api-key)."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    root_path: str = ""
    """Path under which a reverse proxy publishes the server."""
    ssl_keyfile: str | None = None
    """Private key in PEM format, to serve HTTPS."""
    ssl_certfile: str | None = None
    """Certificate in PEM format, to serve HTTPS."""
    api_key: tuple[str, ...] = ()
    """Key that requests must carry as "Authorization: Bearer KEY"; may be repeated. Without it no
    key is asked for."""
    admin_api_key: str | None = None
    """Key for the routes that change the server (loading adapters ...). Without it --api-key opens
    them, or, where there is none, a connection from this machine."""
    allowed_origins: tuple[str, ...] = ()
    """Origin, such as https://chat.example, whose pages may call the API from a browser; may be
    repeated, * is any."""
    allowed_hosts: tuple[str, ...] = ()
    """Host name by which a server on the loopback may be addressed besides localhost, for a proxy
    in front of it; may be repeated."""
    served_model_name: tuple[str, ...] = ()
    """Name of the base model in the API; may be repeated, the first is shown. By default the
    folder's name."""
    chat_template: str | None = None
    """File with the Jinja chat template, or the template itself; goes before every other
    template."""
    adapter: tuple[str, ...] = ()
    """Adapter to load at start, NAME or NAME=PATH; may be repeated."""
    adapter_dir: str | None = None
    """Folder from which adapters may be loaded at run time; each sub-folder is one adapter."""
    model_dir: str | None = None
    """Folder in which names of base models and adapters are looked up."""
    max_queued_requests: int = 512
    """Sequences that may wait for a place in the batch; more are answered with 503 and
    Retry-After."""
    max_request_bytes: int = 8 * 1024 * 1024
    """Largest request body."""
    data_dir: str | None = None
    """Folder for uploaded files, fine-tuning jobs and their models; by default herd in
    $XDG_DATA_HOME or ~/.local/share."""
    database: str | None = None
    """Where files, jobs and feedback are listed: a URL as SQLAlchemy takes it, such as
    postgresql+psycopg://user@host/name; an SQLite file in --data-dir by default. Each --data-dir
    has one of its own."""
    max_file_bytes: int = 512 * 1024 * 1024
    """Largest file that may be uploaded."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's logs of fine-tuning jobs."""
    shutdown_timeout_s: float = 30.0
    """After SIGTERM, how long running requests may take to finish."""
    sse_ping_interval_s: float = 15.0
    """A streamed answer that is silent for so long gets a comment line, so that proxies keep it
    open."""
    ui: bool = True
    """The chat page at /."""
    feedback: bool = True
    """Take feedback on answers. The newest answers are held in memory until somebody judges one;
    only those are kept, in the database."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", "0..65535", self.port)
        require(
            self.max_queued_requests >= 0,
            "max_queued_requests",
            "0 or more",
            self.max_queued_requests,
        )
        require(
            self.max_request_bytes > 0,
            "max_request_bytes",
            "a positive number",
            self.max_request_bytes,
        )
        require(self.max_file_bytes > 0, "max_file_bytes", "a positive number", self.max_file_bytes)
        require(
            self.shutdown_timeout_s >= 0, "shutdown_timeout_s", "0 or more", self.shutdown_timeout_s
        )
        require(
            self.sse_ping_interval_s > 0,
            "sse_ping_interval_s",
            "a positive number",
            self.sse_ping_interval_s,
        )
        require(all(self.api_key), "api_key", "a non-empty key", "")
        require(self.admin_api_key != "", "admin_api_key", "a non-empty key", "")
        both_or_neither = (self.ssl_keyfile is None) == (self.ssl_certfile is None)
        require(
            both_or_neither,
            "ssl_keyfile",
            "ssl_keyfile and ssl_certfile together",
            self.ssl_keyfile,
        )
        for value in self.adapter:
            name, equals, path = value.partition("=")
            require(bool(name) and not (equals and not path), "adapter", "NAME or NAME=PATH", value)
