"""The import law, read from the source: bench -> search -> effbert -> kernels, the command line above all."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOOR = {"kernels": 0, "effbert": 1, "search": 2, "bench": 3}
ROOF = {"effbert/cli.py", "effbert/__main__.py"}
SOURCES = sorted(path for folder in FLOOR for path in (ROOT / folder).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    inner = str(path.relative_to(ROOT))
    floor = FLOOR[inner.split("/")[0]]
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("kernels", "search", "bench"), f"{inner} imports top-level {name}"
        if parts[0] == "effbert" and len(parts) > 1 and inner not in ROOF:
            target = parts[1] if parts[1] in FLOOR else "effbert"
            assert FLOOR[target] <= floor, f"{inner} imports {name}, which is above it"
            assert parts[1] not in ("cli", "__main__"), f"{inner} imports the roof"


def test_no_source_evaluates_or_unpickles_text():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
        assert not {"pickle", "dill", "cloudpickle"} & set(imports(path)), path


def test_kernels_need_only_torch():
    third_party = {
        name.split(".")[0]
        for path in (ROOT / "kernels").glob("*.py")
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert third_party <= {"effbert", "torch", "triton"}
