"""What test_cli.py and test_docs.py share: a lab's files and two small runs on them, made through the command line."""

import contextlib
import io
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from emae import cli

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for models this small a second thread only waits
SMALL = (
    "model.encoder.width=24 model.encoder.depth=1 model.encoder.heads=2 "
    "schedule.steps=4 schedule.batch=1 schedule.warmup=1"
)
"""settings that make any recipe a matter of seconds"""
SMALL_SEGMENTER = "model.channels=[8,8,8,8]"


def sets(*texts: str) -> list[str]:
    return [word for text in texts for setting in text.split() for word in ("--set", setting)]


def emae_command(*arguments) -> tuple[int, str, str]:
    """Run `emae ...` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def lab_files(folder: Path) -> None:
    """stack.tif: raw without a voxel size; stack.h5:raw: the same with it; cube.h5:labels: labels at offset 2,16,16."""
    from emae import PhantomConfig, make_phantom

    phantom = make_phantom(PhantomConfig(shape=(14, 128, 128), seed=7, missing_sections=0, shifted_sections=0))
    tifffile.imwrite(folder / "stack.tif", phantom.raw)
    with h5py.File(folder / "stack.h5", "w") as file:
        file["raw"] = phantom.raw
        file["raw"].attrs["voxel_size_nm"] = (40.0, 8.0, 8.0)
    with h5py.File(folder / "cube.h5", "w") as file:
        file["labels"] = phantom.labels[2:12, 16:112, 16:112].astype(np.uint32)
        file["valid"] = np.ones((10, 96, 96), np.uint8)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A folder with a lab's files, runs/mae and runs/seg trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("lab")
    lab_files(folder)
    (folder / "runs").mkdir()
    here = Path.cwd()
    os.chdir(folder)
    try:
        crop = sets(SMALL, "crop=[4,64,64]")
        code, _, err = emae_command("pretrain", "sections", "stack.h5:raw", "--out", "runs/mae", *crop)
        assert code == 0, err
        code, _, err = emae_command(
            "finetune", "sections", "stack.h5:raw", "cube.h5:labels", "--offset", "2,16,16", "--from", "runs/mae",
            "--out", "runs/seg", *crop, *sets(SMALL_SEGMENTER),
        )  # fmt: skip
        assert code == 0, err
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def in_lab(lab, monkeypatch):
    monkeypatch.chdir(lab)
    return lab
