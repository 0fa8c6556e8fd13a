"""`fastphi analyze`: every stage, the page, the numbers; resumed where it stopped."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
import torch
from study_case import TINY

import fastphi
from fastphi import study
from fastphi.analysis.common import Result
from fastphi.data import MemoryImages
from fastphi.study import Study, claims, material, record, stages

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(64) % 4
    colour = torch.rand(4, 3, 1, 1, generator=generator)[labels]
    x = 0.5 * colour + 0.5 * torch.rand(64, 3, 16, 16, generator=generator)
    return MemoryImages(x, labels)


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(material, "LEVEL_DRAWS", 2)


def test_a_study_goes_on_where_it_stopped(make_model, images, tmp_path, monkeypatch):
    out = tmp_path / "study"
    model = make_model(channels=(4, 6, 12))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGES, "subspaces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Study(model, images, out, TINY, training=images).run()
    stored = out / "results" / "stability.npz"
    before = stored.stat().st_mtime_ns
    one = Study(model, images, out, TINY, training=images)
    results = one.run()
    assert list(results) == list(stages.STAGES)
    assert stored.stat().st_mtime_ns == before  # not measured again
    again = Study(model, images, out, TINY, training=images).run()
    assert {n: r.numbers() for n, r in again.items()} == {
        n: r.numbers() for n, r in results.items()
    }


def test_without_labels_or_training_images(make_model, images, tmp_path):
    plain = MemoryImages(images.batch(range(64)))
    one = Study(make_model(), plain, tmp_path, TINY)
    assert list(one.run(["map"])) == ["map"]
    with pytest.raises(ValueError, match="stages: expected one of .*; got 'nothing'"):
        one.run(["nothing"])
    missing = {"neighbours", "probe", "memorisation"}
    assert all(stages.STAGES[name](one) is None for name in missing)


def test_another_study_is_not_overwritten(make_model, images, tmp_path):
    Study(make_model(), images, tmp_path, TINY)
    with pytest.raises(ValueError, match="out: .* holds a study of another model"):
        Study(make_model(seed=1), images, tmp_path, TINY)
    with pytest.raises(ValueError, match="images: 10 images, an analysis needs at least 40"):
        Study(make_model(), torch.rand(10, 3, 16, 16), tmp_path / "b", TINY)


def test_results_on_disk_are_what_they_were(tmp_path):
    from fastphi.analysis.stability import Stability, stability

    rng = np.random.default_rng(0)
    means = {s: {"mid": rng.random((5, 3)), "enc1": rng.random((5, 2))} for s in (0.1, 0.5, 1.0)}
    result = stability(means, controls={"untrained": means})
    record.save(result, tmp_path / "r.npz")
    found = record.load(tmp_path / "r.npz", {"Stability": Stability})
    assert isinstance(found, Stability) and found.numbers() == result.numbers()
    np.testing.assert_array_equal(found.same["mid"], result.same["mid"])
    (tmp_path / "r.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a whole result"):
        record.load(tmp_path / "r.npz", {})


def test_claims_are_judged_by_their_rules():
    """One word per verdict; a rule never contradicts the milder one of the same claim."""
    assert len({c.name for c in claims.CLAIMS}) == len(claims.CLAIMS) >= 20

    class Found(Result):
        value = 0

    def claim(full, partial):
        return claims.Claim(
            "c", "n", "t", "r", "w", lambda r: full, lambda r: partial, lambda r: "1"
        )

    words = [claim(*c).verdict(Found()) for c in ((True, True), (False, True), (False, False))]
    assert words == ["reproduced", "weaker", "not reproduced"]


def test_the_rules_are_those_that_were_written_down():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "reproduction.md").read_text()
    for claim in claims.CLAIMS:
        for words in (claim.text, claim.rule, claim.weaker):
            assert words.replace("|", "\\|") in text, words


def test_analyze_command(make_model, images, tmp_path, monkeypatch, capsys):
    from fastphi.cli import main as cli

    x = (images.batch(range(64)) * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", images=x, labels=images.labels)
    fastphi.pack(tmp_path / "x.npz", tmp_path / "pack", size=16, key="images", progress=False)
    fastphi.save(make_model(channels=(4, 6, 12)), tmp_path / "m.safetensors")
    monkeypatch.setattr(study, "QUICK", TINY)
    line = f"analyze {tmp_path}/m.safetensors {tmp_path}/pack {tmp_path}/out --quick --limit 50"
    cli.main([*line.split(), "--training", f"{tmp_path}/pack"])
    assert "explorer of 50 images" in capsys.readouterr().out
    out = tmp_path / "out"
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for claim in claims.CLAIMS:
        assert html.escape(claim.text) in page
    numbers = json.loads((out / "numbers.json").read_text())
    words = {"reproduced", "weaker", "not reproduced"}
    assert len(numbers["verdicts"]) == len(claims.CLAIMS)
    assert {v["verdict"] for v in numbers["verdicts"]} <= words
    figures = sorted(p.suffix for p in (out / "figures").iterdir())
    assert figures.count(".png") == figures.count(".pdf") == page.count("<figure>") > 15
    assert (out / "explorer.html").stat().st_size > 1000
