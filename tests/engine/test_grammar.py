"""Structured output over real tokenizers: whatever the logits say, the text is valid."""

import json
import re
import subprocess
import sys
import threading
import time

import jsonschema
import pytest
import sentencepiece
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import engine.grammar
from engine.api import GenerateRequest, GrammarSpec, SamplingParams
from engine.errors import CheckpointError, GrammarError
from engine.grammar import GrammarCompiler, check_grammar
from engine.grammar_check import MAX_SCHEMA_DEPTH
from engine.sampler import Sampler
from engine.sequence import Sequence

TEXT = [
    'The llama said: "hello, world" and left; 12 llamas followed it up the hill.',
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "none": null}',
    "Größe, naïve, 漢字 and 😀 need bytes.",
    "for i in range(10): print(i * 2.5, -1e3)",
] * 20
EOS = 2


def train_sentencepiece(folder) -> None:
    """A tokenizer.model with byte fallback, as LLaMA's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )


def save_fast(tokenizer: Tokenizer, folder) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def train_byte_level(folder) -> None:
    """A tokenizer.json over bytes, as GPT-2's, Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    save_fast(tokenizer, folder)


def train_metaspace(folder) -> None:
    """A tokenizer.json with byte fallback and a dummy space before texts, as Llama 2's."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = ["▁", *(chr(i) for i in range(33, 127))]
    vocab = {piece: i for i, piece in enumerate([*first, *pieces, "▁t", "▁th", '":', '"}'])}
    merges = [("▁", "t"), ("▁t", "h"), ('"', ":"), ('"', "}")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    save_fast(tokenizer, folder)


def read_sentencepiece(folder, token_ids) -> str:
    """Text of the tokens, the first space kept (a text goes on where a prompt ended)."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    prefix = model.encode("x")
    return model.decode(prefix + token_ids).removeprefix("x")


def read_fast(folder, token_ids) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix = tokenizer.encode("x", add_special_tokens=False).ids
    return tokenizer.decode(prefix + token_ids).removeprefix("x")


KINDS = {
    "sentencepiece": (train_sentencepiece, read_sentencepiece),
    "byte_level": (train_byte_level, read_fast),
    "metaspace": (train_metaspace, read_fast),
}


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param][0](path)
    (path / "kind").write_text(request.param)
    return path


@pytest.fixture(scope="module")
def compiler(folder):
    compiler = GrammarCompiler(folder, 450, [EOS])  # more rows than the tokenizer has tokens
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def one_compiler(tmp_path_factory):
    """For what does not depend on the tokenizer."""
    folder = tmp_path_factory.mktemp("one")
    train_byte_level(folder)
    compiler = GrammarCompiler(folder, 450, [EOS])
    yield compiler
    compiler.close()


def generate(compiler, folder, spec: GrammarSpec, *, seed: int, bias=None, max_tokens=6000) -> str:
    """Text of a model whose logits are noise, as the engine would drive it."""
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=1.0, grammar=spec)
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), params=params)
    sequence = Sequence.from_request(request, 0, eos_token_ids=frozenset([EOS]), max_len=99_999)
    sequence.grammar = compiler.submit(spec).result(timeout=60).matcher()
    sampler = Sampler()
    generator = torch.Generator().manual_seed(seed)
    while len(sequence.output_token_ids) < max_tokens:
        logits = torch.randn(1, 450, generator=generator)
        if bias is not None:
            logits += bias
        token = sampler.sample(logits, [sequence])[0]
        assert token.error is None, token.error
        if token.token_id == EOS:
            break
        sequence.append(token.token_id)
        if sequence.grammar.is_finished():
            break
    else:
        pytest.fail(f"not finished after {max_tokens} tokens")
    return KINDS[(folder / "kind").read_text()][1](folder, sequence.output_token_ids)


SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "address": {
                "type": "object",
                "properties": {"city": {"enum": ["Lima", "La Paz", "Cuzco"]}, "zip": {"const": 7}},
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age", "address"],
        "additionalProperties": False,
    },
    "arrays": {
        "type": "array",
        "items": {"type": "number", "minimum": -1.5, "maximum": 2.5},
        "minItems": 2,
        "maxItems": 4,
    },
    "any_of": {
        "anyOf": [
            {"type": "string", "maxLength": 5},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
             "additionalProperties": False},
        ]
    },
    "refs": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "pattern": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["id", "day"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_noise_follows_a_json_schema(compiler, folder, name):
    schema = SCHEMAS[name]
    spec = GrammarSpec(kind="json_schema", source=json.dumps(schema))
    check_grammar(spec)
    for seed in range(3):
        text = generate(compiler, folder, spec, seed=seed)
        jsonschema.validate(json.loads(text), schema)


def test_noise_writes_a_json_object(compiler, folder):
    for seed in range(3):
        text = generate(compiler, folder, GrammarSpec(kind="json_object"), seed=seed)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-[a-c]+(x|yz)?", "(yes|no)", r"[à-ü]{2,5} ?漢{1,2}", r"\{\"a\": \d+\}"]
)
def test_noise_follows_a_regex(compiler, folder, pattern):
    spec = GrammarSpec(kind="regex", source=pattern)
    check_grammar(spec)
    for seed in range(3):
        assert re.fullmatch(pattern, generate(compiler, folder, spec, seed=seed))


def test_noise_follows_a_lark_grammar_with_json_inside(compiler, folder):
    source = 'start: "call " NAME " " args\nNAME: "f" | "g"\nargs: %json {"type": "boolean"}'
    spec = GrammarSpec(kind="lark", source=source)
    check_grammar(spec)
    assert re.fullmatch("call [fg] (true|false)", generate(compiler, folder, spec, seed=0))


def test_a_model_that_loves_blanks_still_ends(compiler, folder):
    """White space between JSON tokens is bounded."""
    _, read = KINDS[(folder / "kind").read_text()]
    blank = torch.zeros(450)
    for token_id in range(3, 340):
        text = read(folder, [token_id])
        if text and not text.strip():
            blank[token_id] = 30.0
    assert blank.any()
    schema = SCHEMAS["nested"]
    spec = GrammarSpec(kind="json_schema", source=json.dumps(schema))
    text = generate(compiler, folder, spec, seed=0, bias=blank, max_tokens=1000)
    jsonschema.validate(json.loads(text), schema)


def allowed_ids(matcher, vocab_size: int) -> list[int]:
    row = torch.full(((vocab_size + 31) // 32,), -1, dtype=torch.int32)
    matcher.fill_mask(row)
    return [i for i in range(32 * len(row)) if row[i // 32].item() >> i % 32 & 1]


@pytest.mark.parametrize("difference", [-5, 0, 1, 200])
def test_ids_outside_tokenizer_or_model_are_never_allowed(folder, difference):
    spec = GrammarSpec(kind="regex", source=r"(.|\n)*")
    reference = GrammarCompiler(folder, 4096, [EOS])
    known = allowed_ids(reference.submit(spec).result(timeout=60).matcher(), 4096)
    assert max(known) < 410 and EOS in known and 1 not in known
    vocab_size = max(known) + 1 + difference
    compiler = GrammarCompiler(folder, vocab_size, [EOS])
    matcher = compiler.submit(spec).result(timeout=60).matcher()
    assert allowed_ids(matcher, vocab_size) == [i for i in known if i < vocab_size]
    reference.close()
    compiler.close()


def test_the_end_is_allowed_only_where_the_text_may_end(compiler):
    matcher = compiler.submit(GrammarSpec(kind="regex", source="[0-9]{2,3}")).result().matcher()
    digits = allowed_ids(matcher, 450)
    assert EOS not in digits
    single = digits[0]
    matcher.accept(single)
    assert EOS not in allowed_ids(matcher, 450) and not matcher.is_finished()
    matcher.accept(single)
    assert EOS in allowed_ids(matcher, 450)
    assert not matcher.is_finished()
    matcher.accept(single)
    assert matcher.is_finished()
    assert allowed_ids(matcher, 450) == [EOS]


def test_every_end_of_text_token_of_the_model_may_end_it(folder):
    compiler = GrammarCompiler(folder, 450, [1, EOS])
    matcher = compiler.submit(GrammarSpec(kind="regex", source="a*")).result(timeout=60).matcher()
    assert {1, EOS} <= set(allowed_ids(matcher, 450))
    compiler.close()


def test_matchers_of_one_grammar_do_not_share_their_place(compiler):
    grammar = compiler.submit(GrammarSpec(kind="regex", source="[0-9]{2}")).result()
    first, second = grammar.matcher(), grammar.matcher()
    digit = allowed_ids(first, 450)[0]
    first.accept(digit)
    assert EOS not in allowed_ids(second, 450) and digit in allowed_ids(second, 450)
    first.accept(digit)
    assert first.is_finished() and not second.is_finished()


def test_a_token_that_is_not_allowed_is_an_error(compiler):
    matcher = compiler.submit(GrammarSpec(kind="regex", source="[0-9]")).result().matcher()
    wrong = next(i for i in range(300, 340) if i not in allowed_ids(matcher, 450))
    with pytest.raises(GrammarError):
        matcher.accept(wrong)
    with pytest.raises(GrammarError):
        matcher.fill_mask(torch.zeros(15, dtype=torch.int32))


def test_compiled_grammars_are_kept_and_the_oldest_given_up(folder):
    compiler = GrammarCompiler(folder, 450, [EOS], max_cached=2)
    specs = [GrammarSpec(kind="regex", source=f"a{{{n}}}") for n in range(1, 4)]
    first = compiler.submit(specs[0]).result(timeout=60)
    assert compiler.submit(specs[0]).result(timeout=60) is first
    for spec in specs[1:]:
        compiler.submit(spec).result(timeout=60)
    assert compiler.submit(specs[0]).result(timeout=60) is not first
    compiler.close()


def test_cancelling_one_callers_future_leaves_the_others_alone(folder, monkeypatch):
    compiler = GrammarCompiler(folder, 450, [EOS])
    may_load, load = threading.Event(), engine.grammar.load_tokenizer
    monkeypatch.setattr(
        engine.grammar, "load_tokenizer", lambda *args: may_load.wait(60) and load(*args)
    )
    futures = [compiler.submit(GrammarSpec(kind="json_object")) for _ in range(3)]
    assert futures[1].cancel()
    may_load.set()
    assert futures[0].result(timeout=60) is futures[2].result(timeout=60)
    assert futures[1].cancelled()
    compiler.close()


def test_a_folder_without_tokenizer_is_named(tmp_path):
    compiler = GrammarCompiler(tmp_path / "nothing", 450, [EOS])
    with pytest.raises(CheckpointError, match="nothing: no tokenizer"):
        compiler.submit(GrammarSpec(kind="json_object")).result(timeout=60)
    compiler.close()


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "must be an object"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"not": {}, "type": "string"}', r'not supported: \["not"\]'),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", '{"$ref": "#/$defs/missing"}', "missing"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"type": "string", "pattern": "("}', "unclosed group"),
        ("json_schema", '{"a":' * 5000 + "1" + "}" * 5000, "nested more than|not valid JSON"),
        ("json_schema", '{"a":' * 100 + "1" + "}" * 100, f"more than {MAX_SCHEMA_DEPTH} levels"),
        ("json_schema", '{"x": "' + "y" * 300_000 + '"}', "at most 262144"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a" * 20_000, "at most 16384"),
        ("lark", "start: nowhere", 'unknown name: "nowhere"'),
        ("lark", "", "Empty grammar"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_plain_words(kind, source, message):
    with pytest.raises(GrammarError, match=message) as caught:
        check_grammar(GrammarSpec(kind=kind, source=source))
    assert "<unknown>" not in str(caught.value) and "start: /" not in str(caught.value)
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize(
    "keyword", [{"uniqueItems": True, "type": "array"}, {"oneOf": [{"type": "object"}, {}]}]
)
def test_lenient_schemas_ignore_what_is_not_supported(keyword):
    with pytest.raises(GrammarError):
        check_grammar(GrammarSpec(kind="json_schema", source=json.dumps(keyword)))
    lenient = keyword | {"x-guidance": {"lenient": True, "coerce_one_of": True}}
    check_grammar(GrammarSpec(kind="json_schema", source=json.dumps(lenient)))


def test_a_schema_cannot_switch_the_white_space_rule_off(one_compiler):
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": "x*"}}
    spec = GrammarSpec(kind="json_schema", source=json.dumps(schema))
    plain = GrammarSpec(kind="json_schema", source='{"type": "object"}')
    rows = []
    for each in (spec, plain):
        matcher = one_compiler.submit(each).result(timeout=60).matcher()
        matcher.accept(next(i for i in allowed_ids(matcher, 450)))
        rows.append(allowed_ids(matcher, 450))
    assert rows[0] == rows[1]


def test_a_schema_that_would_take_minutes_is_refused_and_the_next_one_is_not():
    hostile = {"type": "integer", "multipleOf": 123_456_789}
    for _ in range(2):  # the second time from memory
        with pytest.raises(GrammarError, match="too complex to follow: gave up after 4 s"):
            check_grammar(GrammarSpec(kind="json_schema", source=json.dumps(hostile)))
    check_grammar(GrammarSpec(kind="json_schema", source='{"type": "integer"}'))


def test_the_checking_process_is_replaced_when_it_has_died():
    check_grammar(GrammarSpec(kind="regex", source="before"))
    process = engine.grammar._checker()._process
    process.kill()
    process.wait()
    check_grammar(GrammarSpec(kind="regex", source="after"))
    with pytest.raises(GrammarError, match="unclosed group"):
        check_grammar(GrammarSpec(kind="regex", source="(after"))


def test_trying_grammars_out_needs_no_torch():
    program = "import sys, engine.grammar_check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a{1000}){1000}"),
        ("regex", "((a{1,100}){1,100}){1,100}"),
        ("regex", "(a?){900}a{900}"),
        ("regex", ".*(a|b).{300}x" * 20),
        ("regex", "(" * 200 + "a+" + ")+" * 200),
        ("json_schema", '{"type": "array", "minItems": 100000000}'),
        ("json_schema", '{"type": "string", "minLength": 1000000000}'),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(10_000)]})),
        ("json_schema", json.dumps({"anyOf": [{"const": {"k": i}} for i in range(3000)]})),
        ("lark", 'start: start start | start | "a"'),
        ("lark", "start: " + " ".join(['("a" | "aa")*'] * 200)),
    ],
)
def test_hostile_grammars_are_refused_or_followed_in_bounded_time(one_compiler, kind, source):
    spec = GrammarSpec(kind=kind, source=source)
    started = time.perf_counter()
    try:
        check_grammar(spec)
        matcher = one_compiler.submit(spec).result(timeout=60).matcher()
        for _ in range(20):
            ids = allowed_ids(matcher, 450)
            if ids == [EOS]:
                break
            matcher.accept(ids[0])
    except GrammarError as error:
        assert len(str(error)) < 2500
    assert time.perf_counter() - started < 60  # a guard against hanging, not a measurement


@pytest.mark.parametrize("is_special", [False, True])
def test_an_added_token_is_text_exactly_when_it_is_shown_as_text(tmp_path, is_special):
    """Qwen's <tool_call> is one ordinary token; a control token of that name must not be used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    added = AddedToken("<call>", special=is_special, normalized=False)
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    compiler = GrammarCompiler(tmp_path, 258, [256])

    spec = GrammarSpec(kind="lark", source='start: "<call>" | TEXT "<call>!"\nTEXT: /x+/')
    matcher = compiler.submit(spec).result(timeout=60).matcher()
    ordinary = {tokenizer.token_to_id(char) for char in "<x"}
    assert set(allowed_ids(matcher, 258)) == ordinary | (set() if is_special else {257})
    for char in "x<call>!" if is_special else "x":
        matcher.accept(tokenizer.token_to_id(char))
    if not is_special:
        matcher.accept(257)
        matcher.accept(tokenizer.token_to_id("!"))
    assert matcher.is_finished()
    compiler.close()
