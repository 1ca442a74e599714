"""Defaults, config files and flags: who wins, and what a wrong value is told."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocklora.cli.console import UserError
from stocklora.cli.settings import ScriptParser, add_settings, read_config, resolve_settings, setting


@dataclass(frozen=True)
class Example:
    data: list[Path] = setting([], "files at 100%", nargs="+")
    epochs: int = setting(20, "passes")
    learning_rate: float = setting(1e-4, "rate")
    shuffle: bool = setting(True, "shuffle")
    verbose: bool = setting(False, "talk")
    prompt: str = setting("returns", "format", choices=("returns", "ohlcv"))
    pattern: str = setting("50%d", "a default with a percent sign")
    limit: int | None = setting(None, "most rows")
    names: list[str] = setting(["a", "b"], "names", nargs="+")


def resolved(*flags: str, config: Path | None = None) -> Example:
    parser = ScriptParser()
    add_settings(parser, Example)
    given_config = [] if config is None else ["--config", str(config)]
    return resolve_settings(parser.parse_args([*flags, *given_config]), Example)


def write(folder: Path, content: Any, name: str = "c.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_defaults_without_anything() -> None:
    assert resolved() == Example()


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    config = write(tmp_path, {"epochs": 3, "learning_rate": 1, "data": ["a.csv"], "shuffle": False})
    settings = resolved("--epochs", "5", config=config)
    assert settings == Example(epochs=5, learning_rate=1.0, data=[Path("a.csv")], shuffle=False)
    assert isinstance(settings.learning_rate, float)


def test_a_flag_that_repeats_the_default_still_beats_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, {"epochs": 3, "verbose": True})
    assert resolved("--epochs", "20", "--no-verbose", config=config) == Example()


def test_mutable_defaults_are_not_shared() -> None:
    resolved().names.append("c")
    assert resolved().names == ["a", "b"]


@pytest.mark.parametrize("name", ["c.yaml", "c.YML"])
def test_yaml(tmp_path: Path, name: str) -> None:
    config = write(tmp_path, "epochs: 3\nlearning_rate: 1e-3\nlimit: null\ndata: [a.csv, b.csv]\n", name)
    assert resolved(config=config) == Example(epochs=3, learning_rate=1e-3, data=[Path("a.csv"), Path("b.csv")])


def test_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"epochs": 3}')
    assert resolved(config=tmp_path / "c.json").epochs == 3


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert resolved(config=write(tmp_path, {"data": "a.csv"})).data == [Path("a.csv")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"learning-rate": 3}, "did you mean 'learning_rate'"),
        ({"zzzzqq": 3}, "known keys: data, epochs"),
        ({"epochs": "3"}, "'epochs' must be int, got '3'"),
        ({"epochs": 3.0}, "must be int, got 3.0"),
        ({"epochs": True}, "must be int, got True"),
        ({"epochs": None}, "must be int, got None"),
        ({"epochs": [3]}, "must be int"),
        ({"shuffle": 1}, "'shuffle' must be bool, got 1"),
        ({"learning_rate": False}, "must be float, got False"),
        ({"learning_rate": "fast"}, "must be float, got 'fast'"),
        ({"prompt": "csv"}, "must be one of returns, ohlcv, got 'csv'"),
        ({"data": [1]}, "must be Path"),
        ({"data": []}, "'data' needs at least one value"),
        ('{"learning_rate": 1e999}', "must be a finite number"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "must be a finite number"),
        ('{"learning_rate": NaN}', "NaN is not a number that a setting can have"),
        ('{"epochs": 3, "epochs": 4}', "'epochs' stands there twice"),
        ("[1]", "must hold one mapping of settings, not a list"),
        ("", "not valid JSON"),
        ("{'epochs': 3}", "not valid JSON"),
    ],
)
def test_wrong_config_names_the_file_and_the_key(tmp_path: Path, content: Any, message: str) -> None:
    config = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        resolved(config=config)
    assert message in str(error.value)
    assert str(config) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: 3\nepochs: 4\n", "'epochs' stands there twice"),
        ("epochs: [", "not valid YAML"),
        ("- 1\n", "not a list"),
        ("", "not a NoneType"),
        ("1: 2\n", "unknown setting '1'"),
        ("epochs: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("learning_rate: '1e-3'\n", "must be float, got '1e-3'"),
        ("learning_rate: .nan\n", "must be a finite number"),
    ],
)
def test_wrong_yaml(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match="c.yaml") as error:
        resolved(config=write(tmp_path, content, "c.yaml"))
    assert message in str(error.value)


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        resolved(config=tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read config file"):
        resolved(config=tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        resolved(config=tmp_path / "latin.json")


@pytest.mark.parametrize(
    "flags",
    [
        ["--epoch", "3"],  # no abbreviations
        ["--nonsense"],
        ["--epochs", "three"],
        ["--epochs", "3.5"],
        ["--learning_rate", "nan"],
        ["--learning_rate", "inf"],
        ["--learning_rate", "quick"],
        ["--prompt", "csv"],
        ["--data"],
    ],
)
def test_wrong_flags_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        resolved(*flags)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_shows_every_default_even_with_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        resolved("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for text in ("(default: 20)", "(default: 50%d)", "files at 100%", "(default: a b)", "{returns,ohlcv}", "--no-verb"):
        assert text in shown


@given(
    epochs=st.integers(),
    learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    verbose=st.booleans(),
    names=st.lists(st.text(alphabet=st.characters(codec="utf-8"), min_size=1), min_size=1),
)
def test_what_a_config_file_holds_is_what_comes_out(
    tmp_path_factory: pytest.TempPathFactory, epochs: int, learning_rate: float, verbose: bool, names: list[str]
) -> None:
    values = {"epochs": epochs, "learning_rate": learning_rate, "verbose": verbose, "names": names}
    config = write(tmp_path_factory.mktemp("c"), values)
    assert resolved(config=config) == Example(**values)


@given(content=st.text(max_size=80), suffix=st.sampled_from([".json", ".yaml"]))
def test_any_text_is_a_mapping_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("c") / f"c{suffix}"
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with contextlib.suppress(UserError):
        assert isinstance(read_config(path), dict)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    ),
    key=st.sampled_from(["data", "epochs", "learning_rate", "shuffle", "prompt", "limit", "names"]),
)
def test_a_value_has_the_right_type_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str
) -> None:
    config = write(tmp_path_factory.mktemp("c"), {key: value})
    try:
        got = getattr(resolved(config=config), key)
    except UserError:
        return
    wanted = {"data": list, "epochs": int, "learning_rate": float, "shuffle": bool, "prompt": str, "names": list}
    assert got is None if key == "limit" and value is None else type(got) is wanted.get(key, int)
