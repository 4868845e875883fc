"""The house holds its own lines: sizes, one-way imports, one place for each heavy library, no configuration that is
assigned to."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_DEPTH = 400, 70, 8
ONLY_IN = {
    "deepspeed": {"trainer.engine.zero"},
    "wandb": {"trainer.metrics.wandb.client"},
    "hydra": {"trainer.composition"},
}
DEEPSPEED_KEYS = {
    "zero_optimization",
    "gradient_clipping",
    "offload_optimizer",
    "train_micro_batch_size_per_gpu",
    "offload_param",
}
HEAVY = ("torch", "datasets", "transformers", "deepspeed", "wandb", "pyarrow", "tokenizers")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Modules imported by a file; `from a import b` counts as a.b where that is a module of ours, else as a."""
    ours = {module_name(file) for file in FILES}
    found = set()
    for node in outside_functions(tree(path)) if top_level_only else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in ours else node.module for a in node.names
            }
    return found


def outside_functions(module: ast.Module):
    """What runs on import: neither bodies of functions nor `if TYPE_CHECKING`."""
    pending = list(module.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        pending += list(ast.iter_child_nodes(node))


def graph() -> dict[str, set[str]]:
    names = {module_name(path) for path in FILES}
    return {module_name(path): (imports(path, top_level_only=True) & names) - {module_name(path)} for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


def test_imports_have_no_cycle_and_are_not_deep():
    edges = graph()
    depth: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> int:
        assert name not in path, " -> ".join((*path, name))
        if name not in depth:
            depth[name] = 1 + max((visit(below, (*path, name)) for below in edges[name]), default=0)
        return depth[name]

    for name in edges:
        visit(name, ())
    deepest = max(depth, key=depth.__getitem__)
    assert depth[deepest] <= MAX_DEPTH, f"{deepest} is {depth[deepest]} imports deep"


def test_trainer_never_imports_launch():
    for path in FILES:
        if module_name(path).startswith("trainer"):
            assert not any(name.split(".")[0] == "launch" for name in imports(path, top_level_only=False)), path


@pytest.mark.parametrize("library", ONLY_IN)
def test_each_framework_has_one_importer(library):
    users = {
        module_name(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path, top_level_only=False))
    }
    assert users == ONLY_IN[library]


def test_deepspeed_keys_are_spelled_in_one_file():
    for path in FILES:
        strings = {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        allowed = module_name(path) in ("trainer.engine.ds_config", "trainer.engine.zero", "trainer.config")
        assert allowed or not strings & DEEPSPEED_KEYS, path


def test_configuration_is_never_assigned_to():
    for path in FILES:
        for node in ast.walk(tree(path)):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AugAssign)
                else []
            )
            for target in targets:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    owner = ast.unparse(target.value)
                    assert owner.split(".")[0].split("[")[0] != "config", f"{path}:{node.lineno}"


def test_the_command_line_starts_without_heavy_libraries():
    """What `--help` and a refused configuration need to import."""
    edges = graph()
    reached, pending = set(), ["trainer.__main__", "trainer.plan"]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += edges[name]
    for path in FILES:
        if module_name(path) in reached:
            heavy = {name for name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY}
            assert not heavy, f"{module_name(path)} imports {heavy}"


def test_every_public_module_says_what_it_is_for():
    for path in FILES:
        assert ast.get_docstring(tree(path)), path
