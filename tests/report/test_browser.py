"""The page in a real browser: opens without a complaint, and every picture is seen, on a phone and on a desk."""

import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.report.folders import make_run
from v4train.report import compare, report
from v4train.report.figures import PICTURES
from v4train.report.figures_of_groups import GROUP_PICTURES
from v4train.report.figures_of_layers import LAYER_PICTURES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"phone": (390, 844), "desk": (1440, 900)}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: .[test] has it")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    runs = [make_run(base, "a_run_with_" + "_".join(["quite_a_long_name"] * 4)), make_run(base, "other", ("seed=2",))]
    of_run, of_both = report(runs[0], base / "one"), compare(runs, base / "both")
    of_each = {"recall", "mixing_gain"}  # the other pictures of groups need several seeds
    one, both = PICTURES | LAYER_PICTURES, PICTURES | GROUP_PICTURES
    return {"run": (of_run, len(one) + len(of_each & GROUP_PICTURES.keys())), "comparison": (of_both, len(both))}


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_the_page_opens_and_shows_every_picture(kind, device, browser, pages):
    path, number = pages[kind]
    width, height = WIDTHS[device]
    page = browser.new_page(viewport={"width": width, "height": height})
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url[:30]))
    page.goto(path.as_uri())
    pictures = page.locator("img")
    assert pictures.count() == number
    lefts = set()
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.is_visible() and picture.evaluate("p => p.complete && p.naturalWidth") > 600
        box = picture.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] >= 300
        lefts.add(round(box["x"]))
        seen = np.asarray(Image.open(BytesIO(picture.screenshot())).convert("L"), dtype=float)
        assert seen.std() > 5, picture.get_attribute("alt")  # of 255: not a blank
    assert len(lefts) == {"phone": 1, "desk": 2}[device]  # columns
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs out
    assert page.locator("#final").bounding_box()["y"] < pictures.first.bounding_box()["y"]
    assert complaints == []
    assert asked[0].startswith("file:") and all(url.startswith("data:") for url in asked[1:])
    page.close()
