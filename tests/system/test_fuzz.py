"""Hostile and damaged files: 110,000 of them; only our own errors come out, in bounded time and memory."""

import bz2
import gzip
import io
import json
import lzma
import struct
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.console import InputError
from common.corpus.records import file_records
from common.dataset.mixture import TrainingOrder
from common.run.checkpoints import MANIFEST, problem_of, read_manifest
from common.run.folder import Run
from common.run.lock import read_status
from common.tokens.megatron import read_sidecar
from common.tokens.store import TokenStore
from common.tokens.token_index import read_index, read_legacy_index
from common.train.step_guard import read_guard

pytestmark = pytest.mark.heavy
SECONDS, GROWTH_BYTES = 5, 300 * 2**20  # for one input; over all inputs of a kind

RECORDS = [{"text": f'第{number}篇 article {number}, "quoted" \\u4e2d', "id": number} for number in range(6)]
LINES = "\n".join(json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(RECORDS)).encode()
TABLE = b'id,text\r\n1,"one, two"\r\n2,"line\nbreak"\r\n3,plain\r\n'
PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), PARQUET, write_page_checksum=True)
ARROW = {}
for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
    ARROW[new] = io.BytesIO()
    records = pyarrow.Table.from_pylist([record | {"tags": [{"a": "x"}]} for record in RECORDS])
    records = records.append_column("kind", pyarrow.array(["a", "b", None] * 2).dictionary_encode())
    with new(ARROW[new], records.schema) as writer:
        writer.write_table(records, max_chunksize=4)
CORPORA = {
    "a.jsonl": LINES,
    "a.json": json.dumps(RECORDS).encode(),
    "object.json": json.dumps({"version": 1, "data": RECORDS}).encode(),
    "a.txt": "第一篇\n还是第一篇\n\nsecond\n\n\nthird".encode(),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace(b",", b"\t"),
    "a.parquet": PARQUET.getvalue(),
    "stream.arrow": ARROW[pyarrow.ipc.new_stream].getvalue(),
    "file.arrow": ARROW[pyarrow.ipc.new_file].getvalue(),
    "no_suffix": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
}
# What breaks parsers: borders of integers, openings without an end, byte order marks, paths that lead elsewhere.
TOKENS = [
    *(struct.pack("<q", number) for number in (-1, 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1)),
    *(
        b"[" * 3000,
        b'{"a":' * 2000,
        b'"',
        b"\\",
        b"\\ud800",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\0",
        b"\n",
        b"null",
        b"-1",
    ),
    *(b"NaN", b"1e999", b"9" * 5000, b"../../etc/passwd", b"/etc/passwd", b"C:\\x", b"true", b"{}", b"[]", b'""'),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "remove", "repeat"]),
        st.integers(0, 2**16),
        st.one_of(st.binary(max_size=6), st.sampled_from(TOKENS)),
    ),
    max_size=4,
)


def damaged(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """Return ``content`` after the edits, each at a place of it."""
    for kind, place, piece in edits:
        at = place % (len(content) + 1)
        if kind == "set":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + max(1, len(piece)) :]
        else:
            content = content[:at] + content[at : at + 64] * (1 + len(piece)) + content[at:]
    return content


def fuzz(inputs: int, sources: list[bytes], read, kinds: list | None = None) -> None:
    """Call ``read(content)`` (and a kind, if any) for ``inputs`` damaged or random contents."""
    kinds = kinds or [None]
    memory, longest, seen, refused = psutil.Process().memory_info().rss, 0.0, 0, 0

    @settings(
        max_examples=inputs, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(st.integers(0, len(sources) - 1), EDITS, st.one_of(st.none(), st.binary(max_size=200)))
    def run(which, edits, other):
        nonlocal longest, seen, refused
        content = damaged(sources[which] if other is None else other, edits)
        began = time.perf_counter()
        try:
            read(content, kinds[which % len(kinds)]) if kinds[0] is not None else read(content)
        except InputError as error:
            refused += 1
            assert len(str(error)) < 20_000
        longest = max(longest, time.perf_counter() - began)
        seen += 1

    run()
    grown = psutil.Process().memory_info().rss - memory
    print(f"fuzz: {seen:,} inputs, {refused:,} refused, longest {longest:.2f} s, {grown / 2**20:.0f} MiB more memory")
    assert longest < SECONDS and grown < GROWTH_BYTES
    assert seen >= 0.9 * inputs and refused, "hypothesis found fewer inputs than were asked for"


def index_of(sizes: list[int], marks: list[int], code: int = 8, width: int = 2) -> bytes:
    pointers = np.cumsum([0, *sizes[:-1]]) * width
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(marks))
    arrays = (np.array(sizes, "<i4"), pointers.astype("<i8"), np.array(marks, "<i8"))
    return header + b"".join(array.tobytes() for array in arrays)


INDEXES = [index_of([3, 2], [0, 1, 2]), index_of([2, 1, 2, 0], [0, 2, 2, 4]), index_of([5], [0, 1])]


def test_indexes(tmp_path):
    path, tokens = tmp_path / "x.idx", tmp_path / "x.bin"
    tokens.write_bytes(bytes(10))

    def read(content):
        path.write_bytes(content)
        starts = read_index(path, tokens).document_starts
        assert starts[0] == 0 and (np.diff(starts) >= 0).all()

    fuzz(25_000, INDEXES, read)


def test_legacy_indexes(tmp_path):
    whole = io.BytesIO()
    np.savez(whole, lens=np.array([2, 1, 2], np.int32), docs=np.array([0, 2, 3], np.int64))
    pickled = io.BytesIO()
    np.savez(pickled, lens=np.array([print], object), docs=np.array([0, 1]))  # a pickle, which must not be run
    path, ids = tmp_path / "x_idx.npz", np.arange(5, dtype=np.uint16)

    def read(content):
        path.write_bytes(content)
        assert read_legacy_index(path, ids).document_starts[-1] == 5

    fuzz(10_000, [whole.getvalue(), pickled.getvalue()], read)


def test_corpora():
    def read(content, name):
        for _, record in file_records(name, lambda: io.BytesIO(content)):
            assert record is None or isinstance(record, (dict, list, str, int, float, ValueError))

    fuzz(30_000, list(CORPORA.values()), read, list(CORPORA))


def test_sidecars(tmp_path):
    path = tmp_path / "x.json"
    whole = {"documents": 2, "tokens": 5, "bytes": 9, "tokenizer": {"fingerprint": "ab", "vocabulary_size": 9}}

    def read(content):
        path.write_bytes(content)
        assert isinstance(read_sidecar(path, 2, 5), dict)

    fuzz(15_000, [json.dumps(whole).encode(), json.dumps({"documents": 2, "tokens": 5}, indent=1).encode()], read)


def test_sidecars_in_their_place(tmp_path):
    """Whatever a sidecar says, the store opens and can be asked about its tokenizer."""
    (tmp_path / "x.idx").write_bytes(INDEXES[0])
    (tmp_path / "x.bin").write_bytes(bytes(10))
    whole = {"documents": 2, "tokens": 5, "tokenizer": {"fingerprint": "ab"}}

    def read(content):
        (tmp_path / "x.json").write_bytes(content)
        store = TokenStore(tmp_path / "x")
        store.check_tokenizer("ab", 9)
        assert len(store.fingerprint()) == 16

    fuzz(5_000, [json.dumps(whole).encode()], read)


def test_manifests(tmp_path):
    path = tmp_path / "checkpoint-3"
    path.mkdir()
    (path / "a.bin").write_bytes(bytes(7))
    whole = {"step": 3, "processes": 1, "files": {"a.bin": 7}}

    def read(content):
        (path / MANIFEST).write_bytes(content)
        problem = problem_of(path)
        if problem is None:
            for name in read_manifest(path)["files"]:
                assert path.resolve() in (path / name).resolve().parents
        else:
            raise InputError(problem)

    fuzz(15_000, [json.dumps(whole).encode(), json.dumps(whole, indent=1).encode()], read)


def test_our_own_state(tmp_path):
    guard = {"losses": [5.0, 4.5], "left_out": 1, "spikes": 0, "in_a_row": 0}
    status = {"state": "running", "step": 3, "max_steps": 9, "pid": 1, "host": "h", "time": "t"}
    results = {"steps": 3, "eval_loss": 2.0, "ledger": {"rows_trained": 9}}
    order = TrainingOrder([9], seed=1)
    order.rows_per_step = 3
    order.rows_in_run = order.positions_in_run = 9
    run = Run(str(tmp_path))
    run.claimed = True

    def read(content, name):
        path = Path(tmp_path) / name
        path.write_bytes(content)
        if name == "guard.json":
            read_guard(path)
        elif name == "status.json":
            assert read_status(tmp_path) is None or "state" in read_status(tmp_path)
        else:
            return run.finished(order)

    assert order.steps == results["steps"] and read(json.dumps(results).encode(), "all_results.json") == results
    no_ledger = results | {"ledger": None}
    contents = [json.dumps(content).encode() for content in (guard, status, results, no_ledger)]
    fuzz(10_000, contents, read, ["guard.json", "status.json", "all_results.json", "all_results.json"])
