"""Regular expressions of an adapter, tried in a process that can be killed.

Python's matcher backtracks: a short pattern can take years on a module's name, and holds the
interpreter's lock meanwhile, so that a foreign adapter_config.json could stop the whole server.
What has been tried here in time takes as little time again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

TIMEOUT_S = 5.0
REPEATS = "*+{"
PROGRAM = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
for pattern in patterns:
    for path in paths:
        re.match(pattern, path), re.fullmatch(pattern, path)
"""


def are_quick(patterns: Iterable[str], paths: Iterable[str]) -> bool:
    """Whether matching every pattern with every path ends within TIMEOUT_S.

    Args:
        patterns: regular expressions that compile; those that repeat nothing are not tried.
        paths: module paths of the base.
    """
    tried = [pattern for pattern in patterns if any(sign in pattern for sign in REPEATS)]
    if not tried:
        return True
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([tried, list(paths)]),
            text=True,
            timeout=TIMEOUT_S,
            check=True,
            capture_output=True,
            start_new_session=True,  # Ctrl-C is for the server
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return False
    return True
