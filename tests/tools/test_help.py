"""Every program says what it is for."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", TOOLS)
def test_help_shows_how_it_is_started(name, option, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option])
    spec = importlib.util.spec_from_file_location(f"helped_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    try:
        module.main([option])
    except SystemExit as end:  # argparse's way
        assert end.code == 0
    out, errors = capsys.readouterr()
    assert f"python tools/{name}.py" in out and errors == ""
