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
    own = run.decoder.model_copy(update={"threshold": 0.9})
    assert emae_command("decode", "affinities.zarr", "other.zarr", "--threshold", "0.9")[2] == ""
    assert np.array_equal(emae.open_volume("other.zarr"), emae.decode(prediction, own))
    for arguments, code in (("--threshold 0.9", 0), ("--run runs/seg --set min_size_vx=50", 0), ("--threshold 2", 2)):
        assert emae_command("decode", "affinities.zarr", "other.zarr", "--overwrite", *arguments.split())[0] == code


@pytest.fixture
def predicted(in_lab, tmp_path, monkeypatch):
    """A prediction of a run of its own, whose decoder is not the default one, in another folder than the lab's."""
    shutil.copytree("runs/seg", tmp_path / "seg")
    record = json.loads((tmp_path / "seg/run.json").read_text())
    record["decoder"] |= {"fragments": "affinity", "cut": 0.99}  # which leaves next to nothing
    (tmp_path / "seg/run.json").write_text(json.dumps(record))
    shutil.copy("stack.h5", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert emae_command("predict", "seg", "stack.h5:raw", "a.zarr", "--box", "0:4,:64,:64")[0] == 0
    return tmp_path


def test_decode_takes_the_decoder_of_the_run_that_predicted(predicted, monkeypatch):
    (predicted / "elsewhere").mkdir()
    monkeypatch.chdir(predicted / "elsewhere")  # the run is named so that it is found from here
    affinities = emae.open_volume("../a.zarr")
    own = emae.load_run("../seg").decoder.model_copy(update={"threshold": 0.7})
    plain = emae.Agglomeration(threshold=0.7)
    assert not np.array_equal(emae.decode(affinities, own), emae.decode(affinities, plain))
    code, _, err = emae_command("decode", "../a.zarr", "own.zarr", "--threshold", "0.7")
    assert (code, err) == (0, "")
    assert np.array_equal(emae.open_volume("own.zarr"), emae.decode(affinities, own))

    (predicted / "seg").rename(predicted / "moved")
    code, _, err = emae_command("decode", "../a.zarr", "plain.zarr", "--threshold", "0.7")
    assert code == 0 and "is not there; decoded with the default settings" in err and "seg" in err
    assert np.array_equal(emae.open_volume("plain.zarr"), emae.decode(affinities, plain))
    code, _, err = emae_command("decode", "../a.zarr", "none.zarr")
    assert code == 2 and "give --run or --threshold" in err
    code, _, err = emae_command("decode", "../a.zarr", "again.zarr", "--threshold", "0.7", "--run", "../moved")
    assert np.array_equal(emae.open_volume("again.zarr"), emae.decode(affinities, own))


def test_decode_refuses_a_prediction_that_is_not_complete(predicted):
    state = json.loads((predicted / "a.zarr/emae_blocks.json").read_text())
    (predicted / "a.zarr/emae_blocks.json").write_text(json.dumps(state | {"done": []}))
    for name in ("a.zarr", "a.zarr:0", "a.zarr/0"):
        code, _, err = emae_command("decode", name, "x.zarr", "--threshold", "0.5")
        assert code == 2 and "not every block is predicted yet" in err, name
        with pytest.raises(ValueError, match="not every block is predicted yet"):
            emae.decode(emae.open_volume(name), emae.Agglomeration(threshold=0.5))  # from Python


def test_an_input_is_never_destroyed(in_lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack = emae.open_volume(in_lab / "stack.h5:raw", box="0:4,:64,:64")
    emae.create_volume("raw.zarr", stack.shape, np.uint8, (40, 8, 8), array=np.asarray(stack))
    (tmp_path / "link.zarr").symlink_to("raw.zarr")
    shutil.copytree(in_lab / "runs/seg", "seg")
    assert emae_command("predict", "seg", "raw.zarr", "a.zarr")[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    commands = []
    for out in ("raw.zarr", "./raw.zarr", "link.zarr", "raw.zarr/0", "raw.zarr/new.zarr"):
        commands += [f"predict seg raw.zarr {out}", f"segment seg raw.zarr {out}"]
        commands += [f"baseline raw.zarr {out} --threshold 0.4"]
    commands += ["decode a.zarr a.zarr --threshold 0.4", "decode a.zarr:0 a.zarr --threshold 0.4"]
    commands += ["predict seg raw.zarr:0 raw.zarr --resample", "baseline link.zarr raw.zarr --threshold 0.4"]
    for command in commands:
        code, _, err = emae_command(*command.split(), "--overwrite")
        assert code == 2 and ("input" in err or "never replaced" in err), (command, err)
    emae.create_volume("b_prediction.zarr", stack.shape, np.uint8, (40, 8, 8), array=np.asarray(stack))
    code, _, err = emae_command("segment", "seg", "b_prediction.zarr", "b.zarr", "--overwrite")
    assert code == 2 and "is the input b_prediction.zarr" in err
    assert np.array_equal(emae.open_volume("b_prediction.zarr"), stack)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert emae_command("predict", "seg", "raw.zarr", "a.zarr", "--overwrite")[0] == 0  # beside it is no matter


def test_segment_asks_the_run_first(in_lab, tmp_path):
    shutil.copytree("runs/seg", tmp_path / "seg")
    (tmp_path / "seg/weights.safetensors").rename(tmp_path / "weights")
    arguments = ["stack.h5:raw", "x.zarr"]
    code, _, err = emae_command("segment", "runs/mae", *arguments)
    assert code == 2 and "runs/mae: a pretrain run; prediction needs a fine-tuned one" in err
    code, _, err = emae_command("segment", tmp_path / "seg", *arguments)
    assert code == 2 and "not finished; go on with emae finetune --resume" in err
    (tmp_path / "weights").rename(tmp_path / "seg/weights.safetensors")
    record = json.loads((tmp_path / "seg/run.json").read_text())
    del record["decoder"]
    (tmp_path / "seg/run.json").write_text(json.dumps(record))  # killed between training and choosing
    code, _, err = emae_command("segment", tmp_path / "seg", *arguments)
    assert code == 2 and "before its threshold was chosen; go on with emae finetune --resume" in err
    assert not os.path.exists("x.zarr") and not os.path.exists("x_prediction.zarr")


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
    """Without --held-out, the last fifth of the labelled sections, behind a gap of 50 nm; with it, those named."""
    config = emae.load_run("runs/seg").config
    assert config.training[0].sections == tuple(range(6)) and config.validation[0].sections == (8, 9)  # 2 x 40 nm
    assert config.training[0].offset_vx == config.validation[0].offset_vx == (2, 16, 16)
    small = sets(SMALL, SMALL_SEGMENTER, "crop=[4,64,64]", "schedule.steps=1 schedule.warmup=0")
    code, _, err = emae_command("finetune", "sections", *CUBE, "--valid", "cube.h5:valid", "--held-out", "neurons.zarr",
                                "neurons.zarr", "--from", "scratch", "--out", "runs/held", *small)  # fmt: skip
    assert code == 2 and "neurons.zarr" in err  # there is no such file: it is what would be opened


@pytest.fixture
def asked(in_lab, monkeypatch):
    """emae finetune ..., up to the configuration it would train with."""

    def ask(*arguments):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(emae, "finetune", lambda config, *a, **k: seen.append(config) or emae.Run(in_lab, config))
            code, _, err = emae_command("finetune", "sections", *arguments, "--from", "scratch", "--out", "runs/x")
        assert (code, len(seen)) == (0, 1), err
        return seen[0]

    return ask


def test_held_out_labels_in_a_larger_volume(asked):
    """All of --held-out's own: offset, valid; the training's --box and --offset are not its."""
    where = "--held-out stack.h5:raw cube.h5:labels --held-out-offset 2,16,16 --held-out-valid cube.h5:valid".split()
    (held,) = asked(*CUBE, *where).validation
    assert (held.offset_vx, held.valid, held.raw.box) == ((2, 16, 16), "cube.h5:valid", None)
    raw, labels, valid = held.open()
    assert raw.shape == (14, 128, 128) and labels.shape == valid.shape == (10, 96, 96)
    (held,) = asked(*CUBE, *where[:3]).validation
    assert held.offset_vx is None and held.valid is None
    for wrong, words in ((where[3:5], "belong to --held-out"), (where[5:], "belong to --held-out"),
                         ([*where[:4], "2,16"], "--held-out-offset 2,16: want three")):  # fmt: skip
        code, _, err = emae_command("finetune", "sections", *CUBE, *wrong, "--from", "scratch", "--out", "runs/x")
        assert code == 2 and words in err


def test_box_of_labels_of_raws_own_shape(asked, lab):
    """The same box of both: crops of the pair hold the labels that lie there."""
    import h5py

    from emae._normalise import Normalisation
    from emae._sampling import open_cubes, read_crop

    ids = np.arange(1, 1 + 14 * 128 * 128, dtype=np.uint32).reshape(14, 128, 128)
    with h5py.File(lab / "whole.h5", "w") as file:
        file["labels"] = ids
        file["part"] = ids[3:13, :, 8:]
    pair, box = ["stack.h5:raw", "whole.h5:labels"], ["--box", "3:13,:,8:"]
    config = asked(*pair, *box, "--held-out", *pair)
    raw = emae.open_volume("stack.h5:raw")
    for labels in ("whole.h5:labels", "whole.h5:part"):  # and labels that have the box's shape are of the box
        (training,) = asked(pair[0], labels, *box, "--held-out", *pair).training
        (cube,) = open_cubes((training,), Normalisation(per="dtype"), (4, 32, 32))
        assert np.array_equal(cube.raw, raw[3:13, :, 8:])
        crop = read_crop(cube, emae.Box((0, 0, 0), cube.raw.shape))
        values = crop.labels.numpy()
        assert crop.valid.all() and np.array_equal(np.argsort(values.ravel()), np.arange(values.size))
        assert values.min() > 0
    (held,) = config.validation
    assert held.raw.box is None and held.offset_vx is None

    config = asked(*pair, "--box", "3:13,:,:")  # the last fifth is that of the box: 3 .. 12
    assert config.training[0].sections == tuple(range(3, 9)) and config.validation[0].sections == (11, 12)
    code, _, err = emae_command("finetune", "sections", *pair, *box, "--from", "scratch", "--out", "runs/x")
    assert code == 2 and "--held-out VOLUME LABELS" in err


WRONG = {
    "pretrain sectoins --out runs/x": "did you mean 'sections'",
    "pretrain sections --out runs/x": "give VOLUME after it",
    "pretrain isotropic --out runs/x": "give VOLUME after it",
    "finetune isotropic --from scratch --out runs/x": "give VOLUME LABELS after it",
    "pretrain phantom --out runs/x --set model.encoder.heads=48": "even head width of 6 or more",
    "pretrain phantom --out runs/x --set model.decoder_heads=48": "even head width of 6 or more",
    "pretrain phantom --out runs/x --set schedule.stepz=3": "did you mean 'steps'",
    "pretrain phantom --out runs/x --set crop=[4,64,65]": "does not divide a crop of (4, 64, 65)",
    "pretrain phantom --out runs/x --box 0:8,:,:": "--set volumes.0.box",
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
    "finetune sections stack.h5:raw cube.h5:labels --box 0:1,:,: --offset 0,16,16 --from scratch --out x": "few",
    "finetune phantom --offset 9,16,16 --from scratch --out runs/x": "--set training.0",
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
