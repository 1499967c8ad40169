"""Every program says what it is for."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# launch/pretrain.py's is Hydra's own, not a docstring
PROGRAMS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "launch" / "evaluate.py", ROOT / "launch" / "generate.py"]


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_shows_how_it_is_started(path, option, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path.name, option])
    spec = importlib.util.spec_from_file_location(f"helped_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    try:
        module.main([option])
    except SystemExit as end:  # argparse's way
        assert end.code == 0
    out, errors = capsys.readouterr()
    assert f"python {path.parent.name}/{path.name}" in out and errors == ""
