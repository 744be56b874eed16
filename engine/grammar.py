"""Structured output: compile a grammar once, then say before each token which ones may follow.

The work is llguidance's (an Earley parser over lazily built automata, so that compiling takes
milliseconds and a mask some 50 µs). This file adds what serving needs: limits, so that no schema
or pattern hangs a process; a cache; readable errors; tokenizers of both kinds.

Public   check_grammar (no tokenizer, for the HTTP process), GrammarCompiler, Grammar,
         GrammarMatcher
Choices  White space in JSON is at most one space, or a line break with at most 20 spaces, between
         two tokens: a model that prefers blanks cannot write them for ever.
         A schema's key "x-guidance" may hold {"lenient": true, "coerce_one_of": true} (ignore
         keywords that are not implemented, take oneOf for anyOf); its other options are ignored.
Imports  llguidance when the first grammar is used, transformers or sentencepiece when the first
         one is compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from engine.api import GrammarSpec
from engine.errors import GrammarError
from engine.grammar_check import (
    MAX_CHECK_S,
    grammar_text,
    limits,
    load_llguidance,
    panics_as_errors,
    readable,
)
from engine.grammar_tokenizer import load_tokenizer

_PROJECT = Path(__file__).resolve().parent.parent


def check_grammar(spec: GrammarSpec) -> None:
    """Refuse what cannot be compiled or takes too much to follow; needs no tokenizer.

    The first call starts a process (see engine/grammar_check.py); later ones take a millisecond,
    and nothing at all for a grammar seen before.

    Raises:
        GrammarError: too large, too deeply nested, not valid, or using what is not supported.
    """
    refusal = _refusal(spec)
    if refusal is not None:
        raise GrammarError(refusal)


@lru_cache(maxsize=128)
def _refusal(spec: GrammarSpec) -> str | None:
    return _checker().refusal(spec)


@cache
def _checker() -> _Checker:
    return _Checker()


class _Checker:
    """A process that tries grammars out, started when needed and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def refusal(self, spec: GrammarSpec) -> str | None:
        """Why a grammar is not accepted; None where it is."""
        asked = json.dumps({"kind": spec.kind, "source": spec.source}).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(asked)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer:
                self._process.communicate()
                self._process = None
        if not answer:
            return readable(spec, f"gave up after {MAX_CHECK_S} s")
        refusal: str | None = json.loads(answer)["error"]
        return refusal

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "engine.grammar_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_PROJECT,
            start_new_session=True,  # Ctrl-C is for the server; this ends with its input
        )


class GrammarCompiler:
    """Compiles grammars for one model in a thread of its own; the last ones are kept."""

    def __init__(
        self,
        tokenizer_folder: str | Path,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        *,
        max_cached: int = 128,
    ) -> None:
        """Cheap: the tokenizer is read when the first grammar comes.

        Args:
            tokenizer_folder: holds tokenizer.json, or a SentencePiece tokenizer.model.
            vocab_size: width of the model's logits; ids beyond the tokenizer's are never allowed.
            eos_token_ids: what may end a text once the grammar may; the tokenizer's own if empty.
            max_cached: compiled grammars kept.
        """
        self._folder = Path(tokenizer_folder)
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._max_cached = max_cached
        self._cached: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """Start compiling. The future raises GrammarError, or CheckpointError for the tokenizer.

        Each caller has its own future; cancelling it leaves others alone.
        """
        shared = self._cached.get(spec)
        if shared is None:
            shared = self._threads.submit(self._compile, spec)
            self._cached[spec] = shared
            if len(self._cached) > self._max_cached:
                self._cached.popitem(last=False)
        else:
            self._cached.move_to_end(spec)
        own: Future[Grammar] = Future()
        shared.add_done_callback(lambda done: _pass_on(done, own))
        return own

    def close(self) -> None:
        """Stop the threads; grammars being compiled are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: GrammarSpec) -> Grammar:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._folder, self._eos_token_ids)
        with panics_as_errors(spec):
            matcher = load_llguidance().LLMatcher(
                self._tokenizer, grammar_text(spec), log_level=0, limits=limits()
            )
            grammar = Grammar(spec, matcher, self._tokenizer.vocab_size, self._vocab_size)
            # The first mask builds the automata that every text starts with: here, off the step.
            row = torch.empty(_num_words(self._vocab_size), dtype=torch.int32)
            grammar.matcher().fill_mask(row)
        return grammar


class Grammar:
    """A compiled grammar; each sequence follows it with a matcher of its own."""

    def __init__(
        self, spec: GrammarSpec, prototype: Any, num_known_tokens: int, vocab_size: int
    ) -> None:
        self.spec = spec
        self._prototype = prototype
        self._num_known_tokens = num_known_tokens
        self._vocab_size = vocab_size

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning of the text (about 10 µs)."""
        return GrammarMatcher(
            self.spec, self._prototype.deep_copy(), self._num_known_tokens, self._vocab_size
        )


class GrammarMatcher:
    """Where one text stands in its grammar."""

    def __init__(
        self, spec: GrammarSpec, matcher: Any, num_known_tokens: int, vocab_size: int
    ) -> None:
        self._spec = spec
        self._matcher = matcher
        self._num_known_tokens = num_known_tokens
        self._vocab_size = vocab_size
        # Where tokenizer and model disagree in size, the library's mask is copied, not filled in.
        num_words = _num_words(num_known_tokens)
        self._own_row: torch.Tensor | None = None
        if num_words != _num_words(vocab_size) or num_known_tokens > vocab_size:
            self._own_row = torch.empty(num_words, dtype=torch.int32)

    def copy(self) -> GrammarMatcher:
        """Another matcher at the same place in the text."""
        known = self._num_known_tokens
        return GrammarMatcher(self._spec, self._matcher.deep_copy(), known, self._vocab_size)

    def fill_mask(self, row: torch.Tensor) -> None:
        """Say which tokens may come next.

        Args:
            row: int32 [ceil(vocab_size / 32)], contiguous, on the CPU. Bit i % 32 of word i // 32
                becomes 1 where token i is allowed. End-of-text tokens are, where the text may end.

        Raises:
            GrammarError: the limits were exceeded, or a token was accepted that is not allowed.
        """
        target = row if self._own_row is None else self._own_row
        self._matcher.unsafe_compute_mask_ptr(target.data_ptr(), 4 * target.numel())
        if self._matcher.is_error():
            raise GrammarError(readable(self._spec, self._matcher.get_error(), "followed"))
        if self._own_row is not None:
            num_words = min(row.numel(), self._own_row.numel())
            row[:num_words] = self._own_row[:num_words]
            row[num_words:] = 0
            num_last = self._vocab_size % 32
            if num_last:
                row[-1] &= (1 << num_last) - 1

    def accept(self, token_id: int) -> None:
        """Go on by one token.

        Raises:
            GrammarError: the token is not allowed here, or the limits were exceeded.
        """
        if not self._matcher.consume_token(token_id):
            raise GrammarError(readable(self._spec, self._matcher.get_error(), "followed"))

    def is_finished(self) -> bool:
        """Nothing can follow: the text is whole, whether or not an end-of-text token came."""
        return bool(self._matcher.is_stopped())


def _num_words(num_tokens: int) -> int:
    return (num_tokens + 31) // 32


def _pass_on(done: Future[Grammar], own: Future[Grammar]) -> None:
    """Give a shared future's outcome to one caller, unless the caller has cancelled."""
    if done.cancelled():
        own.cancel()
    if not own.set_running_or_notify_cancel():
        return
    error = done.exception()
    if error is None:
        own.set_result(done.result())
    else:
        own.set_exception(error)
