"""The HTTP API as docs/api.md describes it, and requests by its OpenAPI schema: each gets an answer of the schema."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from page_lab import Colours, writable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from reid.extras.page import create_app


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_document(door, crop, tmp_path, monkeypatch, capsys):
    """The blocks of docs/api.md that need a server, with the address of one that runs."""
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    blocks = re.findall(r"runs it against a server -->\n```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(crop)
    Image.new("RGB", (300, 240)).save(tmp_path / "frame.jpg")
    monkeypatch.chdir(tmp_path)
    for language, code in blocks:
        code = code.replace("http://127.0.0.1:8000", door.url(""))
        if language == "python":
            exec(compile(code, "docs/api.md", "exec"), {})
            continue
        for line in code.splitlines():
            done = subprocess.run(f"{line} -fsS", shell=True, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.startswith("{"), (line, done.stderr)
    assert {language for language, _ in blocks} == {"bash", "python"}
    out = capsys.readouterr().out.splitlines()
    assert "384" in out and "anna 1" in out and out[-1] == "anna: 1 images erased, 37 left"


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_of_the_schema(index, uri, mode):
    app = create_app(Colours(), **writable(index, uri), allowed_hosts=["testserver"])
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    operations = [one for one in operations if mode == GenerationMode.POSITIVE or "parameters" in one.definition.raw]
    assert len(operations) >= 5
    unknown = [positive_data_acceptance]  # the schema says neither what an image is nor which images the gallery has
    for operation in operations:
        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate], database=None,
                  suppress_health_check=list(HealthCheck))
        def check(case):
            case.call_and_validate(excluded_checks=unknown)

        check()
