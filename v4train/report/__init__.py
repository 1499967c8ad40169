"""Pictures and one self-contained page of a run, or of several beside each other, from what their folders hold.

<out>/  index.html (pictures inside, no scripts, nothing from a network)  <picture>.png
"""

from pathlib import Path

from v4train.report.differences import differences
from v4train.report.figures import PICTURES
from v4train.report.figures_of_groups import GROUP_PICTURES
from v4train.report.figures_of_layers import LAYER_PICTURES
from v4train.report.groups import groups_of
from v4train.report.page import Shown, write_page
from v4train.report.runs import Run, read_run
from v4train.report.style import save


def report(run_dir: Path, out: Path) -> Path:
    """Write the page of one run into the folder `out`; returns the page's path.

    Raises:
        ConfigError: `run_dir` holds no run. OSError: `out` can't be written.
    """
    run = read_run(Path(run_dir))
    return write_page(Path(out), [run], _draw([run], PICTURES | GROUP_PICTURES | LAYER_PICTURES, Path(out)))


def compare(run_dirs: list[Path], out: Path) -> Path:
    """Write a page of several runs, with what their configurations differ in, and those that differ in their seed only
    taken together; returns the page's path.

    A run without figures, one that failed for instance, is named and has no curves. Raises as `report` does.
    """
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    shown = _draw(runs, GROUP_PICTURES | PICTURES, Path(out))
    return write_page(Path(out), runs, shown, differences([run.config for run in runs]), groups_of(runs))


def _draw(runs: list[Run], pictures: dict, out: Path) -> list[Shown]:
    """Those of the pictures that there is something to draw of, as files in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, picture in pictures.items():
        figure = picture.draw(runs)
        path = out / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        save(figure, path)
        shown.append(Shown(picture.title, picture.caption, path))
    return shown
