"""What ``web.py`` can be told; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.settings import check_range, setting


@dataclass(frozen=True)
class WebSettings:
    """Settings of ``web.py``."""

    workspace: Path = setting(
        Path("workspace"), "folder that the page works in, and the only one whose files it shows; made where there is "
        "none", section="page", metavar="FOLDER",
    )  # fmt: skip
    models: Path = setting(
        Path("models"), "folder of base models, offered beside those in the workspace", section="page",
        metavar="FOLDER",
    )  # fmt: skip
    port: int = setting(8750, "port of the page; 0 takes a free one", section="page")
    open: bool = setting(True, "open the page in the browser, where there is a desktop", section="page")

    def __post_init__(self) -> None:
        check_range(self, port=(0, 65535))
