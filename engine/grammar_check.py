"""Read a grammar and try it out, without a model and without torch.

Also a program: `python -m engine.grammar_check` answers one JSON line {"kind", "source"} with one
JSON line {"error"} (null: good) until its input ends. What a few lines of schema can make the
library do has no bound that could be set beforehand: multiples of a million and intersections of
patterns build automata for minutes. So engine/grammar.py tries grammars out in such a process,
which ends itself when one takes too long or too much memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from engine.api import GrammarSpec
from engine.errors import GrammarError

MAX_SOURCE_CHARS = {"json_object": 0, "json_schema": 262_144, "regex": 16_384, "lark": 1_048_576}
MAX_SCHEMA_DEPTH = 64
MAX_CHECK_S = 4
MAX_CHECK_BYTES = 2 * 2**30
WHITESPACE = r" ?|\n {0,20}"
_SCHEMA_OPTIONS = ("lenient", "coerce_one_of")
_NUM_STEPS = 3
_SIGNS_OF_SIZE = ("fuel", "limit", "gave up", "max is", "Too many", "too many", "too large")


def try_out(spec: GrammarSpec) -> None:
    """Compile a grammar and take a few steps in it.

    Raises:
        GrammarError: too large, too deeply nested, not valid, not supported, or beyond the limits.
    """
    with panics_as_errors(spec):
        source = grammar_text(spec)
        matcher = load_llguidance().LLMatcher
        is_error, messages = matcher.validate_grammar_with_warnings(source, limits=limits())
        if is_error:
            raise GrammarError(readable(spec, "; ".join(messages)))
        # Automata are built lazily: what exceeds the limits shows at a mask, not before.
        tried = matcher(_small_tokenizer(), source, log_level=0, limits=limits())
        for _ in range(_NUM_STEPS):
            mask = tried.compute_bitmask()
            if tried.is_error():
                raise GrammarError(readable(spec, tried.get_error()))
            allowed = int.from_bytes(mask, "little") & ~(1 << _EOS)
            if not allowed or tried.is_stopped():
                break
            tried.consume_token((allowed & -allowed).bit_length() - 1)


@contextlib.contextmanager
def panics_as_errors(spec: GrammarSpec) -> Iterator[None]:
    """A panic of the library is a BaseException of a class that Python cannot import."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GrammarError(readable(spec, "the grammar library failed on it")) from error


def load_llguidance() -> Any:
    """The package, imported when it is first needed.

    Raises:
        GrammarError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            "Structured output needs the package llguidance, which is not installed on this "
            "server. Install it with: pip install llguidance"
        ) from error
    return llguidance


@cache
def limits() -> Any:
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


class Vocabulary:
    """A tokenizer in the shape that llguidance takes."""

    def __init__(
        self,
        tokens: list[bytes],
        special_ids: list[int],
        eos_id: int,
        encode: Callable[[bytes], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


_EOS = 0


@cache
def _small_tokenizer() -> Any:
    """All bytes, and short texts such as begin JSON: with longer tokens a mask looks further."""
    texts = ["".join(chars) for n in (2, 3) for chars in itertools.product('{}[]":,a0 ', repeat=n)]
    tokens = [b"<eos>", *(text.encode() for text in texts), *(bytes([i]) for i in range(256))]
    first_byte = len(tokens) - 256
    vocabulary = Vocabulary(tokens, [_EOS], _EOS, lambda text: [first_byte + b for b in text])
    return load_llguidance().LLTokenizer(load_llguidance().TokenizerWrapper(vocabulary))


def grammar_text(spec: GrammarSpec) -> str:
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


def readable(spec: GrammarSpec, message: str, verb: str = "compiled") -> str:
    """The library's message without its traces, as a sentence about what the client sent."""
    message = message.partition("<backtrace>")[0].replace("<non-verbose/>", "").strip()
    if any(word in message for word in _SIGNS_OF_SIZE):
        return (
            f"The {_noun(spec)} is too complex to follow: {' '.join(message.split())[:300]}. "
            f"Simplify it: smaller counts and multiples, fewer alternatives and patterns."
        )
    if message.startswith("Unimplemented keys:"):
        keys = message.removeprefix("Unimplemented keys:").strip()
        return f"The JSON schema uses keywords that are not supported: {keys}. Remove them."
    if spec.kind == "regex":  # the library quotes the Lark grammar that it wraps the pattern in
        message = message.partition("regex parse error:")[2].partition("\n   1 |")[0] or message
    return f"The {_noun(spec)} cannot be {verb}: {message[:500]}"


def main() -> None:
    """Answer until the input ends; an alarm or a failed allocation ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_CHECK_BYTES, MAX_CHECK_BYTES))
    for line in sys.stdin.buffer:
        spec = GrammarSpec(**json.loads(line))
        signal.alarm(MAX_CHECK_S)
        error: str | None = None
        try:
            try_out(spec)
        except GrammarError as refusal:
            error = str(refusal)
        signal.alarm(0)
        sys.stdout.buffer.write(json.dumps({"error": error}).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
