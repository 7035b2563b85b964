"""The command line: every verb on a lab's files, exit codes, what is said when something is wrong."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import SMALL, SMALL_SEGMENTER, emae_command, sets

import emae
from emae import _threads

CUBE = "stack.h5:raw cube.h5:labels --offset 2,16,16".split()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def neurons(lab):
    """affinities.zarr and neurons.zarr of the whole stack, by `segment`."""
    here = os.getcwd()
    os.chdir(lab)
    try:
        code, out, err = emae_command("segment", "runs/seg", "stack.h5:raw", "neurons.zarr")
    finally:
        os.chdir(here)
    assert code == 0, err
    assert "neurons.zarr" in out
    return lab / "neurons.zarr"


def test_predict_then_decode_is_segment(in_lab, neurons):
    assert emae_command("predict", "runs/seg", "stack.h5:raw", "affinities.zarr")[0] == 0
    code, out, _ = emae_command("decode", "affinities.zarr", "decoded.zarr")  # the run is named in the prediction
    assert code == 0 and "decoded.zarr" in out
    assert np.array_equal(emae.open_volume("decoded.zarr"), emae.open_volume(neurons))
    prediction = emae.open_volume("affinities.zarr")
    run = emae.load_run("runs/seg")
    assert np.array_equal(prediction, emae.predict(run, emae.open_volume("stack.h5:raw")))  # the same from Python
    assert prediction.voxel_size_nm == (40, 8, 8)
    for arguments, code in (("--threshold 0.9", 0), ("--run runs/seg --set min_size_vx=50", 0), ("--threshold 2", 2)):
        assert emae_command("decode", "affinities.zarr", "other.zarr", "--overwrite", *arguments.split())[0] == code


def test_score(in_lab, neurons):
    code, out, err = emae_command("score", "cube.h5:labels", "cube.h5:labels", "--json", "--no-relabel")
    assert code == 0, err
    assert json.loads(out)["adapted_rand_error"] == 0 and json.loads(out)["true_objects"] > 3
    arguments = ["neurons.zarr", "neurons.zarr", "--box", "2:12,16:112,16:112", "--valid", "neurons.zarr"]
    code, out, err = emae_command("score", *arguments, "--unpredicted", "drop", "--no-relabel")
    assert code == 0, err
    assert "adapted Rand error 0.0000" in out and f"over {np.count_nonzero(cut(neurons))} voxels" in out
    code, _, err = emae_command("score", "cube.h5:labels", "neurons.zarr")
    assert code == 2 and "(10, 96, 96)" in err and "(14, 128, 128)" in err


def cut(path):
    return np.asarray(emae.open_volume(path))[2:12, 16:112, 16:112]


def test_box_is_what_is_read(in_lab):
    arguments = ["runs/seg", "stack.tif", "corner.zarr", "--voxel-size", "40,8,8", "--box", "0:6,:,64:"]
    assert emae_command("predict", *arguments)[0] == 0
    assert emae.open_volume("corner.zarr").shape[1:] == (6, 128, 64)
    code, out, err = emae_command("decode", "corner.zarr", "corner_labels.zarr", "--box", ":,:64,:")
    assert code == 0, err
    assert emae.open_volume("corner_labels.zarr").shape == (6, 64, 64)


def test_baseline(in_lab):
    code, out, err = emae_command(
        "baseline", "stack.h5:raw", "classical.zarr", "--threshold", "0.4", "--box", "2:8,:,:"
    )
    assert code == 0, err
    raw = emae.open_volume("stack.h5:raw", box="2:8,:,:")
    config = emae.ClassicalConfig(agglomeration=emae.Agglomeration(threshold=0.4))
    assert np.array_equal(emae.open_volume("classical.zarr"), emae.segment_raw(raw, config))
    code, _, err = emae_command("baseline", "stack.h5:raw", "none.zarr")
    assert code == 2 and "--threshold" in err and not os.path.exists("none.zarr")


def test_data(in_lab):
    code, out, _ = emae_command("data", "list")
    assert code == 0 and all(name in out for name in emae.DATASETS)
    code, out, _ = emae_command("data", "show", "stack.h5:raw", "--labels", "stack.h5:raw", "--out", "stack.png")
    assert code == 0 and "14 x 128 x 128" in out
    with open("stack.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    code, _, err = emae_command("data", "show", "stack.h5:raw", "--out", "stack.png")
    assert code == 2 and "stack.png" in err
    assert emae_command("data", "show", "stack.tif")[0] == 0 and os.path.exists("stack.tif.png")
    assert "no picture" in emae_command("data", "show", "stack.tif")[2]  # and is not lost


def test_a_runs_own_configuration_repeats_it(in_lab):
    code, _, err = emae_command("pretrain", "runs/mae/config.json", "--out", "runs/again")
    assert code == 0, err
    first, second = (f"runs/{name}/weights.safetensors" for name in ("mae", "again"))
    from safetensors.numpy import load_file

    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    code, _, err = emae_command("finetune", "runs/mae/config.json", "--from", "scratch", "--out", "runs/none")
    assert code == 2 and "runs/mae/config.json" in err


def test_demo_is_the_function(monkeypatch):
    seen = []

    def demo(data, out, **more):
        seen.append((data, str(out), more["overwrite"]))
        return out / "index.html"

    monkeypatch.setattr(emae, "demo", demo)
    assert emae_command("demo")[1].strip() == "page: runs/demo/index.html"
    assert emae_command("demo", "--data", "fib25", "--out", "there", "--overwrite")[0] == 0
    assert seen == [("phantom", "runs/demo", False), ("fib25", "there", True)]


def test_every_verb_explains_itself():
    """With an example that begins with its own name."""
    verbs = "demo pretrain finetune predict decode segment score baseline".split()
    for words in [*([v] for v in verbs), ["data", "list"], ["data", "show"]]:
        code, out, err = emae_command(*words, "--help")
        text = " ".join(out.split())
        assert code == 0 and f"emae {' '.join(words)}" in text.split("Usage:")[1].split("]", 1)[1], err
    assert emae_command()[0] == 2  # no verb: the help, and not success


def test_held_out_labels(in_lab):
    """Without --held-out, the last fifth of the labelled sections; with it, those named."""
    config = emae.load_run("runs/seg").config
    assert config.training[0].sections == tuple(range(8)) and config.validation[0].sections == (8, 9)
    assert config.training[0].offset_vx == config.validation[0].offset_vx == (2, 16, 16)
    small = sets(SMALL, SMALL_SEGMENTER, "crop=[4,64,64]", "schedule.steps=1")
    code, _, err = emae_command("finetune", "sections", *CUBE, "--valid", "cube.h5:valid", "--held-out", "neurons.zarr",
                                "neurons.zarr", "--from", "scratch", "--out", "runs/held", *small)  # fmt: skip
    assert code == 2 and "neurons.zarr" in err  # there is no such file: it is what would be opened


WRONG = {
    "pretrain sectoins --out runs/x": "did you mean 'sections'",
    "pretrain sections --out runs/x --set schedule.stepz=3": "did you mean 'steps'",
    "pretrain sections --out runs/x --set crop=[4,64,65]": "does not divide a crop of (4, 64, 65)",
    "pretrain sections --out runs/x --box 0:8,:,:": "--set volumes.0.box",
    "pretrain sections stack.tif --out runs/x --set crop=[4,64,64]": "--voxel-size",
    "pretrain sections stack.tif --voxel-size 40,8 --out runs/x": "want three numbers z,y,x",
    "pretrain sections absent.h5:raw --out runs/x": "absent.h5",
    "pretrain sections stack.h5:rau --out runs/x": "raw",
    "pretrain sections stack.h5:raw --box 0:8,:,0:4000 --out runs/x": "128 voxels",
    "pretrain sections stack.h5:raw --out runs/x": "a crop of (8, 160, 160) is larger",
    "pretrain absent.json --out runs/x": "absent.json",
    "pretrain sections stack.h5:raw --out runs/mae --set crop=[4,64,64]": "--resume",
    "finetune sections stack.h5:raw --from scratch --out runs/x": "in pairs",
    "finetune sections stack.h5:raw cube.h5:labels --from scratch --out runs/x": "stack.h5",
    "finetune sections stack.h5:raw cube.h5:labels --offset 2,1 --from scratch --out runs/x": "want three numbers",
    "finetune sections stack.h5:raw cube.h5:labels --offset 9,16,16 --from scratch --out runs/x": "offset",
    "finetune sections --offset 9,16,16 --from scratch --out runs/x": "--set training.0",
    "finetune sections stack.h5:raw cube.h5:labels --from runs/absent --out runs/x": "runs/absent",
    f"finetune sections {' '.join(CUBE)} --set crop=[4,64,64] --from runs/seg --out runs/x": "pre-training run",
    "predict runs/mae stack.h5:raw x.zarr": "fine-tuned",
    "predict runs/seg stack.h5:raw nowhere/x.zarr": "nowhere",
    "predict runs/seg stack.h5:raw cube.h5": "cube.h5",
    "predict runs/seg stack.tif x.zarr --voxel-size 30,30,30": "--resample",
    "predict runs/seg phantom/tset x.zarr": "no split 'tset'",
    "decode stack.h5:raw x.zarr": "--run",
    "decode absent.zarr x.zarr --threshold 0.5": "absent.zarr",
    "score cube.h5:labels stack.tif --unpredicted far": "unpredicted",
    "segment runs/seg": "VOLUME",
    "segmint": "segmint",
    "data show fib26": "did you mean 'fib25'",
}


@pytest.mark.parametrize("command", WRONG)
def test_bad_input_is_exit_2_with_one_line(in_lab, command):
    code, out, err = emae_command(*command.split())
    assert code == 2, (code, out, err)
    assert WRONG[command] in " ".join(err.replace("│", " ").split()), err
    assert "Traceback" not in err and (err.startswith("emae: ") or "Usage: emae" in err)
    assert not os.path.exists("runs/x") and not os.path.exists("x.zarr")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "emae: failed: OSError: [Errno 28] No space left"),
        (MemoryError(), 1, "emae: failed: MemoryError"),
        (ArithmeticError("the loss is nan"), 1, "the loss is nan"),
        (RuntimeError("a slip"), 1, "a slip"),
        (AssertionError(), 1, "emae: failed: AssertionError"),
        (ValueError("file.h5: not ours"), 2, "emae: file.h5: not ours"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(in_lab, monkeypatch, error, code, words):
    def fails(**arguments):
        raise error

    monkeypatch.setattr(emae, "score", fails)
    got, _, err = emae_command("score", "cube.h5:labels", "cube.h5:labels")
    assert got == code and words in err and "Traceback" not in err
    if code == 1:
        with pytest.raises(type(error)):  # --debug, anywhere, lets it through
            emae_command("score", "cube.h5:labels", "cube.h5:labels", "--debug")
        monkeypatch.setenv("EMAE_DEBUG", "1")
        with pytest.raises(type(error)):
            emae_command("score", "cube.h5:labels", "cube.h5:labels")


def test_the_program_itself(in_lab):
    """In a process of its own: exit codes, one line on stderr, --version, Ctrl-C."""

    def emae_process(*arguments):
        return subprocess.run([sys.executable, "-m", "emae", *arguments], capture_output=True, text=True)

    assert emae_process("--version").stdout.strip() == f"emae {emae.__version__}"
    wrong = emae_process("score", "absent.h5:labels", "cube.h5:labels")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "absent.h5" in wrong.stderr
    assert shutil.which("emae", path=os.path.dirname(sys.executable)) is not None

    long = ["pretrain", "sections", "stack.h5:raw", "--out", "runs/long", *sets(SMALL, "crop=[4,64,64]")]
    long += sets("schedule.steps=100000 schedule.report_every=1 schedule.checkpoint_every=1")
    child = subprocess.Popen(
        [sys.executable, "-m", "emae", *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert [child.stdout.readline()[:7] for _ in range(2)] == ["step 1/", "step 2/"]  # so the first is checkpointed
    child.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err and time.monotonic() - started < 60
    assert list((in_lab / "runs/long/checkpoints").iterdir())  # and --resume would go on from there


def test_threads_follow_the_budget(tmp_path, monkeypatch):
    for name in ("EMAE_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # and as it was, after this test
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for text, threads in (("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert _threads.cpu_budget(tmp_path) == threads
    (tmp_path / "cpu.max").unlink()
    assert _threads.cpu_budget(tmp_path) == 8
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for text, threads in (("-1", 8), ("300000", 3)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{text}\n")
        assert _threads.cpu_budget(tmp_path) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _threads.cpu_budget(tmp_path) == 5
    monkeypatch.setenv("EMAE_THREADS", "2")
    assert _threads.limit_threads() == 2 and os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("EMAE_THREADS", "many")
    assert emae_command("data", "list")[0] == 2


def test_torch_takes_the_budget():
    code = "from emae._threads import limit_threads; limit_threads(); import torch; print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "EMAE_THREADS": "1"}},
        capture_output=True,
    )
    assert done.stdout.split() == [b"1"], done.stderr
