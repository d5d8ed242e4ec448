"""A source -> the text of its documents, streamed, with every document counted."""

import string
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

from common.console import InputError
from common.corpus.formats import ANOTHER_ENCODING, WITHIN_GB18030, CountedFile, NotUtf8, Records, format_of, not_utf8
from common.corpus.records import NOT_BLANK, TEXT_FIELDS, file_records
from common.corpus.sources import Source

PLACES_SHOWN = 10  # of malformed documents, and of files without documents
RECORDS_JUDGED = 1_000  # to find the text field, if the first record does not decide it


@dataclass
class CorpusCounts:
    """The counts of one pass over one or more sources.

    Attributes:
        documents: documents yielded; ``text_bytes`` is their size in UTF-8.
        empty: documents of only white space, control and format characters, or null.
        malformed: documents that cannot be read; ``first_malformed`` has the place and the error of the first few of
            each source.
        near_duplicates: yielded documents that ``data/prepare.py --near_duplicates`` then left out.
        file_bytes: bytes read from local files so far, as they are on disk. Together with ``Source.size_bytes`` they
            give the progress.
    """

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0
    near_duplicates: int = 0
    file_bytes: int = 0
    first_malformed: list[str] = field(default_factory=list)


def read_documents(
    source: Source, text_field: str | None, skip_malformed: bool, counts: CorpusCounts, may_be_empty: bool = False
) -> Iterator[str]:
    """Yield the text of every document of ``source`` in order, and add to ``counts`` on the way.

    Documents without text are dropped and counted (``empty``). With ``skip_malformed``, documents that cannot be read
    are dropped and counted too (``malformed``). The text is yielded unchanged, with its white space and NUL characters.

    Args:
        text_field: the name of a field ("meta.text" is the field "text" of the field "meta"); or a template with
            several, such as "{title}\\n\\n{text}", in which a backslash and an n, as a shell passes them on, are a line
            break; or None for the only field that has a name of TEXT_FIELDS and holds text. The items of a list are
            joined with line breaks ("paragraphs", or "messages.content" for a list of objects). A .txt file has no
            fields: all of it is text.
        may_be_empty: ``source`` is a part of a larger one, which the caller checks for documents.

    Raises:
        InputError: a document is malformed (the message has its file and line), a field is missing (the message lists
            the existing fields), there is no document at all (unless ``may_be_empty``), or ``file_records`` or
            ``hub_records`` raised it.
    """
    _check_text(source)
    before = replace(counts)
    places = len(counts.first_malformed)
    without = []  # files without documents
    of_texts = 0  # documents of .txt files
    for name, records, names, pattern in _parts(source, text_field, counts):
        found_before = counts.documents
        yield from _documents(records, names, pattern, source.encoding, skip_malformed, counts, places + PLACES_SHOWN)
        if counts.documents == found_before:
            without.append(name)
        if format_of(name) == ".txt":
            of_texts += counts.documents - found_before
    empty = counts.empty - before.empty
    malformed = counts.malformed - before.malformed
    if counts.documents == before.documents and not may_be_empty:
        raise InputError(f"{source.given}: it has no documents ({empty} empty, {malformed} malformed).")
    if source.texts:
        source.say_once(f"{source.given}: {of_texts:,} documents in .txt files; {source.text_rule}")
    if without:
        source.say_once(f"note: {len(without):,} files of {source.given} have no documents: {_some(without)}")
    if malformed:
        skipped = f"note: {malformed:,} malformed documents of {source.given} were skipped, the first:"
        source.say_once("\n".join([skipped, *(f"  {place}" for place in counts.first_malformed[places:])]))


def _parts(source: Source, text_field: str | None, counts: CorpusCounts) -> Iterator[tuple]:
    """Yield (name, records, field names, pattern) of every file, or of the data set; see ``parse_text_field``."""
    if not text_field:
        text_field = detect_text_field(source)
    if source.hub_id is not None:
        from common.corpus.hub_dataset import hub_records

        names, pattern = parse_text_field(text_field)
        yield source.given, hub_records(source.hub_id, names, source.encoding, source.say_once), names, pattern
        return
    bytes_before = counts.file_bytes

    def count_bytes(read: int) -> None:
        counts.file_bytes += read

    for path in source.files:
        names, pattern = parse_text_field("text" if format_of(path.name) == ".txt" else text_field)
        open_raw = partial(CountedFile, path, count_bytes)
        records = file_records(str(path), open_raw, names, source.encoding, source.whole_texts, source.say_once)
        yield str(path), records, names, pattern
        bytes_before += path.stat().st_size
        # The bytes read may be fewer (columns that are not needed) or more (the start of a .json file is read twice).
        counts.file_bytes = bytes_before


def _documents(
    records: Records,
    names: list[str],
    pattern: str,
    encoding: str | None,
    skip_malformed: bool,
    counts: CorpusCounts,
    most_places: int,
) -> Iterator[str]:
    for where, record in records:
        try:
            text = text_of(record, names, pattern)
            size = len(text.encode())
        except ValueError as error:
            reason = _reason(error, encoding)
            if not skip_malformed:
                advice = "Repair it, or skip and count such documents with --skip_malformed."
                raise InputError(f"{where}: {reason}. {advice}") from None
            counts.malformed += 1
            if len(counts.first_malformed) < most_places:
                counts.first_malformed.append(f"{where}: {reason}")
            continue
        if not text:
            counts.empty += 1
            continue
        counts.documents += 1
        counts.text_bytes += size
        yield text


def _reason(error: ValueError, encoding: str | None) -> str:
    if not isinstance(error, UnicodeEncodeError | NotUtf8):
        return str(error)
    if encoding is not None:
        larger = ". gb18030 has the characters of GBK, and more: --encoding gb18030" * (encoding in WITHIN_GB18030)
        return f"not valid {encoding}{larger}"
    found = "not valid Unicode or not UTF-8" if isinstance(error, UnicodeEncodeError) else error
    return f"{found}. {ANOTHER_ENCODING}"


def parse_text_field(text_field: str) -> tuple[list[str], str]:
    """Return the names of the fields that make up a document's text, and a pattern with one %s for each of them.

    Raises:
        InputError: the braces do not match, or do not contain exactly the name of a field.
    """
    if "{" not in text_field:
        return [text_field], "%s"
    try:
        parsed = list(string.Formatter().parse(text_field.replace("\\n", "\n").replace("\\t", "\t")))
        names = [name for _, name, _, _ in parsed if name is not None]
        if not all(names) or any(spec or conversion for _, _, spec, conversion in parsed):
            raise ValueError("braces must contain the name of a field and nothing else")
        if not names:
            raise ValueError("it does not name a field")
    except ValueError as error:
        raise InputError(f"--text_field {text_field!r}: {error}. An example: '{{title}}\\n\\n{{text}}'.") from None
    pattern = "".join(literal.replace("%", "%%") + ("" if name is None else "%s") for literal, name, _, _ in parsed)
    return names, pattern


def text_of(record: object, names: list[str], pattern: str) -> str:
    """Return the text of a record, "" if all its fields are blank; raise ValueError if it is malformed."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a field {names[0]!r}, found {type(record).__name__}")
    if pattern == "%s" and isinstance(record.get(names[0]), str):  # the usual case, in half the time
        text = record[names[0]]
        return text if NOT_BLANK.search(text) else ""
    values = [_value(record, name) for name in names]
    return pattern % tuple(values) if any(map(NOT_BLANK.search, values)) else ""


def _value(record: dict, name: str) -> str:
    """Return the text of the field ``name``; the texts of a list are joined with line breaks."""
    values = _values(record, [name] if name in record else name.split("."))
    if values is None:
        raise ValueError(f"no field {name!r}; the fields are {_field_names(record)} (choose with --text_field)")
    texts = []
    for value in values:
        if isinstance(value, bytes):  # a .parquet column that is not marked as text
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(error) from None
        if isinstance(value, dict):
            inner = sorted(f"{name}.{key}"[:60] for key in value)
            raise ValueError(f"field {name!r} holds objects, not text (choose one of {inner[:40]} with --text_field)")
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
        texts.append(value)
    return "\n".join(texts)


def _values(value: object, parts: list[str]) -> list | None:
    """Return the values at the path ``parts`` in ``value``, of every item of a list; None if there is no such field.

    ``{"a": [{"b": "x"}, {"b": None}, {"b": ["y", "z"]}]}`` and ["a", "b"] give ["x", "y", "z"]: nulls are left out.
    """
    if value is None:
        return []
    if isinstance(value, list):
        found = [_values(item, parts) for item in value]
        return None if None in found else list(chain.from_iterable(found))
    if not parts:
        return [value]
    if not isinstance(value, dict) or parts[0] not in value:
        return None
    return _values(value[parts[0]], parts[1:])


def detect_text_field(source: Source) -> str:
    """Return the field that holds the text of documents, judging by the first records; print its name.

    If the first record has exactly one field with a usual name and it holds text, this record decides. Otherwise up to
    RECORDS_JUDGED records are read, because the field may be null in the first ones.

    Raises:
        InputError: several fields may hold the text, or none; or a file cannot be read.
    """
    _check_text(source)
    first = None
    usual = {}  # fields with a usual name; a dict as an ordered set
    holding = {}  # those of them that hold text in some record
    objects = ((where, record) for where, record in _records_with_fields(source) if isinstance(record, dict))
    for where, record in islice(objects, RECORDS_JUDGED):
        if first is None:
            first = (where, record)
        found = {name: None for name in record if name.lower() in TEXT_FIELDS}
        usual |= found
        holding |= {name: None for name in found if isinstance(record[name], str | bytes)}
        if len(usual) == len(holding) == 1:
            break
    if first is None:
        return TEXT_FIELDS[0]  # any name will do: reading will say why there are no records
    names = list(holding or usual)
    if len(names) != 1:
        reason = f"may be in any of {names}" if names else f"is in none of the usual fields ({', '.join(TEXT_FIELDS)})"
        raise InputError(
            f"{first[0]}: the text {reason}. Choose with --text_field; the fields are {_field_names(first[1])}."
        )
    if not holding and isinstance(first[1].get(names[0]), list):
        raise InputError(
            f"{first[0]}: field {names[0]!r} holds a list, not text. To join its items with line breaks, name it: "
            f"--text_field {names[0]}. The fields are {_field_names(first[1])}."
        )
    source.say_once(f"{source.given}: the text is in field {names[0]!r}")
    return names[0]


def _check_text(source: Source) -> None:
    if source.token_store is not None:
        raise InputError(f"{source.given}: holds tokens, not text. Give the text that they were made from.")


def _records_with_fields(source: Source) -> Records:
    if source.hub_id is not None:
        from common.corpus.hub_dataset import hub_records

        return hub_records(source.hub_id, None, source.encoding, source.say_once)
    paths = [path for path in source.files if format_of(path.name) != ".txt"]
    return chain.from_iterable(
        file_records(str(path), partial(path.open, "rb"), None, source.encoding, note=source.say_once) for path in paths
    )


def _field_names(record: dict) -> list[str]:
    """Return the names that --text_field takes, such as "meta.text" for an object "meta", or for a list of objects."""
    names = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            value = value[0]
        inner = sorted(value) if isinstance(value, dict) and value else []
        names += [f"{name}.{each}" for each in inner] if inner else [name]
    return sorted(name[:60] for name in names)[:40]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - PLACES_SHOWN:,} more" if len(names) > PLACES_SHOWN else ""
    return ", ".join(names[:PLACES_SHOWN]) + more
