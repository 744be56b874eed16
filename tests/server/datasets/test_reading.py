"""JSON Lines and JSON arrays, good and broken."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.datasets import reading
from server.datasets.problems import ProblemList
from server.datasets.reading import read_records

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
records = st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), max_size=8)
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path):
    """(records with their lines, problems with theirs) of a file's content."""

    def read_(content: bytes, on_progress=None):
        path = tmp_path / "file"
        path.write_bytes(content)
        problems = ProblemList("file")
        found = list(read_records(path, problems, on_progress))
        return found, [(problem.line, problem.message) for problem in problems.problems]

    return read_


@MANY
@given(records=records, line_end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]))
def test_lines_are_read_with_their_numbers(read, records, line_end):
    text = "".join(json.dumps(record, ensure_ascii=False) + line_end for record in records)
    step = line_end.count("\n")
    expected = [(1 + step * index, record) for index, record in enumerate(records)]
    assert read(b"\xef\xbb\xbf" + text.encode()) == (expected, [])


@MANY
@given(records=records, indent=st.sampled_from([None, 0, 2]), chunk=st.sampled_from([1, 7, 64]))
def test_arrays_are_read_with_their_lines_whatever_the_window(read, records, indent, chunk):
    text = "\n" + json.dumps(records, ensure_ascii=False, indent=indent) + "\r\n"
    original, reading.CHUNK_BYTES = reading.CHUNK_BYTES, chunk
    try:
        found, problems = read(text.encode())
    finally:
        reading.CHUNK_BYTES = original
    assert problems == []
    assert [record for _, record in found] == records
    lines = text.split("\n")
    for line, _ in found:
        assert "{" in lines[line - 1]
    if indent is None:
        assert {line for line, _ in found} <= {2}


@MANY
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
@pytest.mark.parametrize("start", [b"", b"[", b'[{"a":', b'{"a": 1}\n', b"[{},", b"[{}]"])
def test_whatever_the_bytes_nothing_is_raised(read, start, content):
    found, problems = read(start + content)
    assert all(isinstance(record, dict) for _, record in found)
    assert all(line is None or line >= 1 for line, _ in problems)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'[{"a": 1},\n{"b": }]', 2, "not valid JSON: Expecting value. The rest was not read."),
        (b'[{"a": 1}\n{"b": 1}]', 2, "expected ',' or ']' behind an element, got '{'."),
        (b'[{"a": 1},\n', 2, "not valid JSON: Expecting value. The rest was not read."),
        (b'[{"a": 1}', 1, "expected ',' or ']' behind an element, got ''."),
        (b'[{"a": 1}]\n{"a": 1}', 2, "there is more behind the array's end."),
        (b'[{"a": 1}, 5]', 1, "expected a JSON object, got a number."),
        (b'[{"a": "\xff"}]', 1, "not valid UTF-8: byte 0xff"),
        (b'[{"a": 1,\n"a": 2}]', 1, "the field 'a' is given twice. Remove one."),
        (b"[" + b'{"a":' * 100_000, 1, "the JSON is nested too deeply."),
        (b'{"a":' * 100_000, 1, "the JSON is nested too deeply."),
        (b'{"a": ' + b"1" * 5000 + b"}", 1, "not valid JSON: Exceeds the limit"),
        (b'{"a": Infinity}', 1, "Infinity is no JSON. Use a number or null."),
        (b'{"a": 1} {"b": 2}', 1, "not valid JSON: Extra data at column 10."),
        (b'"text"', 1, "expected a JSON object, got a text."),
        (b"null", 1, "expected a JSON object, got null."),
        (b"true", 1, "expected a JSON object, got true or false."),
        (b'{"a": 1}\n{"a": "\xc3"}', 2, "not valid UTF-8: byte 0xc3 at 8. Save the file as UTF-8."),
        (b'{\n  "a": 1\n}\n', 1, "a record is spread over several lines."),
        (b"instruction,output\nx,y\n", None, "'instruction,output', looks like CSV."),
        (b"instruction\toutput\nx\ty\n", None, "looks like CSV."),
        (b"PAR1\x15\x04", None, "this is a Parquet file."),
        (gzip.compress(b'{"a": 1}'), None, "this is compressed with gzip."),
        (b"PK\x03\x04rest", None, "this is a ZIP archive or a spreadsheet."),
        ('{"a": 1}'.encode("utf-16"), None, "this is UTF-16 text. "),
    ],
)
def test_what_cannot_be_read_is_named(read, content, line, message):
    _, problems = read(content)
    assert len(problems) == 1
    assert problems[0][0] == line
    assert message in problems[0][1]


def test_a_line_that_is_far_too_long_is_skipped(read, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 2**20)
    long = b'{"a": "' + b"x" * 2**21 + b'"}\n'
    found, problems = read(b'{"a": 1}\n' + long + b'{"a": 3}\n')
    assert found == [(1, {"a": 1}), (3, {"a": 3})]
    assert problems == [(2, "the line is longer than 1 MiB.")]


def test_an_element_that_is_far_too_long_ends_the_reading(read, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 2**20)
    found, problems = read(b'[{"a": 1}, {"a": "' + b"x" * 2**22 + b'"}, {"a": 3}]')
    assert found == [(1, {"a": 1})]
    assert problems[0][1].startswith("not valid JSON: Unterminated string")


def test_progress_is_told_and_may_end_the_reading(read):
    content = b'{"a": 1}\n' * 1000
    shares = []
    read(content, shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 5
    assert 0 < shares[0] < shares[-1] <= 1

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(content, stop)


def test_a_missing_file_and_a_folder_are_problems(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        problems = ProblemList("x")
        assert list(read_records(path, problems)) == []
        assert "the file cannot be read: " in problems.problems[0].message
