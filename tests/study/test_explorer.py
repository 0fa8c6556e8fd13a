"""The φ explorer in a headless browser: it loads, a click changes the neighbours, no errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastphi.study import explorer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a headless browser (Debian: apt-get install chromium)"
)
# Errors end up in the document, where the test reads them; so do the outcomes of clicks.
WATCH = """<script>
document.documentElement.dataset.errors = "";
window.addEventListener("error", e => { document.documentElement.dataset.errors += e.message; });
console.error = (...m) => { document.documentElement.dataset.errors += m.join(" "); };
</script>"""
CLICKS = """<script>
function shown(id) { return [...document.querySelectorAll(`#${id} button`)].map(b => +b.dataset.image); }
sheet.decode().then(() => setTimeout(() => {
  const found = {first: shown("phi"), pixels: shown("pixels"), start: +document.body.dataset.chosen};
  const box = canvas.getBoundingClientRect(), [x, y] = place(7);
  const at = {clientX: box.left + x, clientY: box.top + y, bubbles: true};
  canvas.dispatchEvent(new MouseEvent("click", at));
  found.clicked = +document.body.dataset.chosen;
  found.second = shown("phi");
  document.querySelector("#phi button").click();
  found.neighbour = +document.body.dataset.chosen;
  found.channels = [...document.querySelectorAll("#channels .row")].map(r => +r.dataset.channel);
  found.exciting = [...document.querySelectorAll("#channels .row:nth-of-type(1) button")].length;
  document.body.dataset.found = JSON.stringify(found);
}, 100));
</script></body>"""


@pytest.fixture(scope="module")
def content():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    phi = rng.random((40, 16)) * 0.1 + np.eye(16)[labels]
    images = rng.random((40, 3, 16, 16)).astype(np.float32)
    places = np.stack([np.arange(40) % 8 / 7, np.arange(40) // 8 / 4], axis=1)
    names = ["<b>a</b>", "b", "c", "</script>"]
    page = explorer.html(
        images,
        phi,
        images.reshape(40, -1),
        places,
        labels,
        names=[names[i] for i in labels],
        title="A title",
    )
    return page, phi, labels


def opened(page: str, path: Path, start: int) -> str:
    """The document after its scripts have run."""
    path.write_text(page.replace("<head>", "<head>" + WATCH).replace("</body>", CLICKS))
    options = (
        "--headless --no-sandbox --disable-gpu --window-size=1200,800 --virtual-time-budget=4000"
    )
    found = subprocess.run(
        [BROWSER, *options.split(), "--dump-dom", f"{path.as_uri()}#{start}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout


@needs_browser
def test_a_click_shows_the_image_and_its_neighbours(content, tmp_path):
    page, phi, labels = content
    document = opened(page, tmp_path / "explorer.html", 3)
    assert re.search(r'data-errors=""', document), document[:500]
    found = json.loads(re.search(r'data-found="([^"]*)"', document)[1].replace("&quot;", '"'))
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(40)
    assert found["start"] == 3 and found["clicked"] == 7
    assert found["first"] == np.argsort(-cosine[3])[:12].tolist() != found["pixels"]
    assert found["second"] == np.argsort(-cosine[7])[:12].tolist()
    assert found["neighbour"] == found["second"][0]
    assert len(found["channels"]) == 4 and found["exciting"] == 12
    assert labels[found["neighbour"]] == labels[7]


def test_the_page_stands_alone(content):
    page, _, _ = content
    assert "/*CONTENT*/" not in page and page.count("</script>") == 1  # names cannot end the script
    assert not re.findall(r'(?:src|href)="', page) and "http" not in page and "fetch(" not in page


def test_two_thousand_images_stay_under_15_mb():
    rng = np.random.default_rng(0)
    n = 2000
    small = rng.random((50, 3, 16, 16)).astype(np.float32)
    images = small.repeat(4, 2).repeat(4, 3) + 0.05 * rng.random((50, 3, 64, 64), np.float32)
    page = explorer.html(
        np.resize(images, (n, 3, 64, 64)),
        rng.random((n, 64)),
        rng.random((n, 8)),
        rng.random((n, 2)),
        np.zeros(n, int),
    )
    assert 1_000_000 < len(page) < 15_000_000
