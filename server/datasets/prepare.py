"""A data file to token ids and loss weights, ready to train on.

Public   prepare, Prepared; DatasetErrors in server/datasets/problems.py
Formats  server/datasets/formats.py recognises them, docs/training-data.md lists them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.train.config import Method
from engine.train.token_dataset import METHOD_KIND, Kind, TokenDataset, make_dataset
from server.chat_template import ChatTemplate
from server.datasets.formats import Format, other_than, recognise, unknown
from server.datasets.problems import BadRecord, ProblemList, printable
from server.datasets.reading import Record, read_records
from server.datasets.samples import Chat, Pair, Sample
from server.datasets.sequences import Notes, sequences_of
from server.datasets.sequences import Sequence as TokenSequence
from server.datasets.served_model import ServedModel, served_model
from server.datasets.turns import unlike_prompts
from server.tokenizer import Tokenizer

FEW_SAMPLES = 10
MANY_FIELDS = 10
"""Names of fields that a warning lists."""
METHODS_FOR: dict[Kind, str] = {
    kind: " or ".join(method for method, its_kind in METHOD_KIND.items() if its_kind == kind)
    for kind in METHOD_KIND.values()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A data file, tokenised, and what there is to say about it."""

    dataset: TokenDataset
    format: str
    """What the file was recognised as: alpaca, sharegpt ..."""
    num_samples: int
    """Of the file. A conversation may need several sequences of the data set."""
    num_tokens: int
    num_label_tokens: int
    """Tokens that are learnt; 0 where the data are prompts."""
    max_length: int
    """Tokens of the longest sequence."""
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: "1,234 samples, format alpaca, 56,789 tokens, 12,345 of them learnt"."""
        learnt = f", {self.num_label_tokens:,} of them learnt" if self.num_label_tokens else ""
        return (
            f"{self.num_samples:,} samples, format {self.format}, "
            f"{self.num_tokens:,} tokens{learnt}"
        )


def prepare(
    path: str | Path,
    *,
    method: Method,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    max_seq_len: int,
    file_name: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Prepared:
    """Read, check and tokenise a file; CPU work, call it in a thread.

    Args:
        path: JSON Lines, or one JSON array.
        method: decides which kind of data is needed.
        tokenizer, template: those that serve the model; None: it has no template, then only formats
            of plain text can be used.
        eos_token_ids: what ends an answer when the model is served (EngineInfo has them).
        vocab_size: of the model.
        max_seq_len: tokens of a sequence at most.
        file_name: what error messages call the file; its own name by default.
        on_progress: called now and then with the share (0..1) of the file that is read. What it
            raises ends the preparation.

    Raises:
        DatasetErrors: the file cannot be trained on; all problems together.
    """
    file = file_name or Path(path).name
    problems = ProblemList(file)
    if not eos_token_ids:
        problems.add(
            "the model names no end token (eos_token_id in its generation_config.json), so it "
            "could never learn to end an answer."
        )
        problems.raise_if_any()
    model = served_model(
        tokenizer=tokenizer,
        template=template,
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
    )
    reading = _Reading(problems, METHOD_KIND[method])
    records = read_records(Path(path), problems, on_progress)
    dataset = make_dataset(reading.kind, _sequences(records, model, method, reading))
    if not problems.num_problems and not reading.num_samples:
        problems.add("the file is empty. Expected one sample per line at least.")
    problems.raise_if_any()
    assert reading.format is not None
    return Prepared(
        dataset=dataset,
        format=reading.format.name,
        num_samples=reading.num_samples,
        num_tokens=dataset.input_ids.numel(),
        num_label_tokens=reading.num_label_tokens,
        max_length=int(dataset.offsets.diff().max()),
        warnings=tuple(_warnings(reading)),
    )


@dataclass(slots=True)
class _Reading:
    """What is known so far."""

    problems: ProblemList
    kind: Kind
    format: Format | None = None
    num_samples: int = 0
    num_label_tokens: int = 0
    notes: Notes = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)


def _sequences(
    records: Iterator[tuple[int, Record]], model: ServedModel, method: Method, reading: _Reading
) -> Iterator[TokenSequence]:
    """Sequences of all samples, as long as there is no problem; then reading goes on to find the
    others."""
    for line, record in records:
        time.sleep(0)  # the thread of a server's event loop need not wait for its turn
        try:
            samples = _samples(record, reading)
            assert reading.format is not None
            misfit = _misfit(reading.format, samples[0], model, method)
            if misfit is not None:
                reading.problems.add(misfit)
                return
            for sample in samples:
                sequences = sequences_of(model, sample, reading.kind, reading.notes)
                reading.num_samples += 1
                reading.num_label_tokens += sum(
                    weight > 0 for _, weights in sequences for weight in weights[1:]
                )
                if not reading.problems.num_problems:
                    yield from sequences
        except BadRecord as error:
            reading.problems.add(str(error), line)
        except RecursionError:  # legal JSON, but too deep for templates and schemas
            reading.problems.add("the record is nested too deeply.", line)


def _samples(record: Record, reading: _Reading) -> Sequence[Sample]:
    """The samples of one record; the first one says which format the file has."""
    given = {name: value for name, value in record.items() if value is not None}
    form = reading.format or recognise(given, reading.kind)
    if form is None:
        raise unknown(given)
    reading.format = form
    if not form.matches(given):
        raise other_than(form, given, reading.kind)
    if len(reading.unused) <= MANY_FIELDS:
        reading.unused |= given.keys() - {*form.needs, *form.may_have}
    found = form.read(given)
    return found if isinstance(found, Sequence) else [found]


def _misfit(form: Format, sample: Sample, model: ServedModel, method: Method) -> str | None:
    """Why the file as a whole cannot be used; None: it can."""
    if not form.serves(METHOD_KIND[method]):
        return (
            f"format {form.name} is no data for method {method!r}. Use method "
            f"{METHODS_FOR[form.kind]}, or another file."
        )
    first = sample.chosen if isinstance(sample, Pair) else sample
    if not isinstance(first, Chat):
        return None
    if model.template is None:
        return (
            f"format {form.name} holds conversations, but the model has no chat template. Name one "
            f"with --chat-template."
        )
    is_learnt = METHOD_KIND[method] != "prompt"
    return unlike_prompts(model.template) if is_learnt and model.turn_ends[0] is None else None


def _warnings(reading: _Reading) -> Iterator[str]:
    if reading.unused:
        names = sorted(printable(name[:40]) for name in reading.unused)
        more = " …" if len(names) > MANY_FIELDS else ""
        yield f"fields without a meaning here, not used: {', '.join(names[:MANY_FIELDS])}{more}"
    if reading.num_samples < FEW_SAMPLES:
        yield f"only {reading.num_samples} samples; a model learns little from so few"
    for note, count in reading.notes.items():
        if count:
            yield f"{count:,} of {reading.num_samples:,} {note}"
