"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, warn

BUNDLED_PRICES = "us_tech_2000_2013.csv.gz"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` if the block succeeds.

    The temporary name keeps the suffix, since some writers choose the format by it. Missing parent
    folders are made. A link stays a link: the file it points to is replaced. A device or a pipe
    (``/dev/stdout``) is written to, not replaced. On any failure the temporary file goes and ``path``
    is as it was; errors of the block itself pass unchanged, unless they are the disk's. A process that is killed leaves
    its temporary file, which the next one that writes into the folder takes away.

    Raises:
        UserError: the folder cannot be written, the disk is full, or ``path`` is a folder.
    """
    path = Path(path)
    with write_errors(path):
        is_special = path.exists() and not path.is_file()  # a pipe has no name that its link could be resolved to
        target = Path(os.path.realpath(path)) if path.is_symlink() and not is_special else path
        if target.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give a file name")
        if target.parent.exists() and not target.parent.is_dir():
            raise UserError(f"cannot write {path}: {target.parent} is a file, not a folder")
        if not is_special:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_over(target.parent)
        # a name's length has a limit (255 bytes), and the random part needs room
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem[:40]}.{_mark()}.",
            suffix=target.suffix if len(target.suffix) <= 20 else "",
            dir=None if is_special else target.parent,
        )
        os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except Exception as error:
            if (reason := why_not_written(temporary, error)) is None:
                raise
            raise UserError(f"cannot write {path}: {reason}") from error
        with write_errors(path):
            if is_special:
                with temporary.open("rb") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                return
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())  # the bytes before the name, even when the power goes
            temporary.chmod(_mode_for(target))
            os.replace(temporary, target)
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _mark() -> str:
    """What tells a temporary file of this process: the machine, and the process's number there."""
    return f"{zlib.crc32(platform.node().encode()) & 0xFFFF:04x}-{os.getpid()}"


_looked_into: set[Path] = set()  # by this process; a folder of thousands of files is not listed at each write


def _remove_left_over(folder: Path) -> None:
    """Take away temporary files of processes that were killed while they wrote into ``folder``."""
    folder = folder.absolute()
    if folder in _looked_into:
        return
    _looked_into.add(folder)
    machine = _mark().partition("-")[0]
    for name in os.listdir(folder):
        found = re.fullmatch(rf"\..*\.{machine}-(\d+)\..+", name)
        if found and int(found[1]) != os.getpid():
            import psutil  # only where one was killed

            if not psutil.pid_exists(int(found[1])):
                (folder / name).unlink(missing_ok=True)


def sync(folder: Path, *, files: bool = False) -> None:
    """Put a folder's names on the disk, where the system lets a folder be opened; before them its ``files``."""
    for path in sorted(folder.iterdir()) if files else ():
        if path.is_dir():
            sync(path, files=True)
        else:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def why_not_written(place: Path, error: Exception) -> str | None:
    """What the system had against a write, in words; None for an error that has nothing to do with it.

    torch, safetensors and tokenizers do not say with an OSError that a write failed.

    Args:
        place: the file that was written, or a folder in which all was.
    """
    is_full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    is_ours = isinstance(error, OSError) and error.errno and str(error.filename or place).startswith(str(place))
    in_a_library = not isinstance(error, (OSError, UserError))
    if is_full or (in_a_library and shutil.disk_usage(place if place.is_dir() else place.parent).free < 1_000_000):
        return "the disk is full; free some space"
    if isinstance(error, OSError) and is_ours:
        return error.strerror or str(error)
    if in_a_library and re.search(r"PytorchStreamWriter|inline_container|basic_ios|I/O error|\(os error", str(error)):
        return "the system took no more bytes; look at the disk, its quota and the limit on file sizes (ulimit -f)"
    return None


def _mode_for(target: Path) -> int:
    """The old file's permissions, or for a new one what the user's umask says (mkstemp's are private)."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def read_text(path: Path, missing: str | None = None) -> str:
    """A file's UTF-8 text, without the byte order mark that some editors put first.

    Args:
        missing: what is said where there is no such file.

    Raises:
        UserError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        said = missing if isinstance(error, FileNotFoundError) else None
        raise UserError(said or f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None


FORMULA = re.compile(r"[=+\-@\t\r]")  # how a cell begins that a spreadsheet would run


def to_cell(text: str) -> str:
    """A text as it stands in a CSV: one that a spreadsheet would take for a formula has an apostrophe before it.

    Source: OWASP, CSV Injection.
    """
    return f"'{text}" if FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """The text that ``to_cell`` wrote."""
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell[1:]) else cell


def read_chinese_text(path: Path, missing: str | None = None) -> str:
    """A file's text as ``read_text`` gives it, or in GB18030 (GBK) where it cannot be anything else, which is said.

    Bytes of many encodings can be read as GB18030. It is believed where the characters are those of everyday Chinese
    (GB 2312), all but a few.

    Raises:
        UserError: it is not there, cannot be read, or is in another encoding.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        data = path.read_bytes()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("gb18030")
            foreign = [character for character in text if not character.isascii()]
            common = sum(bool(character.encode("gb2312", errors="ignore")) for character in foreign)
            if common >= 0.95 * len(foreign):
                warn(f"{path} is not UTF-8 text; it was read as GB18030 (GBK)")
                return text
    return read_text(path, missing)


def write_csv(path: Path, table: Any, **options: Any) -> None:
    """Write a table for people and spreadsheets, atomically: texts as ``to_cell`` has them, no index.

    Args:
        table: a pandas frame.
        options: of its ``to_csv``.
    """

    def safe(value: Any) -> Any:
        return to_cell(value) if isinstance(value, str) else value

    texts = {name: table[name].map(safe) for name in table if table[name].dtype.kind == "O"}
    with replacing(path) as temporary:
        table.assign(**texts).to_csv(temporary, index=False, lineterminator="\n", **options)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with ``\\n`` line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Write readable, strictly valid JSON, atomically.

    NumPy numbers and arrays become plain ones, NaN and infinities null, anything else unknown its text.
    """
    write_text(path, json.dumps(as_json_types(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def as_json_types(value: Any) -> Any:
    """``value`` in plain Python types, which JSON and a weights-only load accept; a NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): as_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json_types(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy and torch, without importing either
        return as_json_types(value.tolist())
    return str(value)


def json_of(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not valid, or nested so deeply that Python's reader gives up (with a RecursionError).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_all(path: Path) -> str:
    """Of a file's bytes; of a folder, of the names and bytes of all files in it."""
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(inside for inside in path.rglob("*") if inside.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\n{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def load_plain(path: Path, kind: str, newest: int, maker: str, advice: str = "") -> dict[str, Any]:
    """What ``torch.save`` wrote of tensors and plain values; code in it is never run.

    Args:
        path: the file.
        kind: what its ``format`` must be.
        newest: the last ``format_version`` that is understood.
        maker: the script that writes such files.
        advice: ends a message: what to do about a file that cannot be used.

    Raises:
        UserError: the file is damaged, was not written by ``maker``, or is of a newer version.
    """
    import torch

    try:
        with warnings.catch_warnings():  # torch remarks on a foreign pickle before it refuses it
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged or holds code, which is never run{advice}") from None
    except Exception as error:  # torch reports a broken file in many ways, an IndexError among them
        raise UserError(f"{path} cannot be read: {str(error)[:200]}{advice}") from None
    version = content.get("format_version", 0) if isinstance(content, dict) else 0
    if not isinstance(content, dict) or content.get("format") != kind or not isinstance(version, int):
        raise UserError(f"{path} was not written by {maker}{advice}")
    if version > newest:
        raise UserError(f"{path} was written by a newer version of this program; update it")
    return content


def bundled_folder() -> Path:
    """The folder of what comes with the project: ``data/sample`` in a checkout, ``stocklora/_sample`` when installed.

    Raises:
        UserError: neither is there, so the installation is not whole.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "data" / "sample", package / "_sample"):
        if (folder / BUNDLED_PRICES).is_file():  # another project may have a data/sample beside its packages
            return folder
    raise UserError(f"the bundled sample prices are missing beside {package}; install the project again")


def check_writable(folder: Path, flag: str = "--save_dir") -> None:
    """An unwritable folder is found before the work, not after it.

    Raises:
        UserError: naming the folder.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        if made:
            folder.rmdir()  # a run that fails leaves nothing behind
    except OSError as error:
        raise UserError(f"cannot write into {flag} {folder}: {error.strerror or error}") from None
