"""The folder that the page works in: which files it may touch, and where things lie in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stocklora.cli.console import UserError

RUNS, PRICES, REMOVED, STATE = "runs", "prices", "removed", ".stocklora"
LEDGER, PREDICTIONS, EXPLANATION = "forecasts.db", "predictions.csv", "explanation.csv"
NOT_LOOKED_INTO = {RUNS, REMOVED, "node_modules", "__pycache__", "site-packages"}
MOST_FILES, DEEPEST = 5000, 5
LARGEST_NAME = 120


class Workspace:
    """Files below one folder, and base models below another that is only read.

    Args:
        folder: the workspace; scripts run with it as their working directory.
        models: the folder of base models.
    """

    def __init__(self, folder: Path, models: Path) -> None:
        self.root, self.models = folder.resolve(), models.resolve()

    def inside(self, text: str | Path) -> Path:
        """The file or folder that ``text`` names, links followed.

        Raises:
            UserError: it lies outside the workspace, by its name or by a link.
        """
        return self._below(text, (self.root,))

    def argument(self, text: str | Path) -> Path:
        """As ``inside``, for what a script is given: base models too.

        Raises:
            UserError: it lies in neither folder.
        """
        return self._below(text, (self.root, self.models))

    def _below(self, text: str | Path, roots: tuple[Path, ...]) -> Path:
        try:
            path = (self.root / os.path.expanduser(text)).resolve()
        except (OSError, ValueError, RuntimeError):
            raise UserError(f"{text} is no path") from None
        if not any(path.is_relative_to(root) for root in roots):
            raise UserError(
                f"{text} lies outside the workspace {self.root}; put it in there, or start: web.py --workspace FOLDER"
            )
        return path

    def name_of(self, path: Path) -> str:
        """A path as scripts that run in the workspace are given it."""
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        beside = path.is_relative_to(self.root.parent)
        return Path(os.path.relpath(path, self.root)).as_posix() if beside else path.as_posix()

    def new_file(self, name: str, folder: str = PRICES) -> Path:
        """Where an upload called ``name`` goes; of a path only its last part counts.

        Raises:
            UserError: no name, or a hidden one.
        """
        plain = "".join(
            character for character in name.replace("\\", "/").rpartition("/")[2] if character.isprintable()
        )
        if not plain or plain.startswith((".", "-")) or len(plain.encode()) > LARGEST_NAME:
            raise UserError(f"{name[:40]!r} is no name for a file; give it a plain one, such as AAPL.csv")
        return self.inside(Path(folder) / plain)

    def files(self) -> Iterator[Path]:
        """All files but hidden ones, those of runs, and those behind links; at most ``MOST_FILES``."""
        found = 0
        for folder, folders, names in os.walk(self.root):
            depth = len(Path(folder).relative_to(self.root).parts)
            is_open = depth < DEEPEST
            folders[:] = sorted(
                name for name in folders if is_open and not name.startswith(".") and name not in NOT_LOOKED_INTO
            )
            for name in sorted(names):
                path = Path(folder) / name
                if name.startswith(".") or path.is_symlink():
                    continue
                found += 1
                if found > MOST_FILES:
                    return
                yield path

    def base_models(self) -> list[str]:
        """Folders with a configuration and a tokenizer, here and in the folder of models."""
        configs = [path for path in self.files() if path.name == "config.json"]
        configs += sorted(self.models.glob("*/config.json")) + sorted(self.models.glob("*/*/config.json"))
        folders = [
            path.parent
            for path in configs
            if any((path.parent / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        ]
        return list(dict.fromkeys(map(self.name_of, folders)))

    def adapters(self) -> list[str]:
        """Folders of chat models that were tuned here: adapters, and whole models with a record of their training."""
        names = {"adapter_config.json", "training_info.json"}
        found = {path.parent for path in self.files() if path.name in names}
        return sorted(self.name_of(folder) for folder in found if not folder.name.startswith("checkpoint-"))

    def weights(self) -> list[str]:
        """Weights files of ``train_lora.py`` and model files of ``train.py``."""
        return [
            self.name_of(path)
            for path in self.files()
            if path.suffix == ".pth" and "last" not in path.parts and path.name != "stocklora_forecaster.pth"
        ]
