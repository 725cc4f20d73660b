"""README.md: its commands exist as written, its quickstart works, and its links lead somewhere."""

import re
import shlex

import pytest

import data_prep
import eval as evaluate
import inference
import train

PARSERS = {"train.py": train, "eval.py": evaluate, "inference.py": inference, "data_prep.py": data_prep}


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def commands(text):
    """Every line of the bash blocks that calls one of our scripts: (script, arguments)."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for script, rest in re.findall(r"python (\w+\.py)([^;&|]*)", line.split(" #")[0]):
                yield script, shlex.split(rest)


def test_there_is_something_to_test(readme):
    assert len(list(commands(readme))) >= 12


def test_every_command_line_is_understood(readme, root):
    experiments = (root / "EXPERIMENTS.md").read_text().replace("$lr", "0.1").replace("$wd", "1e-4").replace("$seed", "1")
    for script, arguments in [*commands(readme), *commands(experiments)]:
        if script in PARSERS:
            PARSERS[script].get_args_parser().parse_args(arguments)
        assert (root / script).exists()


def test_links_and_pictures_are_there(readme, root):
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert target.startswith("http") or (root / target).exists(), target
    for path in re.findall(r"`((?:reid|benchmarks|docs|assets|models|tests)/[\w./-]+\.\w+)`", readme):
        if "<" not in path and "*" not in path:
            assert (root / path).exists(), path


def test_the_two_commands(readme, root):
    for name in ("quickstart command", "test command"):
        block = re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", readme, re.DOTALL).group(1)
        assert len(block.strip().splitlines()) == 1 and "python3 -m venv" in block
    assert "bash quickstart.sh" in readme
