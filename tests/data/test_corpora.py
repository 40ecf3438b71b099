"""Every kind of source, and every way in which one can be unusable."""

import csv
import json
import lzma
import re
import types
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentlm.data import Document, read_columns, read_documents
from latentlm.errors import InputError

TEXTS = ["first line", "“zweite” Zeile, with a comma", "third\u2028 line"]


def texts(source, **options):
    return [document.text for document in read_documents(source, **options)]


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_every_text_kind(tmp_path, suffix):
    lines = "\n".join(TEXTS)
    assert texts(write(tmp_path / f"a.txt{suffix}", lines + "\n")) == TEXTS
    assert texts(write(tmp_path / f"a.jsonl{suffix}", "\n".join(json.dumps({"n": 1, "q": t}) for t in TEXTS))) == TEXTS
    assert texts(write(tmp_path / f"a.tsv{suffix}", "id\ttext\n" + "".join(f"7\t{t}\n" for t in TEXTS))) == TEXTS
    assert texts(write(tmp_path / f"b.tsv{suffix}", "".join(f"7\t{t}\n" for t in TEXTS)), column="2") == TEXTS
    assert texts(write(tmp_path / f"c.tsv{suffix}", lines)) == TEXTS
    quoted = "".join(f'"3","{t}"\r\n' for t in TEXTS)
    assert texts(write(tmp_path / f"a.csv{suffix}", "class,body\r\n" + quoted), column="body") == TEXTS
    assert texts(write(tmp_path / f"b.csv{suffix}", quoted), column="2") == TEXTS


def test_digits_are_a_column_number_even_where_the_first_row_holds_them(tmp_path):
    path = write(tmp_path / "news.csv", '"2","title","one"\n"1","title","two"\n')
    assert texts(path, column="2") == ["title", "title"]
    assert texts(path, column="3") == ["one", "two"]


def test_csv_fields_may_hold_line_ends_and_quotes(tmp_path):
    path = tmp_path / "a.csv"
    rows = ['two\nlines, "quoted"', "plain"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row] for row in rows)])
    assert texts(path) == rows


def test_tsv_knows_no_quotes(tmp_path):
    assert texts(write(tmp_path / "a.tsv", '"a\tb"\n'), column="1") == ['"a']


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    values = [*TEXTS, "", "last"] * 700  # several batches; empty rows are skipped
    table = pa.table({"n": list(range(len(values))), "body": pa.array(values).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [*TEXTS, "last"] * 700
    assert texts(tmp_path / "a.parquet", column="body", limit=2) == TEXTS[:2]


def test_sample_by(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff  one\r\ntwo  \n \n\n three\n")
    assert texts(path) == ["one", "two", "three"]
    assert texts(path, sample_by="paragraph") == ["one\ntwo", "three"]
    assert texts(path, sample_by="document") == ["  one\ntwo  \n \n\n three"]


def test_folder_is_read_in_order_without_other_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/notes.md", ".cache/x.txt", "c.jsonl", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = {"c.jsonl": '{"text": "c.jsonl"}', "empty.txt": ""}.get(name, name)
        write(tmp_path / name, content)
    assert texts(tmp_path) == ["a/z.txt", "b.txt", "c.jsonl"]


def test_reading_is_lazy_and_limited(tmp_path):
    path = write(tmp_path / "a.txt", b"good\n" * 10 + b"\xff\n")
    assert texts(path, limit=3) == ["good"] * 3
    assert len(list(islice(read_documents(path), 10))) == 10


def test_builtin():
    first = next(read_documents("builtin:sentences"))
    assert isinstance(first, Document) and first.factors["tense"] in ("past", "present", "future")
    assert len(texts("builtin:python-docs", limit=5)) == 5


def test_hub(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return [{"label": 1, "sentence": "one"}, {"label": 2, "sentence": ""}, {"label": 3, "sentence": "two"}]

    monkeypatch.setattr("latentlm.data.hub.is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("hub:owner/name:config") == ["one", "two"]
    assert texts("hub:owner/name", column="sentence") == ["one", "two"]
    options = {"split": "train", "streaming": True}
    assert calls == [(("owner/name", "config"), options), (("owner/name", None), options)]

    def fail(*args, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"hub:owner/name cannot be read .*hub \(no network\): give a local file"):
        texts("hub:owner/name")


TWO_COLUMNS = "one\ttwo\nthree\tfour\n"
XZ = lzma.compress(b"some text\n" * 1000)
BAD_FILES = {
    "empty": ("a.txt", b"", {}, "a.txt holds no text"),
    "only blank lines": ("a.txt", b" \n\n", {}, "a.txt holds no text"),
    "only a header": ("a.tsv", b"text\n", {}, "a.tsv holds no text"),
    "not UTF-8": ("a.txt", b"good\nb\xffd\n", {}, "a.txt line 2 is not UTF-8 (byte 6 of the file)"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), {}, "a.txt line 1 is not UTF-8 (byte 0 of the file)"),
    "cut character": ("a.txt", "aé".encode()[:-1], {}, "a.txt line 1 is not UTF-8 (byte 1 of the file)"),
    "NUL": ("a.txt", b"good\nba\0d\n", {}, "a.txt line 2 holds a NUL byte"),
    "NUL in JSON": ("a.jsonl", b'{"text": "a\\u0000b"}', {}, "a.jsonl line 1 holds a NUL"),
    "surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}', {}, "a.jsonl line 1 holds half of a surrogate pair"),
    "JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', {}, "a.jsonl line 3 is not valid JSON"),
    "JSON list": ("a.jsonl", b'{"text": "a"}\n["b"]\n', {}, "a.jsonl line 2 is list, no object"),
    "JSON missing": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', {}, "a.jsonl line 2 has no text in column 'text'"),
    "JSON null": ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', {}, "a.jsonl line 2 has no text in column 'text'"),
    "JSON number": ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', {}, "a.jsonl line 2 has no text in column 'text'"),
    "JSON blank": ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n', {}, "a.jsonl line 2 has no text in column 'text'"),
    "JSON ambiguous": ("a.jsonl", b'{"q": "a", "a": "b"}\n', {}, "line 1 has no column 'text': give column= one of"),
    "JSON column": ("a.jsonl", b'{"q": "a", "a": "b"}\n', {"column": "x"}, "has no column 'x'"),
    "TSV ambiguous": ("a.tsv", TWO_COLUMNS, {}, "a.tsv has 2 columns and the first row 'one', 'two': give column="),
    "TSV number": ("a.tsv", TWO_COLUMNS, {"column": "3"}, "so there is no column 3: give column= from 1 to 2"),
    "TSV zero": ("a.tsv", TWO_COLUMNS, {"column": "0"}, "so there is no column 0"),
    "TSV name": ("a.tsv", TWO_COLUMNS, {"column": "x"}, "so there is no column 'x'"),
    "TSV short row": ("a.tsv", "id\ttext\n1\ta\n2\n", {}, "a.tsv line 3 has no text in column 'text'"),
    "TSV blank cell": ("a.tsv", "id\ttext\n1\t \n", {}, "a.tsv line 2 has no text in column 'text'"),
    "CSV quote": ("a.csv", 'id,text\n1,"a\n', {}, "a.csv line 2 is not valid CSV"),
    "xz truncated": ("a.txt.xz", XZ[:-20], {}, "a.txt.xz is truncated or is no xz file"),
    "xz corrupt": ("a.txt.xz", XZ[:40] + b"garbage" + XZ[47:], {}, "a.txt.xz is truncated or is no xz file"),
    "no xz": ("a.txt.xz", b"plain text, not compressed", {}, "a.txt.xz is truncated or is no xz file"),
    "no Parquet": ("a.parquet", b"PAR1 nonsense PAR1", {}, "a.parquet is damaged or is no Parquet file"),
    "empty Parquet": ("a.parquet", b"", {}, "a.parquet is damaged or is no Parquet file"),
    "unknown kind": ("a.docx", b"x", {}, "a.docx is of an unknown kind: give one of .txt, .jsonl, .parquet"),
    "xz of unknown": ("a.parquet.xz", b"x", {}, "a.parquet.xz is of an unknown kind"),
    "limit": ("a.txt", b"x", {"limit": 0}, "limit=0"),
    "sample_by": ("a.txt", b"x", {"sample_by": "word"}, "sample_by='word' is unknown: give one of line, paragraph"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, options, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        texts(path, **options)
    assert "\n" not in str(caught.value)


def test_bad_parquet_rows(tmp_path):
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2], "q": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet row 2 has no text in column 'text'"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column 'n' holds no strings"):
        texts(tmp_path / "a.parquet", column="n")
    with pytest.raises(InputError, match=r"has no column 'z': .*\(text, n, q\)"):
        texts(tmp_path / "a.parquet", column="z")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "no/such/file.txt does not exist"),
        ("", "the name of the data is empty"),
        (
            "builtin:none",
            "builtin:none is no built-in corpus: those that exist are builtin:python-docs and builtin:sen",
        ),
        ("hub:", "hub: names no data set"),
    ],
)
def test_bad_sources_are_refused_before_reading(source, message):
    with pytest.raises(InputError, match=re.escape(message)):
        texts(source)


def test_folder_without_known_files(tmp_path):
    write(tmp_path / "notes.md", "x")
    with pytest.raises(InputError, match="holds no file of a known kind"):
        read_documents(tmp_path)


def test_permission_denied(tmp_path, monkeypatch):
    # Simulated, because tests that run as root may read everything.
    path = write(tmp_path / "a.txt", "x")

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    from latentlm.data import corpora

    monkeypatch.setattr(corpora, "open", denied, raising=False)
    with pytest.raises(InputError, match=r"a.txt cannot be read \(Permission denied\)"):
        texts(path)


def test_reader_is_an_iterator(tmp_path):
    assert isinstance(iter(read_documents(write(tmp_path / "a.txt", "x"))), islice | types.GeneratorType)


# ---- several columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_several_columns_of_a_table(tmp_path, suffix):
    rows = [json.dumps({"a": text, "n": 1, "b": f"{n}"}) for n, text in enumerate(TEXTS)]
    path = write(tmp_path / f"a.jsonl{suffix}", "\n\n".join(rows))
    found = list(read_columns(path, ("b", "a")))
    # blank lines are no rows, but they count as lines
    assert found == [(f"{path} line {2 * n + 1}", (f"{n}", text)) for n, text in enumerate(TEXTS)]
    assert list(read_columns(path, ("a",), limit=1)) == [(f"{path} line 1", (TEXTS[0],))]


def test_columns_that_are_missing_or_of_another_kind_of_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": "text", "b": "text"}\n{"a": "text"}')
    with pytest.raises(InputError, match=r"line 2 has no text in column 'b'"):
        list(read_columns(path, ("a", "b")))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.txt", "a")
    write(tmp_path / "folder" / "b.jsonl", '{"a": "text"}')
    for source in (tmp_path / "folder", tmp_path / "folder" / "a.txt"):
        with pytest.raises(InputError, match=r"columns a, b: give a .jsonl file"):
            list(read_columns(source, ("a", "b")))
