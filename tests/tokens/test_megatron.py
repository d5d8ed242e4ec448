"""Index files: golden bytes, indexes packed by hand, and damage of every kind."""

import errno
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.tokens.megatron as megatron
from common.console import InputError
from common.tokens.megatron import open_pair
from common.tokens.token_index import DTYPES, read_index, read_legacy_index, write_index

# [[1, 2, 3], [4, 5]] as uint16, from the format's description, not from our writer.
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0200000000000000 0300000000000000 03000000 02000000"
    "0000000000000000 0600000000000000 0000000000000000 0100000000000000 0200000000000000"
)
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0400 0500")


def index_bytes(sizes, pointers, marks, code=8, version=1, order="<"):
    """Return the bytes of an ``.idx``, packed by hand."""
    header = b"MMIDIDX\0\0" + struct.pack(f"{order}QBQQ", version, code, len(sizes), len(marks))
    numbers = [("i", sizes), ("q", pointers), ("q", marks)]
    return header + b"".join(struct.pack(f"{order}{len(values)}{kind}", *values) for kind, values in numbers)


def pair(folder, index, tokens=GOLDEN_BIN):
    (folder / "pair.idx").write_bytes(index)
    (folder / "pair.bin").write_bytes(tokens)
    return folder / "pair.idx", folder / "pair.bin"


def test_the_golden_bytes_are_written_and_read(tmp_path):
    write_index(str(tmp_path / "ours.idx"), np.array([3, 2]), np.dtype(np.uint16))
    assert (tmp_path / "ours.idx").read_bytes() == GOLDEN_IDX and len(GOLDEN_IDX) == 82
    index = read_index(*pair(tmp_path, GOLDEN_IDX))
    assert index.dtype == np.uint16
    assert index.sizes[:].tolist() == [3, 2] and index.sizes.mapped().tolist() == [3, 2]
    assert index.document_marks[:].tolist() == [0, 1, 2]
    assert index.document_starts.tolist() == [0, 3, 5] and index.document_starts.dtype == np.int64


@pytest.mark.parametrize("code", range(1, 11))
def test_every_dtype_code(tmp_path, code):
    """The codes of Megatron's ``DType`` and PaddleNLP's ``dtypes``."""
    names = "uint8 int8 int16 int32 int64 float64 float32 uint16 uint32 uint64".split()
    dtype = np.dtype(names[code - 1])
    path, bin_path = tmp_path / "pair.idx", tmp_path / "pair.bin"
    bin_path.write_bytes(np.arange(5).astype(dtype).tobytes())
    write_index(str(path), np.array([3, 2], np.int32), dtype)
    assert path.read_bytes() == index_bytes([3, 2], [0, 3 * dtype.itemsize], [0, 1, 2], code)
    assert read_index(path, bin_path).dtype == dtype


def test_several_sequences_and_none_in_a_document(tmp_path):
    """The documents [[1, 2], [3]], [] and [[4, 5], []], each a list of sequences."""
    by_hand = index_bytes([2, 1, 2, 0], [0, 4, 6, 10], [0, 2, 2, 4])
    assert read_index(*pair(tmp_path, by_hand)).document_starts.tolist() == [0, 3, 3, 5]
    write_index(str(tmp_path / "ours.idx"), np.array([2, 1, 2, 0]), np.dtype(np.uint16), np.array([0, 2, 2, 4]))
    assert (tmp_path / "ours.idx").read_bytes() == by_hand


def test_an_index_of_no_documents(tmp_path):
    path, bin_path = pair(tmp_path, index_bytes([], [], [0]), b"")
    assert read_index(path, bin_path).document_starts.tolist() == [0]
    write_index(str(tmp_path / "ours.idx"), np.zeros(0, np.int32), np.dtype(np.uint16))
    assert (tmp_path / "ours.idx").read_bytes() == path.read_bytes()


def test_multimodal_modes_are_tolerated_and_said(tmp_path, capsys):
    index = read_index(*pair(tmp_path, GOLDEN_IDX + b"\x00\x01"))
    assert index.document_starts.tolist() == [0, 3, 5]
    assert "multimodal" in capsys.readouterr().out


def test_pointers_past_2_gib(tmp_path):
    sizes = [1_200_000_000, 3, 1_100_000_000, 2]
    pointers = [0, 2_400_000_000, 2_400_000_006, 4_600_000_006]
    path, bin_path = tmp_path / "pair.idx", tmp_path / "pair.bin"
    with bin_path.open("wb") as file:
        file.truncate(4_600_000_010)  # sparse
    write_index(str(path), np.array(sizes, np.int32), np.dtype(np.uint16))
    assert path.read_bytes() == index_bytes(sizes, pointers, [0, 1, 2, 3, 4])
    starts = [0, 1_200_000_000, 1_200_000_003, 2_300_000_003, 2_300_000_005]
    assert read_index(path, bin_path).document_starts.tolist() == starts
    wrapped = np.array(pointers).astype(np.int32).tolist()  # what int32 arithmetic makes of them
    assert wrapped[1] < 0 < wrapped[3]
    path.write_bytes(index_bytes(sizes, wrapped, [0, 1, 2, 3, 4]))
    with pytest.raises(InputError, match=r"sequence 1 begins at byte -1,894,967,296, not at 2,400,000,000: .* wrapped"):
        read_index(path, bin_path)


def test_what_the_format_cannot_express_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"document of 2,147,483,648 tokens; the format allows 2,147,483,647"):
        write_index(str(tmp_path / "x.idx"), np.array([2**31]), np.dtype(np.uint16))
    with pytest.raises(InputError, match="no code for tokens of float16"):
        write_index(str(tmp_path / "x.idx"), np.array([1]), np.dtype(np.float16))


@pytest.mark.parametrize(
    ("index", "tokens", "reason"),
    [
        (GOLDEN_IDX[:-1], GOLDEN_BIN, r"81 bytes, but its header \(2 sequences, 3 document marks\) needs 82.*cut off"),
        (GOLDEN_IDX + b"\0", GOLDEN_BIN, "83 bytes, but its header"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, "does not begin with MMIDIDX"),
        (b"", GOLDEN_BIN, "does not begin with MMIDIDX"),
        (b"X" + GOLDEN_IDX[1:], GOLDEN_BIN, "does not begin with MMIDIDX"),
        (GOLDEN_BIN, GOLDEN_IDX, "pair.bin is one: the names are swapped"),
        (b"TNTIDX\0\0" + GOLDEN_IDX, GOLDEN_BIN, "fairseq's format.* --data_impl mmap"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], order=">"), GOLDEN_BIN, "big-endian"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], version=2), GOLDEN_BIN, "version 2"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], code=11), GOLDEN_BIN, "dtype code 11"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], code=0), GOLDEN_BIN, "dtype code 0"),
        (index_bytes([3, 2], [0, 6], []), GOLDEN_BIN, "at least one mark"),
        (GOLDEN_IDX, GOLDEN_BIN[:-2], r"8 bytes, but pair.idx describes 10 \(5 tokens of uint16\)"),
        (GOLDEN_IDX, GOLDEN_BIN * 2, "20 bytes, but pair.idx describes 10"),
        (GOLDEN_IDX, b"", "0 bytes, but pair.idx describes 10"),
        (index_bytes([-1, 6], [0, -2], [0, 1, 2]), GOLDEN_BIN, "negative sizes.* from -1 to 6"),
        (index_bytes([3, 2], [0, 4], [0, 1, 2]), GOLDEN_BIN, "sequence 1 begins at byte 4, not at 6: it overlaps"),
        (index_bytes([3, 2], [0, 8], [0, 1, 2]), GOLDEN_BIN, "sequence 1 begins at byte 8, not at 6: it leaves a gap"),
        (index_bytes([3, 2], [2, 6], [0, 1, 2]), GOLDEN_BIN, "sequence 0 begins at byte 2, not at 0"),
        (index_bytes([3, 2], [0, -6], [0, 1, 2]), GOLDEN_BIN, "byte -6, not at 6: a negative pointer"),
        (index_bytes([3, 2], [0, 6], [0, 2, 1]), GOLDEN_BIN, "do not rise from 0 to 2"),
        (index_bytes([3, 2], [0, 6], [1, 1, 2]), GOLDEN_BIN, "do not rise from 0 to 2"),
        (index_bytes([3, 2], [0, 6], [0, 1, 3]), GOLDEN_BIN, "do not rise from 0 to 2"),
        (index_bytes([3, 2], [0, 6], [0, -1, 2]), GOLDEN_BIN, "do not rise from 0 to 2"),
        (index_bytes([3, 2], [0, 6], [0, 1]), GOLDEN_BIN, r"end at sequence 1 of 2: end_document\(\) was not called"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index, tokens, reason):
    with pytest.raises(InputError, match=reason):
        read_index(*pair(tmp_path, index, tokens))


@pytest.mark.parametrize("sequences", [2**28, 2**31, 2**60, 2**63, 2**64 - 1])
def test_counts_beyond_the_file_are_refused_before_anything_is_allocated(tmp_path, sequences):
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, 3)
    with pytest.raises(InputError, match=f"82 bytes, but its header \\({sequences:,} sequences"):
        read_index(*pair(tmp_path, header + GOLDEN_IDX[34:]))


def test_damage_far_into_an_index_is_found(tmp_path):
    """Checks run in chunks of a million. An error before or after a chunk's end is found, and its number is right."""
    sizes = np.full(2_000_100, 2, np.int32)
    path, bin_path = tmp_path / "pair.idx", tmp_path / "pair.bin"
    bin_path.write_bytes(bytes(4 * len(sizes)))
    write_index(str(path), sizes, np.dtype(np.uint16))
    good = path.read_bytes()
    assert np.array_equal(read_index(path, bin_path).document_starts, np.arange(2_000_101) * 2)
    pointers, marks = 34 + 4 * len(sizes), 34 + 12 * len(sizes)
    for place in (999_999, 1_000_000, 2_000_099):
        for at, damage in ((pointers, "sequence {:,} begins at byte 7"), (marks, "do not rise")):
            path.write_bytes(good[: at + 8 * place] + struct.pack("<q", 7) + good[at + 8 * place + 8 :])
            with pytest.raises(InputError, match=damage.format(place)):
                read_index(path, bin_path)


@st.composite
def indexes(draw):
    """Return sizes, document marks and dtype of a valid index."""
    sizes = draw(st.lists(st.integers(0, 300), max_size=12))
    cuts = draw(st.lists(st.integers(0, len(sizes)), max_size=6))
    return sizes, [0, *sorted(cuts), len(sizes)], draw(st.sampled_from(list(DTYPES.values())))


@given(indexes())
def test_what_is_written_is_read(tmp_path_factory, index):
    sizes, marks, dtype = index
    folder = tmp_path_factory.mktemp("index")
    (folder / "pair.bin").write_bytes(bytes(sum(sizes) * np.dtype(dtype).itemsize))
    write_index(str(folder / "pair.idx"), np.array(sizes, np.int32), np.dtype(dtype), np.array(marks))
    found = read_index(folder / "pair.idx", folder / "pair.bin")
    assert found.dtype == dtype
    assert found.sizes[:].tolist() == sizes and found.document_marks[:].tolist() == marks
    assert found.document_starts.tolist() == [sum(sizes[:mark]) for mark in marks]


@given(indexes(), st.data())
def test_random_damage_is_refused_or_harmless(tmp_path_factory, index, data):
    """Any bytes give a clear error, or an index that describes the whole .bin."""
    sizes, marks, dtype = index
    folder = tmp_path_factory.mktemp("damage")
    path, bin_path = folder / "pair.idx", folder / "pair.bin"
    bin_path.write_bytes(bytes(sum(sizes) * np.dtype(dtype).itemsize))
    write_index(str(path), np.array(sizes, np.int32), np.dtype(dtype), np.array(marks))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        found = read_index(path, bin_path)
    except InputError as error:
        assert str(folder) in str(error)
        return
    starts = found.document_starts
    assert starts[0] == 0 and starts[-1] * found.dtype.itemsize == bin_path.stat().st_size
    assert (np.diff(starts) >= 0).all()


def legacy(folder, **arrays):
    np.savez(folder / "x_idx.npz", **arrays)
    return folder / "x_idx.npz"


def test_a_legacy_index_is_read(tmp_path):
    path = legacy(tmp_path, lens=np.array([2, 1, 2], np.int32), docs=np.array([0, 2, 3], np.int64))
    index = read_legacy_index(path, np.arange(5, dtype=np.uint16))
    assert index.document_starts.tolist() == [0, 3, 5] and index.dtype == np.uint16


@pytest.mark.parametrize(
    ("lens", "docs", "reason"),
    [
        ([2, 1], [0, 1, 2], "describes 3 tokens, but the _ids.npy beside it holds 5"),
        ([2, 3, 2], [0, 1, 3], "describes 7 tokens"),
        ([-2, 7], [0, 1, 2], "negative sizes"),
        ([2, 3], [1, 2], "do not rise"),
        ([2, 3], [0, 1], "end at sequence 1 of 2"),
        ([2, 3], np.zeros(0, np.int64), "docs beginning with 0"),
        ([2.0, 3.0], [0, 1, 2], "rows of integers"),
        ([[2], [3]], [0, 1, 2], "rows of integers"),
        (np.array([2, 3], object), [0, 1, 2], "not an archive of the arrays.*allow_pickle"),
    ],
)
def test_a_damaged_legacy_index_is_refused(tmp_path, lens, docs, reason):
    with pytest.raises(InputError, match=reason):
        read_legacy_index(legacy(tmp_path, lens=lens, docs=docs), np.arange(5, dtype=np.uint16))


@given(st.data())
def test_random_damage_to_a_legacy_index_is_refused_or_harmless(tmp_path_factory, data):
    path = legacy(tmp_path_factory.mktemp("damage"), lens=np.array([2, 1, 2], np.int32), docs=np.array([0, 2, 3]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        assert read_legacy_index(path, np.arange(5, dtype=np.uint16)).document_starts[-1] == 5
    except InputError as error:
        assert str(path) in str(error)


def test_a_legacy_index_is_not_unpacked_if_it_is_too_large(tmp_path):
    """80 KB that unpack to 80 MB."""
    path = tmp_path / "x_idx.npz"
    np.savez_compressed(path, lens=np.zeros(10_000_000, np.int64), docs=np.array([0, 2]))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(InputError, match=r"x_idx\.npz: 80,000,128 bytes in an array, unpacked; an index of 5 tokens"):
        read_legacy_index(path, np.arange(5))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_git_lfs_pointer_is_named(tmp_path):
    index, tokens = pair(tmp_path, GOLDEN_IDX)
    for path, content in ((tokens, GOLDEN_BIN), (index, GOLDEN_IDX)):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(InputError, match=f"{path.name}: a Git LFS pointer, .*git lfs pull"):
            open_pair(str(tmp_path / "pair"), (".bin", ".idx"))
        path.write_bytes(content)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_full_disk_is_noticed_with_its_reason_while_a_column_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(megatron, "CHUNK", 3)
    megatron.write_row(tmp_path / "row.npy", np.arange(10, dtype=np.uint64))
    assert np.load(tmp_path / "row.npy").tolist() == list(range(10))
    monkeypatch.setattr(megatron, "CHUNK", 1_000_000)
    with pytest.raises(OSError) as caught:
        megatron.write_row("/dev/full", np.zeros(1_000_000, np.uint64))
    assert caught.value.errno == errno.ENOSPC
