"""The rules of docs/architecture.md, held by walking the syntax trees."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from rooms import LEAVES as MAY_IMPORT
from rooms import ROOMS, diagram, module_of, room_of
from source_tree import REPO_ROOT, imports_of, project_files, python_files, scripts, tree_of

HEAVY = {
    "accelerate", "akshare", "arch", "bitsandbytes", "exchange_calendars", "fracast", "gguf", "huggingface_hub",
    "matplotlib", "modelscope", "numpy", "pandas", "peft", "psutil", "pyarrow", "rich", "safetensors", "scipy",
    "statsforecast", "statsmodels", "tokenizers", "torch", "transformers", "yaml", "yfinance",
    "datasets", "fastapi", "pydantic", "rouge_chinese", "sacrebleu", "starlette", "tensorboard", "trl", "uvicorn",
    "wandb",
}  # fmt: skip
SCRIPT_STEMS = {name.removesuffix(".py") for name in scripts()}
# Folders of later scripts are as little a library as the top-level scripts are.
SCRIPT_FOLDERS = {"data", "training", "visualization", "examples", "scripts", "bench", "setup"}

FORBIDDEN = {
    "a machine's own path": r"/root/|/home/\w|/Users/\w|/work/|/opt/",
    "a package registry's host": r"pypi\.org|pythonhosted\.org|download\.pytorch\.org",
}


def modules() -> dict[str, Path]:
    """Every module of the program, by its dotted name: neither tests nor benchmarks, nor the faces of packages."""
    paths = [path for path in python_files() if path.parts[0] not in ("tests", "bench") and path.stem != "__init__"]
    return {module_of(path): path for path in paths}


def arrows() -> list[tuple[str, str, str]]:
    """(place, importing module, imported module) of every import among the program's own modules.

    Inside functions and for type checkers alone too; of ``from a.b import c`` the module is ``a.b.c`` where it is one.
    """
    ours = modules()
    found = []
    for name, path in ours.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in ours else str(node.module) for target in inside]
            else:
                continue
            found += [(f"{path}:{node.lineno}", name, target) for target in dict.fromkeys(targets)]
    return found


def test_every_module_of_the_package_stands_in_a_room() -> None:
    homeless = [name for name in modules() if name.startswith("stocklora.") and room_of(name) is None]
    assert not homeless


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = []
    for place, module, target in arrows():
        own, other = room_of(module), room_of(target)
        if own is None or other is None or own == other:
            continue
        allowed = MAY_IMPORT[own] if own in MAY_IMPORT else ROOMS[own].may_import
        if other not in allowed:
            wrong.append(f"{place}: {own} must not import {other} ({target})")
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_goes_one_way() -> None:
    rank = {name: place for place, name in enumerate(["lora", "llm_model", *ROOMS])}
    up = [f"{own} -> {other}" for own, room in ROOMS.items() for other in room.may_import if rank[other] >= rank[own]]
    assert not up


def test_no_circle_between_modules() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for _, module, target in arrows():
        if target in graph:
            graph[module].add(target)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle: " + " <- ".join(error.args[1]))


def test_nobody_imports_a_script() -> None:
    scripts_and_folders = SCRIPT_STEMS | SCRIPT_FOLDERS
    wrong = []
    for path in python_files():
        for module, line in imports_of(tree_of(path)):
            root = module.split(".")[0]
            # Benchmarks share a helper among themselves; a test may call a script's main in its own process.
            allowed = {"bench": {"bench"}, "tests": SCRIPT_STEMS}.get(path.parts[0], set())
            if root in scripts_and_folders - allowed:
                wrong.append(f"{path}:{line}: imports {module}")
    assert not wrong, "\n".join(wrong)


def test_modules_and_functions_stay_readable() -> None:
    users = Counter(target for _, _, target in arrows())
    faults = []
    for name, path in modules().items():
        lines = len((REPO_ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > 400 and name != "lora":  # which has a test of its own
            faults.append(f"{path}: {lines} lines; at most 400")
        if lines < 30 and users[name] == 1:
            faults.append(f"{path}: {lines} lines for one caller; let it move in there")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines; at most 60")
    assert not faults, "\n".join(faults)


def test_lora_is_read_in_one_sitting() -> None:
    source = (REPO_ROOT / "lora.py").read_text(encoding="utf-8")
    tree = tree_of(Path("lora.py"))
    words: set[int] = set()  # lines of docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            words |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = source.splitlines()
    code = [
        line for number, line in enumerate(lines, start=1)
        if number not in words and line.strip() and not line.strip().startswith("#")
    ]  # fmt: skip
    assert len(lines) <= 450
    assert len(code) <= 260


def test_the_diagram_shows_the_table() -> None:
    page = (REPO_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram()}\n```" in page, "put in what `python tests/fixtures/rooms.py` prints"


def test_the_documents_name_files_that_exist() -> None:
    gone = []
    for page in [path for path in project_files() if path.suffix == ".md" and path.parts[0] != "data"]:
        text = (REPO_ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"(?:stocklora|tests|bench|docs|scripts|training)/(?!NAME)[\w/.-]+\.(?:py|md)\b", text):
            gone += [] if (REPO_ROOT / name).is_file() else [f"{page}: {name}"]
    assert not gone, "\n".join(gone)


def test_the_documents_import_what_is_there() -> None:
    gone = []
    for page in [path for path in project_files() if path.suffix == ".md"]:
        text = (REPO_ROOT / page).read_text(encoding="utf-8")
        for module, names in re.findall(
            r"^from ((?:stocklora|lora|llm_model)[\w.]*) import ([^\n#(]+)", text, re.MULTILINE
        ):
            there = importlib.import_module(module)
            gone += [
                f"{page}: {module} {name}" for name in re.split(r",\s*", names.strip()) if not hasattr(there, name)
            ]
    assert not gone, "\n".join(gone)


def test_lora_stands_on_torch_alone() -> None:
    standard = sys.stdlib_module_names
    tree = tree_of(Path("lora.py"))
    at_top = {module.split(".")[0] for module, _ in imports_of(tree, top_level_only=True)} - standard
    anywhere = {module.split(".")[0] for module, _ in imports_of(tree)} - standard
    assert at_top == anywhere == {"torch"}


@pytest.mark.parametrize("name", scripts())
def test_scripts_have_one_shape(name: str) -> None:
    tree = tree_of(Path(name))
    docstring = ast.get_docstring(tree) or ""
    assert f"python {name}" in docstring, f"{name}: the docstring has no command to copy"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "build_parser" in functions
    main = functions["main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert [ast.unparse(default) for default in main.args.defaults] == ["None"]
    assert ast.unparse(main.returns or ast.Constant(None)) == "int"
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    sys.exit(main())"


@pytest.mark.parametrize("name", scripts())
def test_scripts_import_nothing_heavy_at_the_top(name: str) -> None:
    for module, line in imports_of(tree_of(Path(name)), top_level_only=True):
        assert module.split(".")[0] not in HEAVY, f"{name}:{line}: import {module} inside main"


def test_every_script_is_packaged() -> None:
    for node in tree_of(Path("setup.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCRIPTS":
            assert sorted(ast.literal_eval(node.value)) == sorted(SCRIPT_STEMS)
            return
    pytest.fail("setup.py has no SCRIPTS")


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in project_files():
        data = (REPO_ROOT / path).read_bytes()
        if b"\0" in data or path.name == Path(__file__).name:  # this file has to write them down
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            found += [
                f"{path}:{number}: {what}: {line.strip()[:100]}"
                for what, pattern in FORBIDDEN.items()
                if re.search(pattern, line)
            ]
    assert not found, "\n".join(found)


def test_the_walk_sees_what_it_should() -> None:
    source = (
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import t\nelse:\n    import e\n"
        "def f():\n    import inside\nclass C:\n    import body\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\nfrom . import rel\n"
    )
    tree = ast.parse(source)
    everything = {name for name, _ in imports_of(tree)}
    assert everything == {"a.b", "typing", "e", "inside", "body", "tried", "."}
    assert everything - {name for name, _ in imports_of(tree, top_level_only=True)} == {"inside"}
