"""SwanLab's dashboard shows the curves of a run, in a real browser."""

import importlib.util
import shutil

import numpy as np
import pytest
from conftest import ROOT, small_run
from PIL import Image


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_the_dashboard_draws_the_loss(pictures, wiki, cache_dir, tmp_path):
    if not any(map(shutil.which, pictures.BROWSERS)):
        pytest.skip(f"none of {', '.join(pictures.BROWSERS)} is installed")
    flags = ["local" if flag == "off" else flag for flag in small_run(cache_dir, tmp_path / "run")]
    wiki.main([*flags, "--eval_strategy", "no"])
    with pictures.dashboard(tmp_path / "run" / "swanlog") as address:
        page = f"{address}/experiment/1/chart"
        text = pictures.browse(page, "--dump-dom")
        pictures.photograph(page, tmp_path / "dashboard.png", 1280, 900)
    assert "train/loss" in text and "train/learning_rate" in text and text.count("<canvas") >= 6
    # The curve of the first chart is green and as wide as the chart: green in at least 200 of about 225 columns.
    pixels = np.asarray(Image.open(tmp_path / "dashboard.png").convert("RGB")).astype(int)[325:545, 365:600]
    green = (pixels[..., 1] > pixels[..., 0] + 20) & (pixels[..., 1] > pixels[..., 2] + 20)
    assert green.any(axis=0).sum() >= 200
