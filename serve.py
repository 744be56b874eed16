"""Herd's entry: flags become configs, configs become objects, and the objects run.

    python serve.py [flags]                 serve the embedded demo, or --base and its --adapter
    python serve.py train --base BASE --data FILE --output FOLDER [flags]      fine-tune an adapter
    python serve.py quantize SRC DST        write a bitsandbytes 4-bit copy of a 16-bit checkpoint
    python serve.py plan --base BASE        what serving and training need of a GPU; loads nothing

The engine worker is spawned from this file and imports it again: heavy imports stay in functions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import logging
import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.api import EngineInfo
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from engine.errors import EngineError

if TYPE_CHECKING:
    import uvicorn

    from server.config import ServerConfig
    from server.datasets.prepare import Prepared
    from server.engine_client import EngineClient
    from server.state import ServerState

DEMO_ADAPTERS = ("guanaco", "pirate", "reward", "policy")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    # PyTorch's threads would wait for their next work by spinning, on the cores of the native ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        refuse_foreign_kernels()
        if words[:1] == ["quantize"]:
            return quantize(words[1:])
        if words[:1] == ["plan"]:
            from server.plan import plan

            return plan(words[1:])
        if words[:1] == ["train"]:
            from server.train_command import train_command

            return train_command(words[1:])
        engine_config, server_config = parse_serve_flags(words)
        from uvicorn.loops.auto import auto_loop_factory

        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop, where it is
            return runner.run(serve(engine_config, server_config))
    except (EngineError, ValueError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def refuse_foreign_kernels() -> None:
    """The PyPI package `kernels` and our folder of that name cannot both be imported.

    Raises:
        EngineError: it is installed.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise EngineError(
        f"The Python package 'kernels' {version} is installed in this environment; our folder "
        f"of that name cannot be imported beside it. Remove it (pip uninstall kernels), or give "
        f"Herd an environment of its own."
    )


def parse_serve_flags(words: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """Flags to configs.

    Raises:
        ValueError: a value is out of range.
    """
    from server.config import ServerConfig
    from server.flags import add_flags, from_args

    parser = argparse.ArgumentParser(
        prog="serve.py",
        usage="serve.py [flags]",
        description="Serve one 4-bit base model and a herd of LoRA adapters over the OpenAI API.",
        epilog="python serve.py train --help: fine-tune an adapter. "
        "python serve.py quantize --help: write a 4-bit copy of a 16-bit checkpoint. "
        "python serve.py plan --help: what a model needs of a GPU.",
    )
    for config_class in (ModelConfig, ServerConfig, SchedulerConfig, CacheConfig, LoraConfig):
        add_flags(parser, config_class)
    args = parser.parse_args(words)
    engine_config = EngineConfig(
        model=from_args(ModelConfig, args),
        cache=from_args(CacheConfig, args),
        scheduler=from_args(SchedulerConfig, args),
        lora=from_args(LoraConfig, args),
    )
    return engine_config, from_args(ServerConfig, args)


async def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Listen at once, load the model, serve until a signal or a failure; returns the exit status.

    Raises:
        EngineError: the model or an adapter cannot be served.
    """
    import uvicorn

    from server.console import announce

    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the page's own requests
    check_certificate(config)
    started_s = time.monotonic()
    listener = listen(config.host, config.port)
    url = public_url(config, listener.getsockname()[1])
    state, engine, adapters = compose(engine_config, config)
    loading = asyncio.create_task(load(engine, state, adapters))
    # The page's library takes seconds to import; the worker loads the model meanwhile.
    app = await asyncio.to_thread(make_app, state, config, url)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="info" if config.log_level == "debug" else "warning",
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            root_path=config.root_path,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    handle_signals(server, engine, state)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            announce(loading.result(), state, url, time.monotonic() - started_s)
            # What is there now stays. Looking through it for garbage would hold up every stream.
            gc.freeze()
        await serving
    finally:
        loading.cancel()
        server.should_exit = True  # not force_exit, which tears the app down with a traceback
        await asyncio.gather(loading, serving, return_exceptions=True)
        await state.jobs.stop()
        await engine.stop(0.0)
        state.registry.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow is done.

    Raises:
        EngineError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EngineError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. "
            f"Choose another --port (0 takes a free one) or --host."
        ) from error
    return listener


def check_certificate(config: ServerConfig) -> None:
    """Read the TLS files before anything slow is done.

    Raises:
        EngineError: they cannot be used.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile
        )
    except OSError as error:  # SSLError is one
        raise EngineError(
            f"--ssl-certfile {config.ssl_certfile}, --ssl-keyfile {config.ssl_keyfile}: "
            f"{error.strerror or error}. Name a certificate and its key, in PEM format."
        ) from error


def public_url(config: ServerConfig, port: int) -> str:
    """Where a person on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if config.ssl_keyfile else 'http'}://{host}:{port}"


def compose(
    engine_config: EngineConfig, config: ServerConfig
) -> tuple[ServerState, EngineClient, dict[str, Path]]:
    """All objects of the HTTP process, and the folders of the adapters to load at start.

    Raises:
        EngineError: the base, its tokenizer or an adapter cannot be found.
    """
    from adapters.confine import startup_roots
    from adapters.format import read_ref
    from adapters.resolve import DEMO_BASE, parse_adapter, resolve_adapter, resolve_base
    from adapters.writer import write_trained
    from engine.model_config import ModelSpec
    from server.adapters import Adapters
    from server.chat_template import load_override
    from server.data_folder import open_data_folder
    from server.database import Database
    from server.engine_client import EngineClient
    from server.feedback import Feedback
    from server.files import Files
    from server.job_data import Workshop
    from server.jobs import Jobs
    from server.metric_sinks import check_tensorboard
    from server.metrics import Metrics
    from server.state import ServerState, model_names
    from server.tokenizer import load_tokenizer

    check_tensorboard(config.tensorboard_dir)
    base = engine_config.model.base
    for flag, path in (("--adapter-dir", config.adapter_dir), ("--model-dir", config.model_dir)):
        if path is not None and not Path(path).is_dir():
            raise EngineError(f"{flag} {path}: no such folder. Create it, or name another.")
    folder = resolve_base(base, config.model_dir)
    spec = ModelSpec.from_folder(folder)
    folders = [path for path in (config.adapter_dir, config.model_dir) if path is not None]
    wanted = config.adapter or (DEMO_ADAPTERS if base == DEMO_BASE else ())
    adapters: dict[str, Path] = {}
    for name, source in map(parse_adapter, wanted):
        if name in adapters:
            raise EngineError(f"--adapter {name} is given twice. Give each adapter its own name.")
        adapters[name] = resolve_adapter(source, base, folders)
    names = model_names(config, base if base == DEMO_BASE else folder)
    metrics = Metrics(names[0])
    engine = EngineClient(
        engine_config,
        folder,
        functools.partial(read_ref, spec=spec),
        functools.partial(write_trained, base_model=names[0]),
    )
    loader = Adapters(
        spec,
        engine,
        metrics,
        roots=[
            *([Path(config.adapter_dir)] if config.adapter_dir else []),
            *(root for path in adapters.values() for root in startup_roots(path)),
        ],
        reserved_names=names,
    )
    engine.on_restart = loader.reload_all
    tokenizer = load_tokenizer(Path(engine_config.model.tokenizer or folder))
    chat_template = load_override(config.chat_template) if config.chat_template else None
    data = open_data_folder(config.data_dir, default_data_dir())
    database = Database(config.database or data.database_url())
    database.open()
    files = Files(database, data)
    shop = Workshop(
        database=database,
        folder=data,
        files=files,
        engine=engine,
        adapters=loader,
        tokenizer=tokenizer,
        spec=spec,
        prepare=prepare_data,
        model_names=names,
        chat_template=chat_template,
        max_lora_rank=engine_config.lora.max_lora_rank,
        tensorboard_dir=config.tensorboard_dir,
    )
    state = ServerState(
        config=config,
        engine=engine,
        registry=loader.registry,
        adapters=loader,
        tokenizer=tokenizer,
        model_names=names,
        base_path=str(folder),
        max_num_seqs=engine_config.scheduler.max_num_seqs,
        metrics=metrics,
        files=files,
        feedback=Feedback(database, files, is_on=config.feedback),
        jobs=Jobs(shop),
        chat_template=chat_template,
    )
    return state, engine, adapters


def prepare_data(path: Path, **settings: Any) -> Prepared:
    """server/datasets/prepare.prepare, imported when it is used: no start waits for it."""
    from server.datasets.prepare import prepare

    return prepare(path, **settings)


def default_data_dir() -> Path:
    """Where the XDG base directory specification wants a user's data."""
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "herd"


def make_app(state: ServerState, config: ServerConfig, url: str) -> Any:
    """The API, and the page in it."""
    from server.app import create_app

    app = create_app(state)
    if config.ui:
        from ui.app import mount_page

        mount_page(app, url)
    return app


async def load(engine: EngineClient, state: ServerState, adapters: dict[str, Path]) -> EngineInfo:
    """Start the engine and load the adapters, with progress bars."""
    from server.console import show_progress, show_recording

    engine.on_recording = show_recording
    bars = asyncio.create_task(show_progress(engine))
    try:
        info = await engine.start()
    finally:
        bars.cancel()
        await asyncio.gather(bars, return_exceptions=True)
    for name, path in adapters.items():
        await state.adapters.load_at_start(name, path)
    await state.jobs.start(info)
    return info


def handle_signals(server: uvicorn.Server, engine: EngineClient, state: ServerState) -> None:
    """SIGINT ends running requests at once; SIGTERM lets them finish, up to --shutdown-timeout."""

    async def stop(timeout_s: float) -> None:
        await state.drain(timeout_s)
        await engine.stop(0.0)  # what still runs is told so
        server.should_exit = True

    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []  # a task that nobody holds may be collected
    for number, timeout_s in (
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, state.config.shutdown_timeout_s),
    ):
        loop.add_signal_handler(
            number, lambda seconds: tasks.append(loop.create_task(stop(seconds))), timeout_s
        )


def quantize(words: list[str]) -> int:
    """serve.py quantize SRC DST.

    Raises:
        EngineError: the source cannot be read or the destination not written.
    """
    from tqdm import tqdm

    from adapters.resolve import resolve_base
    from engine.quantize import quantize_checkpoint

    parser = argparse.ArgumentParser(
        prog="serve.py quantize",
        description="Write a 4-bit copy of a 16-bit checkpoint, in the format of bitsandbytes.",
    )
    parser.add_argument("src", metavar="SRC", help="folder, name or repository id of the model")
    parser.add_argument("dst", metavar="DST", help="new folder for the copy")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantise the scales as well: 4.127 instead of 4.5 bits per weight",
    )
    parser.add_argument("--model-dir", help="folder in which names of base models are looked up")
    args = parser.parse_args(words)
    source = resolve_base(args.src, args.model_dir)
    with tqdm(unit="B", unit_scale=True) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.set_description(stage)
            bar.total = total
            bar.update(done - bar.n)

        quantize_checkpoint(
            source,
            Path(args.dst),
            quant_type=args.quant_type,
            double_quant=args.double_quant,
            progress=progress,
        )
    print(f"Wrote {args.dst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
