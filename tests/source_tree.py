"""What the tests know about the source tree: its files, its scripts, what each file imports."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
LEAVES = ("lora", "llm_model")
NOT_SCRIPTS = {"setup", "conftest", *LEAVES}


def project_files() -> list[Path]:
    """Every file that is tracked or about to be, relative to the root."""
    result = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        paths = [Path(name) for name in result.stdout.split("\0") if name]
    else:  # an unpacked source archive has no git
        skipped = {".venv", "models", "build", "dist", "checkpoints", "demo"}
        paths = [path.relative_to(REPO_ROOT) for path in REPO_ROOT.rglob("*")]
        paths = [path for path in paths if path.parts[0] not in skipped and "__pycache__" not in path.parts]
    return sorted(path for path in paths if (REPO_ROOT / path).is_file())


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def scripts() -> list[str]:
    """Names of the top-level scripts, such as ``train.py``."""
    return [path.name for path in python_files() if len(path.parts) == 1 and path.stem not in NOT_SCRIPTS]


def tree_of(path: Path) -> ast.Module:
    return ast.parse((REPO_ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.Module, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import that runs; those under ``if TYPE_CHECKING:`` don't."""
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes.extend(node.orelse)
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes.extend(ast.iter_child_nodes(node))
