"""serve.py in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Herd:
    """A running serve.py."""

    def __init__(self, data_home: Path, *flags: str) -> None:
        """
        Args:
            data_home: where it finds and leaves its data, instead of the user's own.
        """
        self.process = subprocess.Popen(
            [sys.executable, "serve.py", "--port", "0", *flags],
            cwd=ROOT,
            env={**os.environ, "XDG_DATA_HOME": str(data_home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"API\s+(http://\S+)/v1", line):
                self.url = found[1]
                return
        raise AssertionError("".join(lines) + self.process.stderr.read())

    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in children.split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError(f"no worker among {children}")

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors
