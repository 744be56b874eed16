"""Samples to token sequences with loss weights.

A conversation is learnt answer by answer: each has the prompt that it would have when served. Where
an answer's sequence is how the next prompt begins, the two are one, so most templates make one
sequence of a whole conversation. Where the template writes earlier answers in another way than they
were generated (without the end token, without their reasoning), the conversation takes several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from engine.train.token_dataset import Kind
from server.datasets.problems import BadRecord
from server.datasets.samples import Chat, Pair, Plain, Sample
from server.datasets.served_model import ServedModel, TemplateInput, template_input
from server.datasets.turns import chat_prompt, chat_turn, plain_prompt, plain_turn

Sequence = tuple[list[int], list[float]]
"""(token ids, loss weights)."""
Notes = Counter[str]
"""What the user may want to know, and of how many samples it is true."""
SPLIT = "conversations became several sequences: the template writes earlier answers differently"
PLAIN = "samples are plain text, without the chat template: ask the model with /v1/completions"
NO_GAP = "samples have no space or line break between prompt and answer, which are joined as is"
OTHER_CONTEXT = "pairs differ before their last answers; only the last answers are learnt"


def sequences_of(model: ServedModel, sample: Sample, kind: Kind, notes: Notes) -> list[Sequence]:
    """What is trained on; for a pair the better answer's sequence, then the worse one's.

    Raises:
        BadRecord: the sample cannot be used.
    """
    first = sample.chosen if isinstance(sample, Pair) else sample
    if isinstance(first, Plain):
        notes[PLAIN] += 1
        joint = first.prompt[-1:] + first.answer[:1]
        notes[NO_GAP] += len(joint) == 2 and joint.isalnum()
    if kind == "prompt":
        sequences = [_prompt(model, first)]
    elif isinstance(sample, Pair):
        sequences = [_last_answer(model, side) for side in (sample.chosen, sample.rejected)]
        notes[OTHER_CONTEXT] += _context(sample.chosen) != _context(sample.rejected)
    elif isinstance(sample, Plain):
        sequences = [_last_answer(model, sample)]
    else:
        sequences = list(_answers(model, sample))
        notes[SPLIT] += len(sequences) > 1
    for token_ids, weights in sequences:
        _check(model, token_ids, weights, kind)
    return sequences


def _answers(model: ServedModel, chat: Chat) -> Iterator[Sequence]:
    """All answers that have a weight."""
    token_ids: list[int] = []
    weights: list[float] = []
    for index, weight in enumerate(chat.weights):
        if weight == 0:
            continue
        prompt_ids, answer_ids = _turn(model, chat, index)
        if token_ids and prompt_ids[: len(token_ids)] != token_ids:
            yield token_ids, weights
            weights = []
        context = [0.0] * (len(prompt_ids) - len(weights))
        token_ids = prompt_ids + answer_ids
        weights = weights + context + [weight] * len(answer_ids)
    if not token_ids:
        raise BadRecord(
            "there is nothing to learn: no message of the assistant has a weight above 0. Add an "
            "answer, or remove the line."
        )
    yield token_ids, weights


def _last_answer(model: ServedModel, sample: Chat | Plain) -> Sequence:
    if isinstance(sample, Plain):
        prompt_ids, answer_ids = plain_turn(model, sample.prompt, sample.answer)
    else:
        prompt_ids, answer_ids = _turn(model, sample, len(sample.messages) - 1)
    return prompt_ids + answer_ids, [0.0] * len(prompt_ids) + [1.0] * len(answer_ids)


def _turn(model: ServedModel, chat: Chat, index: int) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens) of the assistant's message at the index."""
    if all(message.role == "assistant" for message in chat.messages[:index]):
        raise BadRecord(
            f"message {index} is an answer that nobody asked for. Put a message of the user before "
            f"it, or remove it."
        )
    try:
        return chat_turn(model, _given(model, chat, index + 1))
    except BadRecord as error:
        raise BadRecord(f"message {index}: {error}") from error


def _prompt(model: ServedModel, sample: Chat | Plain) -> Sequence:
    """What a policy is to answer: a conversation up to its last answer."""
    if isinstance(sample, Plain):
        if not sample.prompt:
            raise BadRecord("the prompt is empty. Remove the line.")
        token_ids = plain_prompt(model, sample.prompt)
    else:
        num_asked = len(sample.messages) - (sample.messages[-1].role == "assistant")
        if not num_asked:
            raise BadRecord("there is no prompt before the answer. Remove the line.")
        token_ids = chat_prompt(model, _given(model, sample, num_asked))
    return token_ids, [0.0] * len(token_ids)


def _given(model: ServedModel, chat: Chat, num_messages: int) -> TemplateInput:
    assert model.template is not None
    return template_input(model.template, chat.messages[:num_messages], chat.tools)


def _context(sample: Chat | Plain) -> object:
    return sample.messages[:-1] if isinstance(sample, Chat) else sample.prompt


def _check(model: ServedModel, token_ids: list[int], weights: list[float], kind: Kind) -> None:
    if kind != "prompt" and not any(weights[1:]):
        raise BadRecord("there is nothing to learn: no token behind the first has a weight.")
    most = model.max_seq_len - (kind == "prompt")  # room for one token of an answer
    if len(token_ids) > most:
        raise BadRecord(
            f"{len(token_ids):,} tokens, but {most:,} is the most that fits. Shorten or split the "
            f"sample, or raise max_seq_len if the model holds more."
        )
    largest = max(token_ids)
    if largest >= model.vocab_size:
        piece = model.tokenizer.piece(largest).decode("utf-8", "replace")
        raise BadRecord(
            f"the token {piece!r} ({largest}) is not in the model's vocabulary of "
            f"{model.vocab_size:,}. Remove it from the text or the template."
        )
