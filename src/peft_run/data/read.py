"""Files of any common kind as rows: a list of dicts from column to value.

Text is decoded by what the bytes say: a byte-order mark, UTF-8, UTF-16 without a mark, GB18030. A file that is none of
these is refused; what looks right and is wrong would be learnt.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_run.errors import UsageError
from peft_run.packages import require

Row = dict[str, Any]

MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
PROBE = 1 << 16


def read(path: Path, *, encoding: str = "auto", sheet: str | None = None) -> list[Row]:
    """All rows of a file, or of all files of a folder. Raises UsageError that names the file and the line."""
    if path.is_dir():
        return read_folder(path, encoding, sheet)
    if not path.exists():
        raise UsageError("data.no_file", path=path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError("data.unknown_kind", path=path, known=", ".join(sorted(READERS)))
    if reader in (read_xlsx, read_parquet):
        rows = reader(path, sheet)
    else:
        rows = reader(path, decode(path, encoding))
    if not rows:
        raise UsageError("data.empty", path=path)
    return rows


def read_folder(folder: Path, encoding: str, sheet: str | None) -> list[Row]:
    """Every file below, in order of name. Text files in sub-folders get the sub-folder's name as their label."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in READERS and not p.name.startswith(".")]
    if not files:
        raise UsageError("data.empty_folder", path=folder, known=", ".join(sorted(READERS)))
    rows: list[Row] = []
    for file in files:
        if file.suffix.lower() == ".txt" and file.parent != folder:
            text = decode(file, encoding).strip()
            rows.append({"text": text, "label": file.parent.name})
        else:
            rows += read(file, encoding=encoding, sheet=sheet)
    return rows


def decode(path: Path, encoding: str = "auto") -> str:
    """The text of a file."""
    return decoded(path, encoding)[0]


def decoded(path: Path, encoding: str = "auto") -> tuple[str, str]:
    """The text of a file, and the encoding it was found to have."""
    data = path.read_bytes()
    tried = [encoding] if encoding != "auto" else encodings(data)
    for name in tried:
        try:
            text = data.decode(name)
        except LookupError as error:
            raise UsageError("data.no_encoding", encoding=encoding) from error
        except UnicodeDecodeError:
            continue
        if encoding == "auto" and "\0" in text[:PROBE]:
            continue
        return text, name
    raise UsageError("data.encoding", path=path, tried=", ".join(tried))


def encodings(data: bytes) -> list[str]:
    """What the bytes could be, likeliest first."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return [name]
    # In UTF-16 every other byte of Latin text, digits, commas and line ends is 0; UTF-8 and GB18030 have none.
    probe = data[:PROBE]
    if 0 in probe:
        return ["utf-16-le"] if probe[1::2].count(0) >= probe[::2].count(0) else ["utf-16-be"]
    return ["utf-8", "gb18030"]


def read_csv(path: Path, text: str) -> list[Row]:
    """Separated by commas, tabs or semicolons: by whichever the first line has most of outside quotes."""
    if not text.strip():
        raise UsageError("data.empty", path=path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter_of(text)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(reader)]
        if len(set(columns)) != len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            raise UsageError("data.column_twice", path=path, column=twice)
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(columns):
                raise UsageError(
                    "data.too_many_cells", path=path, line=reader.line_num, found=len(cells), expected=len(columns)
                )
            rows.append(dict(zip(columns, cells + [None] * (len(columns) - len(cells)))))
    except csv.Error as error:
        raise UsageError("data.bad_line", path=path, line=reader.line_num, problem=error) from error
    return rows


def delimiter_of(text: str) -> str:
    first, quoted = "", False
    for character in text[:PROBE]:
        quoted ^= character == '"'
        if character in "\r\n" and not quoted:
            break
        first += "" if quoted else character
    return max(",\t;", key=first.count)


def read_jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError("data.bad_line", path=path, line=number, problem=error) from error
        if not isinstance(row, dict):
            raise UsageError("data.no_object", path=path, line=number, found=type(row).__name__)
        rows.append(row)
    return rows


def read_json(path: Path, text: str) -> list[Row]:
    """A list of objects; the same under one key (`{"data": [...]}`); or columns (`{"text": [...], "label": [...]}`)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON lines under the wrong name
            return read_jsonl(path, text)
        raise UsageError("data.bad_json", path=path, problem=error) from error
    if isinstance(value, dict):
        lists = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        rows_of = [inner for inner in lists.values() if inner and all(isinstance(row, dict) for row in inner)]
        if len(rows_of) == 1:
            value = rows_of[0]
        elif len(lists) == len(value) > 0 and len({len(inner) for inner in lists.values()}) == 1:
            value = [dict(zip(lists, cells)) for cells in zip(*lists.values())]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UsageError("data.no_rows_in_json", path=path)
    return value


def read_txt(path: Path, text: str) -> list[Row]:
    """A sample per line, or per paragraph where blank lines separate paragraphs of several lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = [part.strip() for part in text.split("\n\n")]
    if sum("\n" in part for part in parts) * 2 < len(parts) or len(parts) == 1:
        parts = text.split("\n")
    return [{"text": part.strip()} for part in parts if part.strip()]


def read_xlsx(path: Path, sheet: str | None) -> list[Row]:
    require("openpyxl", extra="excel")
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl lets whatever zipfile or its XML parser raises through
        raise UsageError("data.bad_json", path=path, problem=error) from error
    if sheet is not None and sheet not in book.sheetnames:
        raise UsageError("data.no_sheet", path=path, sheet=sheet, known=", ".join(book.sheetnames))
    lines = (book[sheet] if sheet else book.worksheets[0]).iter_rows(values_only=True)
    columns = [str(cell).strip() if cell is not None else "" for cell in next(lines, ())]
    rows = [{column: cell for column, cell in zip(columns, line) if column} for line in lines]
    return [row for row in rows if any(cell not in (None, "") for cell in row.values())]


def read_parquet(path: Path, sheet: str | None) -> list[Row]:
    require("pyarrow", extra="data")
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError("data.bad_json", path=path, problem=error) from error


READERS: dict[str, Callable[..., list[Row]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".txt": read_txt,
    ".xlsx": read_xlsx,
    ".parquet": read_parquet,
}
