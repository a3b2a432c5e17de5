"""What holds for the source of every kernel."""

import ast
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def loads(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            yield node


def test_every_masked_load_names_what_stands_for_the_rest():
    seen = 0
    for file in sorted(KERNELS.glob("*.py")):
        for call in loads(ast.parse(file.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in call.keywords}
            masked = "mask" in given or len(call.args) > 1
            assert not masked or "other" in given, f"{file.name}:{call.lineno}"
            seen += masked
    assert seen > 40
