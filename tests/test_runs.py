"""Runs: one folder; killed at any moment it goes on, and ends where an unbroken one ends, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from emae._fit import fit, parameter_groups, rate_at
from emae._runs import create_run, difference, load_run, load_tensors, load_weights, save_tensors, write_whole


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """It takes seconds to load."""
    monkeypatch.setattr("emae._runs.Run._tensorboard", lambda self: None)


TIMES = {"seconds", "cpu_seconds", "steps_per_second"}


@pytest.fixture
def config():
    return tiny.pretrain_config(Path("em.h5"))


def new(folder, config, resume=False, overwrite=False, **record):
    values = {"kind": "pretrain", "voxel_size_nm": tiny.NM} | record
    return create_run(folder, config, resume=resume, overwrite=overwrite, **values)


# ---- the folder


def test_a_run_comes_back_from_its_folder(tmp_path, config):
    run = new(tmp_path / "run", config, threads_wanted=3)
    run.save_record(note="seen")
    again = load_run(tmp_path / "run")
    assert again.config == config and again.voxel_size_nm == tiny.NM
    assert again.record == json.loads(json.dumps(run.record))
    assert again.record["note"] == "seen" and again.record["code"].startswith("0.") and not again.finished
    values = json.loads((tmp_path / "run/config.json").read_text())
    assert values["crop"] == list(tiny.CROP) and values["model"]["encoder"]["width"] == 24
    finetuned = tiny.untrained_run(tmp_path / "two")
    finetuned.save_record(decoder={**finetuned.decoder.model_dump(), "threshold": 0.3})
    assert load_run(tmp_path / "two").decoder.threshold == 0.3 and finetuned.finished


def test_what_is_no_run_is_told(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="gone: no such run folder"):
        load_run(tmp_path / "gone")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"other: no run here \(config.json is missing\)"):
        load_run(tmp_path / "other")
    new(tmp_path / "run", config)
    path = tmp_path / "run/config.json"
    good = path.read_text()
    for text, wanted in [("{", "not JSON"), (good.replace('"hidden_ratio"', '"hiden_ratio"'), "did you mean"),
                         (good.replace('"pretrain"', '"training"'), "kind is 'training'")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=wanted) as error:
            load_run(tmp_path / "run")
        assert "config.json" in str(error.value)


def test_an_existing_run_is_refused(tmp_path, config):
    folder = tmp_path / "run"
    run = new(folder, config)
    (folder / "checkpoints/mine").write_text("x")
    with pytest.raises(FileExistsError, match="run: there is a run here already; --resume goes on"):
        new(folder, config)
    assert (folder / "checkpoints/mine").exists()
    assert new(folder, config, resume=True).record["created"] == run.record["created"]
    new(folder, config, overwrite=True)
    assert not (folder / "checkpoints/mine").exists()


def test_resume_with_another_configuration_names_the_difference(tmp_path, config):
    new(tmp_path / "run", config)
    other = config.model_copy(update={"hidden_ratio": 0.5, "schedule": tiny.schedule(4, rate=0.5)})
    with pytest.raises(ValueError, match="--resume with another configuration") as error:
        new(tmp_path / "run", other, resume=True)
    for text in ("hidden_ratio: 0.75 against 0.5", "schedule.rate: 0.003 against 0.5"):
        assert text in str(error.value)
    assert difference(config, config) == ""


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_touched(tmp_path, config, overwrite):
    """A folder of data with a config.json of somebody else's, and a file."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("thesis.tex", "config.json"):
        (folder / name).write_text("{}")
        with pytest.raises(FileExistsError, match="data"):
            new(folder, config, overwrite=overwrite)
        assert (folder / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        new(tmp_path / "file", config, overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    new(tmp_path / "empty", config)


def test_a_run_killed_while_it_was_made_goes_on(tmp_path, config, monkeypatch):
    """Whatever write of create_run is the last one: --resume, and a plain new start, find their way."""
    writes = []

    def dies(path, data, left):
        writes.append(path.name)
        if len(writes) > left:
            raise tiny.Stop
        write_whole(path, data)

    for left in range(2):
        folder = tmp_path / str(left)
        writes.clear()
        with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
            patch.setattr("emae._runs.write_whole", lambda path, data, left=left: dies(path, data, left))
            new(folder, config)
        (folder / "run.json.part").write_text("{")
        run = new(folder, config, resume=left == 0)
        assert load_run(folder).config == run.config == config
    assert len(writes) == 2, "create_run writes two files"


# ---- checkpoints


def model_and_optimiser(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def learn(model, optimiser, steps):
    for step in range(steps):
        model(torch.full((4, 3), float(step + 1))).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_checkpoints_hold_weights_and_optimiser(tmp_path, config):
    run = new(tmp_path / "run", config)
    model, optimiser = model_and_optimiser()
    assert run.load_checkpoint(model, optimiser) == 0
    for step in (2, 4, 6):
        learn(model, optimiser, 2)
        run.save_checkpoint(step, model, optimiser)
        run.report(step=step, loss=0.1 * step)
    assert [p.name for p in run.checkpoints()] == ["step_00000004.safetensors", "step_00000006.safetensors"]
    run.report(step=7, loss=0.0)  # past the checkpoint: reported again when the work goes on
    learn(model, optimiser, 3)
    other, other_optimiser = model_and_optimiser(1)
    assert load_run(tmp_path / "run").load_checkpoint(other, other_optimiser) == 6
    learn(other, other_optimiser, 3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert [m["step"] for m in run.metrics()] == [2, 4, 6]
    run.close()


@pytest.mark.parametrize("keep", [0, 7, 100, -20, -1])
def test_a_half_written_checkpoint_is_never_loaded(tmp_path, config, keep):
    run = new(tmp_path / "run", config)
    model, optimiser = model_and_optimiser()
    run.save_checkpoint(3, model, optimiser)
    wanted = model.weight.detach().clone()
    learn(model, optimiser, 2)
    run.save_checkpoint(5, model, optimiser)
    newest = run.checkpoints()[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:keep])
    (newest.parent / "step_00000009.safetensors.part").write_bytes(whole)
    other, other_optimiser = model_and_optimiser(1)
    assert run.load_checkpoint(other, other_optimiser) == 3
    assert torch.equal(other.weight, wanted)
    with pytest.raises(ValueError, match="step_00000005.safetensors: not a whole safetensors file"):
        load_tensors(newest)


@pytest.mark.parametrize("last", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, last):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, last, full)
        with pytest.raises(OSError, match="No space left"):
            save_tensors(path, {"a": torch.zeros(3)}, {})
    assert load_tensors(path)["a"].tolist() == [1, 1, 1]
    save_tensors(path, {"a": torch.zeros(3)}, {})
    assert load_tensors(path)["a"].tolist() == [0, 0, 0]


def test_a_torn_line_of_metrics_is_dropped(tmp_path, config):
    run = new(tmp_path / "run", config)
    run.report(step=1, loss=0.5)
    run.close()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 0.5}]
    model, optimiser = model_and_optimiser()
    run.save_checkpoint(2, model, optimiser)
    assert run.load_checkpoint(model, optimiser) == 2
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_weights_of_another_architecture_are_named(tmp_path):
    model = nn.Linear(3, 2)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    load_weights(model, good, Path("w"))
    for weights, wanted in [
        ({"weight": good["weight"]}, "w: a checkpoint of another architecture: missing bias"),
        ({**good, "extra": torch.ones(1)}, "unexpected extra"),
        ({**good, "weight": torch.ones(2, 4)}, r"weight: \(2, 4\) for \(2, 3\)"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            load_weights(model, weights, Path("w"))


# ---- fit


def test_rate_by_hand():
    schedule = tiny.schedule(12, rate=2.0, warmup=4)
    rates = [rate_at(i, schedule) for i in range(12)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0]) and rates[8] == pytest.approx(1.0)
    assert 0 < rates[11] < 0.1
    assert rate_at(0, tiny.schedule(1, rate=2.0, warmup=0)) == 2.0


def test_decay_for_matrices_only_and_a_lower_rate_for_the_encoder():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = parameter_groups(model, tiny.schedule(1, weight_decay=0.3), encoder_rate=0.1)
    found = {id(p): (g["weight_decay"], g["share"]) for g in groups for p in g["params"]}
    assert found == {id(model["encoder"].weight): (0.3, 0.1), id(model["encoder"].bias): (0.0, 0.1),
                     id(model["head"].weight): (0.3, 1.0), id(model["head"].bias): (0.0, 1.0)}  # fmt: skip


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("at", [4, 6, 8])
def test_a_loss_that_is_not_finite_is_told_and_never_saved(tmp_path, config, broken, at):
    """Reports every 5 steps, checkpoints every 3: no checkpoint may hold what a NaN did to the weights."""
    run = new(tmp_path / "run", config)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step(i):
        out = model(torch.ones(2, 3)).square().mean()
        if i + 1 == at:
            out = out * float("nan") if broken == "loss" else out + (0.0 * model.weight.sum()).sqrt()
        return {"loss": out}

    with pytest.raises(ArithmeticError, match="run: the (loss|gradient norm) is nan near step"):
        fit(model, step, lambda done: {}, tiny.schedule(20), run, say=tiny.quiet)
    run.close()
    assert not run.finished and run.checkpoints()
    for path in run.checkpoints():
        assert all(torch.isfinite(t).all() for t in load_tensors(path).values()), path
    assert run.checkpoints()[-1].name == f"step_{(at - 1) // 3 * 3:08d}.safetensors"
    assert all(m["loss"] == m["loss"] for m in run.metrics())


def test_gradients_are_clipped_and_reported(tmp_path, config):
    run = new(tmp_path / "run", config)
    model = nn.Linear(1, 1)
    fit(model, lambda i: {"loss": 1000 * model(torch.ones(1, 1)).square().mean(), "other": torch.tensor(float(i))},
        lambda done: {"held_out_loss": float(done)}, tiny.schedule(5, report_every=5, checkpoint_every=5), run,
        say=tiny.quiet)  # fmt: skip
    run.close()
    first, last = run.metrics()
    assert first["other"] == 2.0 and first["gradient_norm"] > 1 and first["step"] == 5, "means since the last report"
    assert last == {"step": 5, "held_out_loss": 5.0}


# ---- kill -9

SCRIPT = """
import json, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny, torch
torch.set_num_threads(1)
import emae._finetune, emae._pretrain, emae._runs
from emae._finetune import finetune
from emae._pretrain import pretrain
emae._runs.Run._tensorboard = lambda self: None
emae._pretrain.HELD_OUT_CROPS = emae._finetune.HELD_OUT_CROPS = 2
emae._finetune.calibrate = lambda *args, **kwargs: None  # slow, and has a test of its own
folder, verb = Path({folder!r}), {verb!r}
path = tiny.write_phantom(folder)
steps = 36
augmentation = tiny.Augmentation(missing_section=0.2, blur=0.3)

def work(out):
    if verb == "pretrain":
        pretrain(tiny.pretrain_config(path, steps), out, resume=True, say=tiny.quiet)
    else:
        finetune(tiny.finetune_config(path, steps, augmentation=augmentation), out, start="scratch", resume=True,
                 say=tiny.quiet)

def forked(out, patience=None, checkpoints=0):
    pid = os.fork()
    if pid == 0:
        try:
            work(out)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if patience is not None:
        before = progress(out)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if progress(out) >= before + 3 * checkpoints:
                time.sleep(patience)
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        else:
            return True
    return os.waitpid(pid, 0)[1] == 0

def progress(out):
    return max((int(p.stem[5:]) for p in out.glob("checkpoints/*.safetensors")), default=0)

began = time.perf_counter()
assert forked(folder / "unbroken")
length = time.perf_counter() - began
rng, places = random.Random({seed}), []
# twice while it sets up, three times within the tenth of a second after one or two more checkpoints
for patience, checkpoints in [(0.1 * length, 0), (0.1, 1), (0.1, 2), (0.3 * length, 0), (0.1, 1)]:
    if forked(folder / "broken", patience * rng.random(), checkpoints):
        break
    places.append(progress(folder / "broken"))
assert forked(folder / "broken")
print(json.dumps(places))
"""


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(tmp_path, verb):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), verb=verb, seed=os.getpid())
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])
    assert len(set(places) - {0}) >= 2, f"killed after these checkpoints: {places}"
    one, two = load_run(tmp_path / "unbroken"), load_run(tmp_path / "broken")
    a, b = load_tensors(one.weights), load_tensors(two.weights)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name

    def without_times(run):
        return [{k: v for k, v in m.items() if k not in TIMES} for m in run.metrics()]

    assert without_times(one) == without_times(two)
    assert [p.name for p in two.checkpoints()][-2:] == [p.name for p in one.checkpoints()]
    seconds = [m["seconds"] for m in two.metrics() if "seconds" in m]
    assert seconds == sorted(seconds), "time goes on where it stopped"
