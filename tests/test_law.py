"""The imports of the package run one way: scripts, then extras, then data, training and retrieval, then the shared modules.

The rules, for imports at the top of a module and inside functions alike:

- a module at the top of `reid/` imports no wing (`reid/__init__.py` may, on first use of a name);
- `data` imports neither `training` nor `retrieval`, and those two never import each other;
- only scripts import `extras`, and only inside functions; extras may import each other;
- nothing imports a script, and no modules import each other in a circle.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("data_prep", "train", "eval", "inference")
WINGS = ("data", "training", "retrieval", "extras")
FORBIDDEN = {None: {"data", "training", "retrieval"}, "data": {"training", "retrieval"},
             "training": {"retrieval"}, "retrieval": {"training"}}
HEAVY = ("torchvision", "mlflow", "tensorboard", "matplotlib", "scipy", "fastapi", "uvicorn", "openvino", "onnx", "onnxruntime",
         "pymilvus", "av")
LONGEST = 350  # lines of a file


def sources():
    """{module name: path} of the scripts and of the package."""
    found = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for path in sorted((ROOT / "reid").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def wing(module):
    """The wing of a module, None for the modules at the top of `reid/`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "reid" and len(parts) > 1 and parts[1] in WINGS else None


def imports(module, path, modules):
    """Yield (imported module, function that imports it or None) for every import of the project's own modules."""

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*base, *([child.module] if child.module else [])])
                names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in child.names]
            else:
                names = []
            yield from ((name, inside) for name in names if name in modules and name != module)
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text()), None)


def violations(modules):
    """One line for each import that breaks a rule, and for the modules of each circle."""
    edges = {}
    for module, path in modules.items():
        edges[module] = set()
        for target, function in imports(module, path, modules):
            if module == "reid" and function == "__getattr__":
                continue
            edges[module].add(target)
            line = f"{module} imports {target}"
            if target in SCRIPTS:
                yield line
            elif module in SCRIPTS:
                if wing(target) == "extras" and function is None:
                    yield f"{line} at its top"
            elif wing(module) != "extras" and wing(target) in FORBIDDEN[wing(module)] | {"extras"}:
                yield line
    yield from circles(edges)


def circles(edges):
    """A line for each largest set of modules that reach each other by imports."""
    reached = {module: reachable(module, edges) for module in edges}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in edges}
    yield from (f"circle of {', '.join(sorted(group))}" for group in groups if group)


def reachable(module, edges):
    """All modules that `module` imports, directly or through others; with itself only if it lies on a circle."""
    found, todo = set(), [module]
    while todo:
        new = edges[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_imports_run_one_way():
    assert not set(violations(sources()))


def test_a_broken_rule_is_found(tmp_path):
    files = {
        "train": "from reid.extras import page",
        "eval": "def main():\n    from reid.extras import page\nimport train",
        "reid": "def __getattr__(name):\n    from reid.data import names",
        "reid.files": "def f():\n    import reid.data.names",
        "reid.data.names": "from ..retrieval.index import x",
        "reid.training.a": "from reid.training import b",
        "reid.training.b": "def f():\n    from .a import x\n    from reid.retrieval import index",
        "reid.retrieval.index": "from reid.extras.page import x",
        "reid.extras.page": "from reid.training import b",
    }
    modules = {name: tmp_path / f"{name}.py" for name in files}
    for name, text in files.items():
        modules[name].write_text(text)
    assert set(violations(modules)) == {
        "train imports reid.extras.page at its top", "eval imports train", "reid.files imports reid.data.names",
        "reid.data.names imports reid.retrieval.index", "reid.training.b imports reid.retrieval.index",
        "reid.retrieval.index imports reid.extras.page",
        "circle of reid.extras.page, reid.retrieval.index, reid.training.a, reid.training.b",
    }


def test_files_are_short():
    lines = {module: len(path.read_text().splitlines()) for module, path in sources().items()}
    print(f"{sum(lines.values()):,} lines in {len(lines)} files of scripts and package")
    assert not {module: number for module, number in lines.items() if number > LONGEST}


@pytest.mark.parametrize("rows", [
    [("reid", ("torch", "numpy", "PIL", "reid.")), ("data_prep", ("reid.training.", "reid.retrieval.", "reid.extras.")),
     ("train", ("reid.retrieval.extract", "reid.retrieval.index", "reid.extras.")), ("reid.training.tracking", ())],
    [("inference", ("reid.training.", "reid.extras.")), ("eval", ("reid.training.", "reid.extras."))],
], ids=["train", "eval"])
def test_import_loads_nothing_that_it_may_not_need(rows):
    """rows: (module, what must not be loaded with it beside HEAVY). They are imported one after the other in one process."""
    lines = run_python("import importlib, sys\n" + "\n".join(
        f"importlib.import_module({module!r}); print(*sys.modules)" for module, _ in rows)).splitlines()
    for (module, unwanted), line in zip(rows, lines, strict=True):
        assert module in line.split()
        assert {name for name in line.split() for start in (*unwanted, *HEAVY)
                if f"{name}.".startswith(start.rstrip(".") + ".")} <= {"reid"}


def test_imports_leave_warnings_and_environment_alone():
    """Each module is imported twice: what other libraries change at their import they change the first time only."""
    done = run_python(f"""
import importlib, os, sys, warnings
environment, modules = dict(os.environ), {sorted(sources())}
for second in (False, True):
    for name in [name for name in sys.modules if name in modules]:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    for name in modules:
        warnings.filters[:] = []
        importlib.import_module(name)
        if second and warnings.filters:
            print("import", name, "changes warnings.filters")
        if second and dict(os.environ) != environment:
            print("import", name, "changes os.environ")
            os.environ.clear()
            os.environ.update(environment)
""")
    assert done == ""


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
