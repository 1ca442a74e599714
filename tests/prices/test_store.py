"""The price store: the same frames and the same errors as ``read_prices``, without holding the files."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_files import BAD_FILES, GOOD_FILES
from price_tables import random_prices

from stocklora.cli.console import UserError
from stocklora.prices import store as price_store
from stocklora.prices.settings import ReadingSettings
from stocklora.prices.store import INDEX_NAME, PriceStore, returns_ahead, spool
from stocklora.prices.tables import log_returns_ahead, meta_path, read_prices, write_prices

HEADER = "Ticker,Date,Open,High,Low,Close,Volume\n"
LONG = HEADER + "".join(
    f"{ticker},2024-01-{day:02d},10,12,9,{close},{day}\n"
    for day in (2, 3, 4)
    for ticker, close in (("MSFT", 11), ("AAPL", 10.5), ("KO", 9.25))
)
NAMES = [
    "BRK/B",
    ".hidden",
    "贵州茅台",
    "..",
    "a b",
    "CON",
    "aapl",
    "AAPL",
    "600519",
    'with "quotes", and a comma',
    "nan",
]


@pytest.fixture(params=["small", "large"])
def path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every file is small, or every file is large and split a few rows at a time."""
    if request.param == "large":
        treat_as_large(monkeypatch)
    return request.param


def treat_as_large(monkeypatch: pytest.MonkeyPatch, rows_held: int = 4) -> None:
    monkeypatch.setattr(price_store, "LARGE_FILE_BYTES", 0)
    monkeypatch.setattr(price_store, "ROWS_HELD", rows_held)


def assert_identical(found: Mapping[str, pd.DataFrame], expected: Mapping[str, pd.DataFrame]) -> None:
    """The same tickers in the same order, and frames that no reader can tell apart."""
    assert list(found) == list(expected)
    for ticker, frame in expected.items():
        pd.testing.assert_frame_equal(found[ticker], frame, check_exact=True, check_freq=True)
        assert found[ticker].index.dtype == frame.index.dtype
        assert found[ticker].to_numpy().tobytes() == frame.to_numpy().tobytes()


def assert_only_the_store(folder: Path, tickers: int) -> None:
    expected = {INDEX_NAME, *[f"{number:05d}.npz" for number in range(tickers)]}
    assert {item.name for item in folder.iterdir()} == expected


def spooled_like_read(paths: Sequence[Path], folder: Path) -> PriceStore:
    store = spool(paths, folder)
    expected = read_prices(paths)
    assert_identical(store, expected)
    assert_identical(PriceStore(folder), expected)  # as another process opens it
    assert_only_the_store(folder, len(expected))
    return store


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def long_text(frames: Mapping[str, pd.DataFrame], order: Sequence[str]) -> str:
    """A table whose next row is each time the next of the ticker that ``order`` names."""
    rows = {name: list(zip(frame.index, frame.to_numpy().tolist(), strict=True)) for name, frame in frames.items()}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER.strip().split(","))
    for name in order:
        day, cells = rows[name].pop(0)
        writer.writerow([name, f"{day:%Y-%m-%d}", *map(repr, cells)])
    return out.getvalue()


@pytest.mark.usefixtures("path_taken")
class TestSameFrames:
    @pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
    @pytest.mark.parametrize("tickers", [["AAPL"], NAMES])
    def test_one_file(self, tmp_path: Path, suffix: str, tickers: list[str]) -> None:
        frames = {name: random_prices(40 + place, place) for place, name in enumerate(tickers)}
        write_prices(frames, tmp_path / f"p{suffix}", {"adjust": "all"})
        store = spooled_like_read([tmp_path / f"p{suffix}"], tmp_path / "store")
        assert list(store) == tickers

    def test_a_folder_of_files(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        write_prices({"AAPL": random_prices(30, 1)}, data / "AAPL.csv", {"adjust": "all"})
        write_prices({"X": random_prices(30, 2), "Y": random_prices(20, 3)}, data / "long.csv.gz", {"adjust": "all"})
        random_prices(10, 4).to_csv(data / "KO_2020.csv")  # no sidecar, no Ticker column
        (data / "notes.txt").write_text("not a table")
        assert list(spooled_like_read([data], tmp_path / "store")) == ["AAPL", "KO", "X", "Y"]
        assert list(spooled_like_read([data / "long.csv.gz", data / "AAPL.csv"], tmp_path / "s")) == ["X", "Y", "AAPL"]

    @pytest.mark.parametrize("name", GOOD_FILES)
    def test_harmless_differences_of_one_ticker(self, name: str, tmp_path: Path) -> None:
        content = GOOD_FILES[name]
        (tmp_path / "KO.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        spooled_like_read([tmp_path / "KO.csv"], tmp_path / "store")

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(LONG, id="plain"),
            pytest.param(LONG.replace("\n", "\r\n"), id="Windows line ends"),
            pytest.param(LONG.replace("\n", "\r"), id="old Mac line ends"),
            pytest.param("\ufeff" + LONG, id="byte order mark"),
            pytest.param(LONG.replace("Ticker,Date", " ticker , DATE"), id="header in another spelling"),
            pytest.param(LONG.replace("\nAAPL", "\n\n  \n,,,,,,\n\nAAPL"), id="blank lines"),
            pytest.param(LONG.replace("\n", ",,\n"), id="commas at line ends"),
            pytest.param(LONG.replace("AAPL,", '" AAPL ",'), id="quoted with blanks around"),
            pytest.param(LONG.replace("AAPL,", '"A\nB",'), id="a line break inside a ticker"),
            pytest.param(gzip.compress(LONG.encode()), id="gzip under the name of a csv"),
            pytest.param(
                "Close,Note,High,Ticker,Low,Open,Volume,Date\n"
                '11,"one, two",12,KO,9,10,-0,20240102\n11,,12,PEP,9,10,1.5,2024/01/02\n11,,12,KO,9,10,3,2024-01-03\n',
                id="other order, more columns",
            ),
            pytest.param(
                "Ticker symbol,Date,Open,High,Low,Close,Volume\nKO,2024-01-02,10,12,9,11,1\n", id="no Ticker after all"
            ),
        ],
    )
    def test_harmless_differences_of_several_tickers(self, content: str | bytes, tmp_path: Path) -> None:
        (tmp_path / "long.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        spooled_like_read([tmp_path / "long.csv"], tmp_path / "store")

    def test_the_name_comes_from_the_sidecar(self, tmp_path: Path) -> None:
        write_prices({"贵州茅台": random_prices(20)}, tmp_path / "sample_test.csv", {})
        assert list(spooled_like_read([tmp_path / "sample_test.csv"], tmp_path / "store")) == ["贵州茅台"]

    @pytest.mark.parametrize("ticker", NAMES)
    def test_awkward_names(self, ticker: str, tmp_path: Path) -> None:
        frames = {"FIRST": random_prices(20, 1), ticker: random_prices(20, 2)}
        write_prices(frames, tmp_path / "p.csv", {})
        spooled_like_read([tmp_path / "p.csv"], tmp_path / "store")
        assert list(spool([tmp_path / "p.csv"], tmp_path / "one", [ticker])) == [ticker]
        assert_only_the_store(tmp_path / "one", 1)


@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    data=st.data(),
)
def test_rows_in_any_order_and_any_names(
    names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where a name is blank or two are equal but for blanks: then both refuse, in the same words."""
    folder = tmp_path_factory.mktemp("any")
    frames = {name: random_prices(data.draw(st.integers(1, 6)), place) for place, name in enumerate(names)}
    order = data.draw(st.permutations([name for name, frame in frames.items() for _ in range(len(frame))]))
    (folder / "long.csv").write_text(long_text(frames, order), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        treat_as_large(patch, data.draw(st.integers(1, 5)))
        names_read = list(dict.fromkeys(name.strip() for name in order))
        if "" not in names_read and len(names_read) == len(names):
            assert list(spooled_like_read([folder / "long.csv"], folder / "store")) == names_read
            return
        message = outcome(spool, [folder / "long.csv"], folder / "store")
        assert message == outcome(read_prices, folder / "long.csv")
        assert (list((folder / "store").iterdir()) == []) == (message != "")


def outcome(call: Any, *arguments: Any) -> str:
    """The error's words, or nothing."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def swapped(old: str, new: str) -> str:
    assert old in LONG
    return LONG.replace(old, new, 1)


BAD_LONG: dict[str, tuple[str | bytes, str]] = {
    "duplicate": (LONG + "AAPL,2024-01-04,10,12,9,11,1\n", "row 9, column Date: 2024-01-04 of AAPL is there twice"),
    "text in a number": (swapped("AAPL,2024-01-03,10", "AAPL,2024-01-03,x"), "row 6, column Open: 'x' is not a number"),
    "two faults": (
        swapped("KO,2024-01-02,10", "KO,2024-01-02,x").replace("MSFT,2024-01-04,10", "MSFT,2024-01-04,y"),
        "row 4, column Open: 'x'",
    ),
    "close above high": (swapped("9,10.5,3", "9,99,3"), "row 6, column Close: close 99 is outside"),
    "no such day": (swapped("KO,2024-01-04", "KO,2024-02-30"), "row 10, column Date: '2024-02-30' is no day"),
    "empty ticker": (swapped("\nAAPL,2024-01-04", "\n ,2024-01-04"), "row 9, column Ticker: the cell is empty"),
    "too few values": (swapped("9,10.5,3", "9,10.5"), "row 6: 6 values under 7 columns"),
    "too many values": (swapped("9,10.5,3", "9,10.5,3,4"), "row 6: 8 values under 7 columns"),
    "a row of one cell": (LONG + "AAPL\n", "row 11: 1 values under 7 columns"),
    "unclosed quote": (swapped("\nAAPL,2024-01-03", '\nAAPL,"2024-01-03'), "row 10"),
    "a huge cell": (LONG + "KO,2024-01-05,10,12,9,11," + "1" * 200_000 + "\n", "row 11: not a CSV line"),
    "wrong header": (swapped("Close", "Middle"), "missing column Close; the file has: Ticker, Date"),
    "Ticker twice": (swapped("Volume", "Ticker"), "column Ticker stands 2 times"),
    "header alone": (HEADER, "a header but no row"),
    "not UTF-8": (LONG.encode() + b"KO,2024-01-05\xa0,10,12,9,11,1\n", "row 11: byte 0xa0 is not UTF-8"),
    "a zero byte": (LONG.encode() + b"K\0,2024-01-05,10,12,9,11,1\n", "binary file"),
    "gzip cut short": (gzip.compress(LONG.encode())[:-12], "cannot be read"),
    "gzip damaged": (gzip.compress(LONG.encode())[:15] + b"\xff" * 30, "cannot be read"),
    "gzip damaged at its end": (gzip.compress(LONG.encode())[:-8] + b"\xff" * 8, "cannot be read"),
}


@pytest.mark.usefixtures("path_taken")
class TestSameErrors:
    @pytest.mark.parametrize("name", BAD_LONG)
    def test_several_tickers(self, name: str, tmp_path: Path) -> None:
        content, words = BAD_LONG[name]
        path, folder = tmp_path / "bad.csv", tmp_path / "store"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = error_of(spool, [path], folder)
        assert found == error_of(read_prices, path)
        assert str(path) in found
        assert words in found
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("name", BAD_FILES)
    def test_every_other_bad_file(self, name: str, tmp_path: Path) -> None:
        content, _ = BAD_FILES[name]
        path = tmp_path / "bad.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert error_of(spool, [path], tmp_path / "store") == error_of(read_prices, path)
        assert list((tmp_path / "store").iterdir()) == []

    def test_broken_rows_are_few_or_many_by_the_whole_file(self, tmp_path: Path) -> None:
        """A tenth of the file may go, though it is a third of one ticker."""
        frames = {name: random_prices(30, seed) for seed, name in enumerate(("AAPL", "KO", "MSFT", "IBM", "XOM"))}
        lines = [f"Ticker,{','.join(['Date', *frames['KO'].columns])}"]
        for name, frame in frames.items():
            rows = frame.to_csv(date_format="%Y-%m-%d", header=False, lineterminator="\n").splitlines()
            lines += [
                f"{name},{row}x" if name == "KO" and 5 <= at < 15 else f"{name},{row}" for at, row in enumerate(rows)
            ]
        path, reading = tmp_path / "p.csv", ReadingSettings(drop_bad_rows=True, exchange="24/7")
        path.write_text("\n".join(lines) + "\n")
        expected = read_prices(path, reading=reading)
        assert {name: len(frame) for name, frame in expected.items()} == dict.fromkeys(frames, 30) | {"KO": 20}
        store = spool([path], tmp_path / "store", reading=reading)
        for name, frame in expected.items():
            pd.testing.assert_frame_equal(store[name], frame, check_freq=False)

    def test_a_gzip_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv.gz").write_text(LONG)
        found = error_of(spool, [tmp_path / "p.csv.gz"], tmp_path / "store")
        assert found == error_of(read_prices, tmp_path / "p.csv.gz")
        assert "the content is not" in found

    def test_a_ticker_in_two_files(self, tmp_path: Path) -> None:
        (tmp_path / "one.csv").write_text(LONG)
        (tmp_path / "two.csv").write_text(HEADER + "PEP,2024-01-02,10,12,9,11,1\nKO,2024-01-02,10,12,9,11,1\n")
        found = error_of(spool, [tmp_path], tmp_path / "store")
        assert found == error_of(read_prices, tmp_path)
        assert "two.csv: ticker KO is also in" in found
        assert not (tmp_path / "store" / INDEX_NAME).exists()
        assert not any(item.is_dir() for item in (tmp_path / "store").iterdir())
        # Also where that ticker is not wanted: the files are validated whole.
        assert error_of(spool, [tmp_path], tmp_path / "store", ["PEP"]) == found

    @pytest.mark.parametrize("adjustments", [("all", "splits"), ("all", "mixed"), ("mixed", "mixed")])
    def test_mixed_adjustments(self, adjustments: tuple[str, str], tmp_path: Path) -> None:
        for number, adjust in enumerate(adjustments):
            frames = {f"{number}{letter}": random_prices(10) for letter in "AB"}
            write_prices(frames, tmp_path / "data" / f"{number}.csv", {"adjust": adjust})
        found = error_of(spool, [tmp_path / "data"], tmp_path / "store")
        assert found == error_of(read_prices, tmp_path / "data")
        assert "different adjustment" in found
        with pytest.raises(FileNotFoundError):
            PriceStore(tmp_path / "store")

    def test_a_broken_sidecar(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv").write_text(LONG)
        meta_path(tmp_path / "p.csv").write_text("[]")
        assert error_of(spool, [tmp_path / "p.csv"], tmp_path / "s") == error_of(read_prices, tmp_path / "p.csv")

    def test_a_changed_file_is_remarked_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_prices({"AAPL": random_prices(9), "KO": random_prices(9)}, tmp_path / "p.csv", {"adjust": "all"})
        (tmp_path / "p.csv").write_text(BAD_LONG["duplicate"][0])  # type: ignore[arg-type]
        assert "there twice" in error_of(spool, [tmp_path / "p.csv"], tmp_path / "store")
        assert capsys.readouterr().err.count("has changed since") == 1

    def test_no_file_and_an_empty_folder(self, tmp_path: Path) -> None:
        for paths in ([], [tmp_path], [tmp_path / "nothing.csv"]):
            assert error_of(spool, paths, tmp_path / "store") == error_of(read_prices, paths)


@pytest.mark.usefixtures("path_taken")
def test_wanted_tickers_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(LONG)
    expected = read_prices(tmp_path / "p.csv")
    store = spool([tmp_path / "p.csv"], tmp_path / "store", ["KO", "MSFT"])
    assert_identical(store, {"MSFT": expected["MSFT"], "KO": expected["KO"]})
    assert_only_the_store(tmp_path / "store", 2)
    message = error_of(spool, [tmp_path / "p.csv"], tmp_path / "other", ["KO", "PEP", "TSLA"])
    assert message == "no prices of PEP, TSLA in the files; they have MSFT, AAPL, KO"


def test_many_tickers_are_not_all_named(tmp_path: Path) -> None:
    rows = "".join(f"T{number},2024-01-02,10,12,9,11,1\n" for number in range(30))
    (tmp_path / "p.csv").write_text(HEADER + rows)
    message = error_of(spool, [tmp_path / "p.csv"], tmp_path / "store", ["PEP"])
    assert message.endswith("T18, T19 ...")


@pytest.mark.usefixtures("path_taken")
def test_a_store_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(LONG)
    spool([tmp_path / "p.csv"], tmp_path / "store")
    (tmp_path / "p.csv").write_text(HEADER + "PEP,2024-01-02,10,12,9,11,1\n")
    spooled_like_read([tmp_path / "p.csv"], tmp_path / "store")
    # A failure leaves no store rather than the older one under new names.
    (tmp_path / "p.csv").write_text(HEADER)
    error_of(spool, [tmp_path / "p.csv"], tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        PriceStore(tmp_path / "store")


def tables_of(tickers: int, rows: int) -> dict[str, pd.DataFrame]:
    return {f"T{number:02d}": random_prices(rows, number) for number in range(tickers)}


def mixed_up(frames: Mapping[str, pd.DataFrame], seed: int = 0) -> list[str]:
    names = [name for name, frame in frames.items() for _ in range(len(frame))]
    return list(np.random.default_rng(seed).permutation(np.array(names, dtype=object)))


@pytest.mark.parametrize("form", ["plain", "byte order mark", "gzip", "gzip under the name of a csv"])
def test_a_large_file_is_never_read_whole(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = tables_of(6, 50)
    text = long_text(frames, mixed_up(frames)).encode("utf-8-sig" if form == "byte order mark" else "utf-8")
    path = tmp_path / ("long.csv.gz" if form == "gzip" else "long.csv")
    path.write_bytes(gzip.compress(text) if form.startswith("gzip") else text)
    seen: list[tuple[Path, int]] = []

    def reading(piece: Path, *given: Any, **named: Any) -> dict[str, pd.DataFrame]:
        tables = read_table(piece, *given, **named)
        seen.append((piece, sum(map(len, tables.values()))))
        return tables

    read_table = price_store.read_table
    monkeypatch.setattr(price_store, "read_table", reading)
    treat_as_large(monkeypatch, rows_held=20)
    store = spool([path], tmp_path / "store")
    assert path not in [piece for piece, _ in seen]
    assert [rows for _, rows in seen] == [50] * 6
    assert not any(piece.exists() for piece, _ in seen)
    assert_identical(store, read_prices(path))

    # A size below the limit is read at once: splitting it would only cost time.
    seen.clear()
    monkeypatch.setattr(price_store, "LARGE_FILE_BYTES", 10**6)
    assert_identical(spool([path], tmp_path / "store"), read_prices(path))
    assert seen == [(path, 300)]


def test_the_size_of_a_gzip_is_taken_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.csv.gz"
    path.write_bytes(gzip.compress(LONG.encode()))
    seen: list[Path] = []
    read_table = price_store.read_table
    monkeypatch.setattr(price_store, "read_table", lambda piece, *_, **__: seen.append(piece) or read_table(piece))
    for limit, is_split in ((2 * path.stat().st_size, True), (5 * path.stat().st_size, False)):
        seen.clear()
        monkeypatch.setattr(price_store, "LARGE_FILE_BYTES", limit)
        spool([path], tmp_path / "store")
        assert (path not in seen) == is_split


def peak_mb(call: Any) -> float:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows, more tickers: reading whole needs the file's memory, spooling and walking a piece's."""
    treat_as_large(monkeypatch, rows_held=200)
    frames = tables_of(20, 250)
    (tmp_path / "long.csv").write_text(long_text(frames, mixed_up(frames)))
    paths = [tmp_path / "long.csv"]
    spool(paths, tmp_path / "warm")  # imports and caches first
    whole = peak_mb(lambda: read_prices(paths))
    streamed = peak_mb(lambda: [len(frame) for frame in spool(paths, tmp_path / "store").values()])
    assert streamed < whole / 5


class TestMapping:
    @pytest.fixture
    def store(self, tmp_path: Path) -> PriceStore:
        (tmp_path / "p.csv").write_text(LONG)
        return spool([tmp_path / "p.csv"], tmp_path / "store")

    def test_it_behaves_as_a_dict_of_frames(self, store: PriceStore, tmp_path: Path) -> None:
        expected = read_prices(tmp_path / "p.csv")
        assert isinstance(store, Mapping)
        assert len(store) == 3
        assert list(store) == list(store.keys()) == ["MSFT", "AAPL", "KO"]
        assert_identical(dict(store), expected)
        assert_identical(dict(store.items()), expected)
        assert [frame["Close"].iloc[0] for frame in store.values()] == [11, 10.5, 9.25]
        assert store.get("PEP") is None
        assert store.get("KO") is not None
        with pytest.raises(KeyError):
            store["PEP"]
        # Asked for again and again, in any order.
        for ticker in ("KO", "MSFT", "KO", "KO", "AAPL"):
            pd.testing.assert_frame_equal(store[ticker], expected[ticker], check_exact=True)

    def test_asking_whether_a_ticker_is_there_reads_no_file(self, store: PriceStore) -> None:
        for path in store.folder.glob("*.npz"):
            path.unlink()
        assert "KO" in store
        assert "PEP" not in store
        assert 5 not in store

    def test_writing_into_a_frame_does_not_change_the_store(self, store: PriceStore) -> None:
        before = store["KO"].copy()
        taken = store["KO"]
        taken.iloc[0, 3] = -1.0
        taken["Extra"] = 0.0
        taken.index.name = "day"
        pd.testing.assert_frame_equal(store["KO"], before, check_exact=True)

    def test_an_empty_folder_is_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            PriceStore(tmp_path)

    def test_returns_ahead(self, store: PriceStore, tmp_path: Path) -> None:
        ahead = returns_ahead(store, 2)
        assert isinstance(ahead, Mapping)
        assert list(ahead) == list(store)
        assert len(ahead) == 3
        for ticker, frame in read_prices(tmp_path / "p.csv").items():
            expected = log_returns_ahead(frame["Close"].to_numpy(), 2)
            np.testing.assert_array_equal(ahead[ticker], expected)
            assert np.isnan(expected).sum() == 3
        with pytest.raises(KeyError):
            ahead["PEP"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.csv").write_text(LONG)
    (tmp_path / "file").write_text("")
    assert "cannot write" in error_of(spool, [tmp_path / "p.csv"], tmp_path / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    message = error_of(spool, [tmp_path / "p.csv"], tmp_path / "store")
    assert message == f"cannot write {tmp_path / 'store'}: No space left on device"


def test_a_full_disk_while_splitting_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.csv").write_text(LONG)
    treat_as_large(monkeypatch)
    plain = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    message = error_of(spool, [tmp_path / "p.csv"], tmp_path / "store")
    assert message == f"cannot write {tmp_path / 'store'}: No space left on device"
    assert list((tmp_path / "store").iterdir()) == []
