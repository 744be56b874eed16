"""What the operator sees: a bar per stage of the start, then where everything is; later on a bar
while decode steps are recorded."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import sys
from typing import Any

from tqdm import tqdm

from engine.api import EngineInfo, LoadProgress, RecordingProgress
from engine.memory import format_bytes
from server.chat_template import choose_template
from server.engine_client import EngineClient
from server.state import ServerState

PROGRESS_INTERVAL_S = 0.05
BAR_COLUMNS = 60
"""Of the bar between log lines: shorter than they are."""


async def show_progress(engine: EngineClient) -> None:
    """One bar per stage of the worker's start; runs until it is cancelled."""
    shown: LoadProgress | None = None
    bar: Any = None

    def show() -> None:
        nonlocal shown, bar
        progress = engine.progress
        if progress is None or progress is shown:
            return
        if shown is None or shown.stage != progress.stage:
            if bar is not None:
                bar.close()
            bar = tqdm(total=progress.total, desc=progress.stage, unit_scale=True)
        bar.update(progress.done - bar.n)
        shown = progress

    try:
        while True:
            show()
            await asyncio.sleep(PROGRESS_INTERVAL_S)
    finally:
        show()
        if bar is not None:
            bar.close()


def show_recording(progress: RecordingProgress) -> None:
    """A bar while a decode step is being recorded, where a person looks on.

    Afterwards it is wiped off: the worker's log says what was recorded. The cursor waits at the
    line's beginning, so that a log line, whichever process writes it, takes the bar's place.
    """
    if not sys.stderr.isatty():
        return
    columns = min(BAR_COLUMNS, shutil.get_terminal_size().columns - 1)
    shown = ""
    if progress.is_recording:
        shown = tqdm.format_meter(
            progress.num_recorded, progress.num_sizes, 0, ncols=columns,
            prefix="recording decode steps", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}",
        )  # fmt: skip
    sys.stderr.write(f"\r{shown:<{columns}}\r")
    sys.stderr.flush()


def announce(info: EngineInfo, state: ServerState, url: str, seconds: float) -> None:
    """Tell the operator what runs and where."""
    names = state.registry.names()
    notes = "".join(f"{note}\n" for note in info.notes)
    sys.stdout.write(
        f"{notes}\nHerd is ready after {seconds:.1f} s: {state.model_names[0]} "
        f"({info.architecture}, {info.quantization}, {info.weights_bytes / 1e6:,.0f} MB, "
        f"{info.device}), adapters: {', '.join(names) or 'none'}\n"
        f"  memory  {_memory(info)}\n"
        f"  page    {url + '/' if state.config.ui else 'off (--no-ui)'}\n"
        f"  API     {url}/v1\n"
        f"  try     {_curl(state, url)}\n\n"
    )
    sys.stdout.flush()


def _memory(info: EngineInfo) -> str:
    """Each part's share, and what the KV cache holds."""
    parts = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in info.memory)
    return f"{parts}; {info.num_kv_blocks * info.block_size:,} tokens in the KV cache"


def _curl(state: ServerState, url: str) -> str:
    """A command to try: a chat where the model can chat, else a text to continue."""
    record = next(iter(state.registry.records()), None)
    template = choose_template(
        state.chat_template, adapter=record, folder_template=state.tokenizer.chat_template
    )
    path, body = "completions", {"prompt": "Once upon a time", "max_tokens": 40}
    if template is not None:
        message = {"role": "user", "content": "What is NF4?"}
        path, body = "chat/completions", {"messages": [message]}
    body = {"model": record.name if record is not None else state.model_names[0], **body}
    key = " -H 'Authorization: Bearer KEY'" if state.config.api_key else ""
    return (
        f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' \\\n"
        f"          -d {shlex.quote(json.dumps(body))}"
    )
