"""The sampler over real sequences: parameters, stability of seeds, and rows that fail alone."""

import pytest
import torch

from engine.api import GenerateRequest, SamplingParams
from engine.errors import GrammarError
from engine.sampler import Sampler
from engine.sequence import Sequence
from kernels import dispatch
from kernels.dispatch import Implementation
from tests.engine.choosing import choose_at_once

VOCAB_SIZE = 500
EOS = 2


@pytest.fixture(autouse=True, params=["operators", "tables"])
def way(request, monkeypatch):
    """How tokens are chosen: operator by operator, or in one operation as on a GPU."""
    if request.param == "tables":
        if request.node.get_closest_marker("gpu"):
            pytest.skip("the reference waits for the device")
        choose_at_once(monkeypatch)


def make_sequence(index: int = 0, prompt: tuple[int, ...] = (5, 6, 7), **params) -> Sequence:
    request = GenerateRequest(
        request_id=str(index),
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=100, **params),
    )
    return Sequence.from_request(request, index, eos_token_ids=frozenset([EOS]), max_len=1000)


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 2


def sample_one(logits: torch.Tensor, **params):
    return Sampler().sample(logits.clone(), [make_sequence(**params)])[0]


class FakeMatcher:
    """Allows some tokens; fails where told to."""

    def __init__(self, allowed, *, fails: bool = False) -> None:
        self.allowed = allowed
        self.fails = fails
        self.accepted: list[int] = []

    def fill_mask(self, row: torch.Tensor) -> None:
        if self.fails:
            raise GrammarError("too complex")
        row.zero_()
        for token_id in self.allowed:
            row[token_id // 32] |= 1 << token_id % 32

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_temperature_zero_takes_the_largest_logit():
    logits = random_logits(3)
    sequences = [make_sequence(i, temperature=0.0) for i in range(3)]
    tokens = Sampler().sample(logits.clone(), sequences)
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()
    assert all(t.logprobs is None and t.error is None for t in tokens)


def test_a_vanishing_temperature_is_greedy_and_a_huge_one_is_not():
    logits = random_logits(1)
    best = logits.argmax().item()
    assert sample_one(logits, temperature=1e-7, seed=1).token_id == best
    drawn = {sample_one(logits, temperature=1e6, seed=seed).token_id for seed in range(50)}
    assert len(drawn) > 40


def test_the_same_seed_gives_the_same_text_whoever_else_is_in_the_batch():
    """Alone, among others, in another row, with its steps interrupted: one text."""

    def text_of(place: int, num_others: int, rebuild: bool) -> list[int]:
        own = make_sequence(99, temperature=1.0, seed=1234, top_k=100, top_p=0.95)
        others = [
            make_sequence(i, temperature=0.3 * i, top_k=i, repetition_penalty=1.0 + 0.1 * i)
            for i in range(num_others)
        ]
        batch = [*others[:place], own, *others[place:]]
        sampler = Sampler()
        for step in range(8):
            if rebuild:
                sampler = Sampler()
            logits = random_logits(len(batch), seed=1000 + step)
            logits[place] = random_logits(1, seed=step)[0]
            for sequence, token in zip(batch, sampler.sample(logits, batch), strict=True):
                sequence.append(token.token_id)
        return own.output_token_ids

    alone = text_of(0, 0, rebuild=False)
    assert len(set(alone)) > 4
    assert text_of(5, 9, rebuild=False) == alone
    assert text_of(2, 3, rebuild=True) == alone


def test_different_seeds_and_positions_draw_differently():
    logits = torch.zeros(1, VOCAB_SIZE)
    by_seed = [sample_one(logits, seed=seed).token_id for seed in range(20)]
    assert len(set(by_seed)) > 15
    sequence, sampler = make_sequence(seed=3), Sampler()
    for _ in range(20):
        sequence.append(sampler.sample(logits.clone(), [sequence])[0].token_id)
    assert len(set(sequence.output_token_ids)) > 15


def test_greedy_and_drawn_rows_mix_and_each_row_has_its_own_parameters():
    logits = random_logits(4)
    sequences = [
        make_sequence(0, temperature=0.0),
        make_sequence(1, temperature=2.0, top_k=1),
        make_sequence(2, temperature=0.0),
        make_sequence(3, temperature=2.0, min_p=1.0),
    ]
    tokens = Sampler().sample(logits.clone(), sequences)
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()


def test_a_changed_batch_is_seen():
    sampler, logits = Sampler(), random_logits(2)
    first, second = make_sequence(0, temperature=0.0), make_sequence(1, top_k=1)
    biased = make_sequence(2, temperature=0.0, logit_bias=((7, 100.0),))
    for batch in ([first, second], [second], [biased, first], [first, biased]):
        tokens = sampler.sample(logits[: len(batch)].clone(), batch)
        expected = [
            7 if sequence is biased else row.argmax().item()
            for sequence, row in zip(batch, logits, strict=False)
        ]
        assert [t.token_id for t in tokens] == expected


def test_logit_bias_adds_and_repeated_entries_add_up():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 9] = 1.0
    assert sample_one(logits, temperature=0.0, logit_bias=((30, 1.5),)).token_id == 30
    assert sample_one(logits, temperature=0.0, logit_bias=((30, 0.9),)).token_id == 9
    assert sample_one(logits, temperature=0.0, logit_bias=((9, -100.0),)).token_id == 0
    twice = ((30, 0.7), (30, 0.7))
    assert sample_one(logits, temperature=0.0, logit_bias=twice).token_id == 30


def test_eos_and_stop_tokens_wait_for_min_tokens():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS], logits[0, 40], logits[0, 50] = 9.0, 8.0, 7.0
    sequence = make_sequence(temperature=0.0, min_tokens=2, stop_token_ids=(40,))
    sampler = Sampler()
    for _ in range(3):
        sequence.append(sampler.sample(logits.clone(), [sequence])[0].token_id)
    assert sequence.output_token_ids == [50, 50, EOS]


def penalised(
    logits: torch.Tensor, prompt, output, *, repetition=1.0, presence=0.0, frequency=0.0
) -> torch.Tensor:
    """The definition, one token at a time."""
    logits = logits.clone()
    for token_id in set(prompt) | set(output):
        value = logits[token_id]
        logits[token_id] = value / repetition if value > 0 else value * repetition
    for token_id in set(output):
        logits[token_id] -= presence + frequency * output.count(token_id)
    return logits


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition": 1.5},
        {"presence": 0.7},
        {"frequency": 0.4},
        {"repetition": 0.8, "presence": -1.0, "frequency": 2.0},
    ],
)
def test_penalties_follow_their_definition_over_many_steps(penalties):
    prompt = (1, 1, 3, 4)
    params = {f"{name}_penalty": value for name, value in penalties.items()}
    sequence = make_sequence(prompt=prompt, temperature=0.0, **params)
    neighbour = make_sequence(1, prompt=(9,), temperature=0.0, frequency_penalty=1.0)
    plain = make_sequence(2, prompt=prompt, temperature=0.0)
    sampler = Sampler()
    for step in range(40):  # more new tokens than the buffers begin with
        logits = random_logits(1, seed=step % 7).expand(3, -1)
        batch = [plain, sequence, neighbour] if step % 3 else [sequence, neighbour, plain]
        tokens = dict(zip(batch, sampler.sample(logits.clone(), batch), strict=True))
        expected = penalised(logits[0], prompt, sequence.output_token_ids, **penalties)
        assert tokens[sequence].token_id == expected.argmax().item()
        assert tokens[plain].token_id == logits[0].argmax().item()
        for each, token in tokens.items():
            each.append(token.token_id)


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(2, seed=4)
    plain = make_sequence(0, temperature=0.0)
    sequence = make_sequence(
        1,
        prompt=tuple(range(100)),
        temperature=0.3,
        seed=5,
        top_k=3,
        repetition_penalty=1.7,
        logit_bias=((8, 50.0),),
        logprobs=4,
    )
    tokens = Sampler().sample(logits.clone(), [plain, sequence])
    reference = torch.log_softmax(logits[1], dim=-1)
    assert tokens[0].logprobs is None
    assert tokens[1].token_id == 8
    report = tokens[1].logprobs
    assert report.token_id == 8 and report.logprob == reference[8].item()
    assert [i for i, _ in report.top] == reference.topk(4).indices.tolist()
    assert [x for _, x in report.top] == reference.topk(4).values.tolist()


def test_each_sequence_gets_as_many_top_logprobs_as_it_asked_for():
    sequences = [make_sequence(i, logprobs=n) for i, n in enumerate((0, 5, 2, None))]
    tokens = Sampler().sample(random_logits(4), sequences)
    counts = [None if t.logprobs is None else len(t.logprobs.top) for t in tokens]
    assert counts == [0, 5, 2, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_that_rows_error(bad):
    logits = random_logits(3)
    expected = logits.argmax(-1).tolist()
    logits[1, 123] = bad
    sequences = [make_sequence(i, temperature=0.0) for i in range(3)]
    sequences[1] = make_sequence(1, temperature=1.0, logprobs=2)
    tokens = Sampler().sample(logits, sequences)
    assert [t.token_id for t in tokens] == [expected[0], -1, expected[2]]
    assert tokens[0].error is None and tokens[2].error is None
    assert tokens[1].error.code == "sampling_failed"
    assert "not finite" in str(tokens[1].error)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_restricts_its_row_and_goes_on(temperature):
    logits = random_logits(2)
    free, bound = (make_sequence(i, temperature=temperature, seed=i) for i in range(2))
    alone = Sampler().sample(logits[:1].clone(), [free])[0].token_id
    bound.grammar = FakeMatcher([31, 32, 499])
    tokens = Sampler().sample(logits.clone(), [free, bound])
    assert tokens[0].token_id == alone
    assert tokens[1].token_id in (31, 32, 499)
    assert bound.grammar.accepted == [tokens[1].token_id]


def test_contradictions_are_that_rows_error():
    sequences = [make_sequence(i, temperature=0.5 * i, min_tokens=3) for i in range(3)]
    sequences[1].grammar = FakeMatcher([EOS])  # which min_tokens forbids
    sequences[2].grammar = FakeMatcher([])
    tokens = Sampler().sample(random_logits(3), sequences)
    assert tokens[0].error is None and tokens[0].token_id >= 0
    for token, sequence in zip(tokens[1:], sequences[1:], strict=True):
        assert token.token_id == -1 and token.error.code == "no_token_left"
        assert "No token is left" in str(token.error)
        assert sequence.grammar.accepted == []


def test_a_grammar_that_fails_ends_its_row_only():
    sequences = [make_sequence(i, temperature=0.0) for i in range(2)]
    sequences[0].grammar = FakeMatcher([3], fails=True)
    sequences[1].grammar = FakeMatcher([3])
    tokens = Sampler().sample(random_logits(2), sequences)
    assert isinstance(tokens[0].error, GrammarError) and tokens[0].token_id == -1
    assert tokens[1].token_id == 3 and tokens[1].error is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_the_device_before_the_tokens_are_read():
    params = [
        {"temperature": 0.0},
        {"seed": 1, "top_p": 0.9, "top_k": 40},
        {"seed": 2, "min_p": 0.1, "logprobs": 3},
    ]
    sequences = [make_sequence(i, **kinds) for i, kinds in enumerate(params)]
    logits = random_logits(3).cuda()
    expected = [token.token_id for token in Sampler().sample(logits.clone(), sequences)]
    sampler = Sampler()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = sampler.launch(logits, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.token_ids.is_cuda
    assert [token.token_id for token in sampler.finish(pending)] == expected


def test_launching_chooses_and_finishing_moves_grammars_on():
    sequence = make_sequence(temperature=0.0, logprobs=1)
    sequence.grammar = FakeMatcher([7, 8])
    sampler, logits = Sampler(), random_logits(1)
    sampler.launch(logits.clone(), [sequence])  # of which nothing comes: it may be launched again
    pending = sampler.launch(logits.clone(), [sequence])
    assert sequence.grammar.accepted == []
    assert pending.token_ids.tolist() in ([7], [8]) and pending.sequences == [sequence]
    [token] = sampler.finish(pending)
    assert sequence.grammar.accepted == [token.token_id] == pending.token_ids.tolist()
    assert token.logprobs.token_id == token.token_id


def test_a_panic_of_one_grammar_that_goes_on_ends_its_row_only():
    class Panic(BaseException):
        pass

    class Panicking(FakeMatcher):
        def accept(self, token_id: int) -> None:
            del token_id
            raise Panic("assertion failed")

    sequences = [make_sequence(i, temperature=0.0) for i in range(2)]
    sequences[0].grammar = Panicking([3])
    tokens = Sampler().sample(random_logits(2), sequences)
    assert "assertion failed" in str(tokens[0].error) and tokens[1].error is None


def test_warming_up_leaves_nothing_behind():
    sampler, sequence = Sampler(), make_sequence(temperature=0.0, frequency_penalty=1.0)
    sampler.warm_up(VOCAB_SIZE, torch.device("cpu"))
    assert sampler._plan is None
    logits = random_logits(1)
    assert sampler.sample(logits.clone(), [sequence])[0].token_id == logits.argmax().item()


def test_what_fails_while_warming_up_is_off_and_the_operators_run(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("out of resources")

    broken = Implementation("triton", fails, lambda *_: True)
    monkeypatch.setattr(dispatch, "_implementations", {"choose_tokens": [broken]})
    sampler, logits = Sampler(), random_logits(1)
    sampler.warm_up(VOCAB_SIZE, torch.device("cpu"))
    assert "out of resources" in caplog.text
    token = sampler.sample(logits.clone(), [make_sequence(temperature=0.0)])[0]
    assert token.token_id == logits.argmax().item()
