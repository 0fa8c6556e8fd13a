"""`make demo` in its least form: with the denoiser that ships, and with one trained on the spot."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from PIL import Image

from fastphi.demo import demo
from fastphi.demo import patches as demo_patches


@pytest.mark.parametrize("train", [0, 2])
def test_the_demo_writes_its_report(tmp_path, monkeypatch, capsys, train):
    line = f"demo --out {tmp_path} --targets 2 --levels 2 --train {train}"
    monkeypatch.setattr(sys, "argv", line.split())
    monkeypatch.setattr(demo_patches, "MOST", 64)
    demo.main()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == (6 if train else 5) and "target 2" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "Done in" in capsys.readouterr().out


def test_own_photographs(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    (tmp_path / "photographs").mkdir()
    Image.fromarray(levels).save(tmp_path / "photographs/a.png")
    (tmp_path / "photographs/b.png").write_bytes(b"not a picture")
    images, name = demo_patches.whole(tmp_path / "out", tmp_path / "photographs", 64)
    assert len(images) >= 64 and images.size == 64 and "photographs" in name
    train, heldout, _ = demo_patches.apart(tmp_path / "b", tmp_path / "photographs", 32)
    assert len(train) > len(heldout) >= 64


def test_without_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"demo --out {tmp_path}/out --data {tmp_path}".split())
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert end.value.code == 2
    assert "is not a folder with a readable photograph in it" in capsys.readouterr().err
