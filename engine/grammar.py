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
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine.api import GrammarSpec
from engine.errors import GrammarError
from engine.grammar_tokenizer import byte_tokenizer, load_llguidance, load_tokenizer

MAX_SOURCE_CHARS = {"json_object": 0, "json_schema": 262_144, "regex": 16_384, "lark": 1_048_576}
MAX_SCHEMA_DEPTH = 64
WHITESPACE = r" ?|\n {0,20}"
_SCHEMA_OPTIONS = ("lenient", "coerce_one_of")


def check_grammar(spec: GrammarSpec) -> None:
    """Refuse what cannot be compiled or takes too much to follow; needs no tokenizer.

    Raises:
        GrammarError: too large, too deeply nested, not valid, or using what is not supported.
    """
    source = _grammar_text(spec)
    try:
        message = _problem(source)
    except BaseException as error:
        # A panic of the library is a BaseException of a class that Python cannot import.
        if type(error).__name__ != "PanicException":
            raise
        message = "the grammar library failed on it"
    if message is not None:
        raise GrammarError(_readable(spec, message))


def _problem(source: str) -> str | None:
    """What llguidance finds wrong with a grammar; None when it can be followed."""
    llguidance, limits = load_llguidance(), _limits()
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source, limits=limits)
    if is_error:
        return "; ".join(messages)
    # Automata are built lazily: a pattern too large for the limits shows at the first mask only.
    matcher = llguidance.LLMatcher(byte_tokenizer(), source, log_level=0, limits=limits)
    matcher.compute_bitmask()
    return str(matcher.get_error()) if matcher.is_error() else None


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
        llguidance = load_llguidance()
        source = _grammar_text(spec)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._folder, self._eos_token_ids)
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_limits())
        grammar = Grammar(spec, matcher, self._tokenizer.vocab_size, self._vocab_size)
        # The first mask builds the automata that every request starts with: here, off the step.
        grammar.matcher().fill_mask(torch.empty(_num_words(self._vocab_size), dtype=torch.int32))
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
        self._vocab_size = vocab_size
        # Where tokenizer and model disagree in size, the library's mask is copied, not filled in.
        num_words = _num_words(num_known_tokens)
        self._own_row: torch.Tensor | None = None
        if num_words != _num_words(vocab_size) or num_known_tokens > vocab_size:
            self._own_row = torch.empty(num_words, dtype=torch.int32)

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
            raise GrammarError(_readable(self._spec, self._matcher.get_error(), "followed"))
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
            raise GrammarError(_readable(self._spec, self._matcher.get_error(), "followed"))

    def is_finished(self) -> bool:
        """Nothing can follow: the text is whole, whether or not an end-of-text token came."""
        return bool(self._matcher.is_stopped())

    def can_end(self) -> bool:
        """The text so far is whole, though more may follow."""
        return bool(self._matcher.is_accepting())


@cache
def _limits() -> Any:
    """What a hostile grammar may cost before it is refused: some 0.1 s a step, tens of MB."""
    return load_llguidance().LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _num_words(num_tokens: int) -> int:
    return (num_tokens + 31) // 32


def _grammar_text(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own form, its size checked."""
    matcher = load_llguidance().LLMatcher
    limit = MAX_SOURCE_CHARS[spec.kind]
    if limit and len(spec.source) > limit:
        raise GrammarError(
            f"The {_noun(spec)} has {len(spec.source)} characters; at most {limit} are allowed. "
            f"Make it smaller."
        )
    if spec.kind == "regex":
        # Digits, letters and blanks of ASCII: what \d, \w and \s nearly always mean in a request.
        pattern = load_llguidance().regex_to_lark(spec.source, "dws")
        return str(matcher.grammar_from_lark(f"start: /{pattern}/"))
    if spec.kind == "lark":
        return str(matcher.grammar_from_lark(spec.source))
    schema = _read_schema(spec.source) if spec.kind == "json_schema" else {"type": "object"}
    options = {"whitespace_pattern": WHITESPACE}
    return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def _read_schema(source: str) -> dict[str, Any]:
    """A JSON schema of bounded depth; of the library's options only those a request may set."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"The JSON schema is not valid JSON: {error}") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"The JSON schema must be an object, not {json.dumps(schema)[:80]}.")
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise GrammarError(
            f"The JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep. Flatten it, or "
            f"move parts to $defs and refer to them."
        )
    asked = schema.pop("x-guidance", None)
    if isinstance(asked, dict):
        schema["x-guidance"] = {key: asked[key] is True for key in _SCHEMA_OPTIONS if key in asked}
    return schema


def _depth(value: object) -> int:
    """Levels of objects and arrays; level by level, as recursion would overflow first."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [value for values in inner for value in values]
    return depth


def _noun(spec: GrammarSpec) -> str:
    names = {"regex": "regular expression", "lark": "grammar"}
    return names.get(spec.kind, "JSON schema")


def _readable(spec: GrammarSpec, message: str, verb: str = "compiled") -> str:
    """The library's message without its traces, as a sentence about what the client sent."""
    message = message.partition("<backtrace>")[0].replace("<non-verbose/>", "").strip()
    if "fuel" in message or "too complex" in message.lower() or "limit" in message:
        return (
            f"The {_noun(spec)} is too complex to follow: {' '.join(message.split())[:300]}. "
            f"Simplify it: smaller counts, fewer alternatives."
        )
    if message.startswith("Unimplemented keys:"):
        keys = message.removeprefix("Unimplemented keys:").strip()
        return f"The JSON schema uses keywords that are not supported: {keys}. Remove them."
    if spec.kind == "regex":  # the library quotes the Lark grammar that it wraps the pattern in
        message = message.partition("regex parse error:")[2].partition("\n   1 |")[0] or message
    return f"The {_noun(spec)} cannot be {verb}: {message[:2000]}"


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
