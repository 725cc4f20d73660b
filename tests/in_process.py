"""Run the command line of a script in this process, which takes 0.1 s where a process of its own takes one."""

import importlib
import sys

import pytest

from reid import cli


class Here:
    """Call it with the name of a script and its arguments; returns (exit status, stdout, lines of stderr)."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name, *args):
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as end:
            cli.run(module.get_args_parser(), module.main)
        out, err = self.capsys.readouterr()
        return end.value.code, out, err.strip().splitlines()

    def works(self, name, *args, status=0):
        """Require an exit status, and return stdout and the lines of stderr."""
        found, out, lines = self(name, *args)
        assert found == status, (found, lines)
        return out, lines

    def refused(self, name, *args):
        """Require one line of error, and return it."""
        status, _, lines = self(name, *args)
        assert status in (1, 2) and lines[-1].startswith(f"{name}.py: error: "), lines
        return lines[-1]
