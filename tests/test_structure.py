"""Rules that keep the code simple: imports run downwards, every file is on the map."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "kernels": set(),
    "engine": {"kernels"},
    "adapters": {"kernels", "engine"},
    "server": {"adapters", "engine"},
    "ui": set(),  # speaks HTTP to the server, imports nothing of ours
}
ENGINE_LIBRARIES = {"torch", "triton", "numpy", "safetensors", "transformers"}


def imported_modules(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    return modules


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layer_imports_only_downwards(layer):
    paths = list((ROOT / layer).rglob("*.py"))
    assert paths
    for path in paths:
        upward = imported_modules(path) & MAY_IMPORT.keys() - MAY_IMPORT[layer] - {layer}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("layer", ["kernels", "engine"])
def test_lower_floors_need_few_libraries(layer):
    import sys

    for path in (ROOT / layer).rglob("*.py"):
        modules = imported_modules(path, top_level_only=True)
        foreign = modules - ENGINE_LIBRARIES - MAY_IMPORT.keys() - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_kernels_package_is_empty():
    # transformers looks for a PyPI package called kernels and imports ours when it finds it.
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_no_package_files_below_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_structure_page_names_every_source_file():
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    layers = [path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py")]
    missing = [path.name for path in layers if path.name != "__init__.py" and path.name not in page]
    assert not missing, f"docs/structure.md does not mention {missing}"
