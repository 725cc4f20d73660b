"""pyproject.toml: the built wheel holds the whole package, works outside of the checkout, and declares what it imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import reid

# Third-party modules that a declared distribution always brings along.
BROUGHT_BY = {"starlette": "fastapi", "grpc": "pymilvus", "jinja2": "torch", "markupsafe": "torch", "filelock": "torch"}
OPTIONAL = {"psutil", "pynvml"}  # used where they are installed: MLflow's log of CPU and GPU load


def declared(root):
    """Names of the distributions in requirements.txt and in the extras, without `dev`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "requirements.txt").read_text().splitlines()
    for extra, requirements in project["optional-dependencies"].items():
        lines += requirements if extra != "dev" else []
    return {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines if line and not line.startswith("#")}


def test_every_third_party_import_is_declared(root):
    names = declared(root) | OPTIONAL
    files = [*(root / "reid").rglob("*.py"), *root.glob("*.py")]
    local = {"reid", *(file.stem for file in root.glob("*.py"))}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else modules
            for module in {module.split(".")[0] for module in modules} - local - sys.stdlib_module_names:
                distribution = {"PIL": "pillow"}.get(module, BROUGHT_BY.get(module, module))
                assert distribution in names, f"{file.relative_to(root)} imports {module}: declare it in pyproject.toml"


def test_the_citation_has_the_version_of_the_package(root):
    text = (root / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == reid.__version__
    assert f"## {reid.__version__}" in (root / "CHANGELOG.md").read_text()


def test_the_wheel_is_complete_and_works_outside_of_the_checkout(root, tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 is not installed")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(root / "reid", source / "reid", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("human_reid-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
        packed = {name for name in archive.namelist() if name.startswith("reid/")}
    files = (path for path in (source / "reid").rglob("*") if path.is_file())
    assert packed == {path.relative_to(source).as_posix() for path in files}

    code = "import reid, reid.data.names; print(reid.__file__, reid.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(out)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, version = done.stdout.split()
    assert path == str(out / "reid/__init__.py") and wheel.name.startswith(f"human_reid-{version}-")
