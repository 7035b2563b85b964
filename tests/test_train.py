"""pretrain and finetune: what a run holds, what is carried over, what is refused. Tiny models, a few steps."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import emae._finetune as finetune_module
from emae._baselines import trivial_losses
from emae._config import override
from emae._datasets import is_here
from emae._finetune import finetune, resize_kernel, transfer
from emae._normalise import Normalisation
from emae._patches import patchify, sample_hidden
from emae._pretrain import imagine, load_mae, pretrain
from emae._runs import load_run, load_tensors, save_tensors
from emae._sampling import Source, open_cubes
from emae.models._mae import Mae
from emae.models._segmenter import Segmenter
from emae.recipes import recipe

BASELINES = ("visible_mean", "interpolation", "oracle_mean")


@pytest.fixture(scope="module")
def em(tmp_path_factory):
    return tiny.write_phantom(tmp_path_factory.mktemp("em"))


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch, request):
    """It takes seconds to load."""
    if "tensorboard" not in request.node.name:
        monkeypatch.setattr("emae._runs.Run._tensorboard", lambda self: None)


@pytest.fixture(scope="module")
def mae(em, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emae._runs.Run._tensorboard", lambda self: None)
        return pretrain(tiny.pretrain_config(em), tmp_path_factory.mktemp("runs") / "mae", say=tiny.quiet)


# ---- pretrain


def test_what_a_pre_training_leaves(em, tmp_path):
    said = []
    run = pretrain(tiny.pretrain_config(em, 8), tmp_path / "run", say=said.append)
    assert run.finished and run.voxel_size_nm == tiny.NM
    again = load_run(tmp_path / "run")
    assert again.config == run.config and again.record["kind"] == "pretrain"
    steps = [m["step"] for m in run.metrics() if "loss" in m]
    assert steps == [3, 5, 6, 8], "every 5 steps and at every checkpoint"
    looked = run.metrics()[-1]
    assert set(looked) == {"step", "held_out_loss", *(f"held_out_{b}" for b in BASELINES)}, "loss beside baselines"
    assert all(np.isfinite(v) and v > 0 for v in looked.values())
    assert looked["held_out_oracle_mean"] < looked["held_out_visible_mean"]
    picture = Image.open(tmp_path / "run/pictures/step_00000008.png")
    assert min(picture.size) > 100 and np.asarray(picture).std() > 20
    assert [p.name[-20:-12] for p in run.checkpoints()] == ["00000006", "00000008"]
    assert any("steps/s" in s and "min left" in s for s in said) and any("interpolation" in s for s in said)
    header = (tmp_path / "run/weights.safetensors").read_bytes()[:200000]
    assert b'"config"' in header and b"hidden_ratio" in header
    pretrain(tiny.pretrain_config(em, 8), tmp_path / "run", resume=True, say=said.append)
    assert "finished already" in said[-1]
    with pytest.raises(FileExistsError, match="--resume goes on"):
        pretrain(tiny.pretrain_config(em, 8), tmp_path / "run", say=tiny.quiet)


def test_pre_training_is_a_function_of_its_configuration(em, mae, tmp_path):
    torch.manual_seed(99)
    again = pretrain(tiny.pretrain_config(em), tmp_path / "again", say=tiny.quiet)
    other = pretrain(tiny.pretrain_config(em, seed=1), tmp_path / "other", say=tiny.quiet)
    first, same, different = (load_tensors(r.weights) for r in (mae, again, other))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["encoder.embed.weight"], different["encoder.embed.weight"])
    assert mae.metrics()[-1] == again.metrics()[-1]


def test_the_reported_numbers_are_those_of_held_out_raw(em, mae):
    """Once more by hand: 16 crops of the held-out volume, hidden by their own generators."""
    from emae._pretrain import STILL
    from emae._sampling import Crops, sample_generator

    model, config = load_mae(mae), mae.config
    cubes = open_cubes(config.held_out, config.normalisation, config.crop)
    assert cubes[0].raw.shape == (8, 64, 64)
    crops, losses = Crops(cubes, config.crop, STILL, 0), []
    for i in range(0, 16, 2):  # in batches, which weigh their voxels that are not blank
        raw = torch.stack([crops[i].raw, crops[i + 1].raw])[:, None]
        hidden = torch.stack([sample_hidden(32, 0.75, sample_generator(1, k)) for k in (i, i + 1)])
        with torch.no_grad():
            losses.append({"loss": model(raw, hidden, tiny.NM).item(), **trivial_losses(model, raw, hidden, tiny.NM)})
    looked = mae.metrics()[-1]
    for name in ("loss", *BASELINES):
        assert looked[f"held_out_{name}"] == pytest.approx(np.mean([x[name] for x in losses]), rel=1e-4)


def test_the_remedy_for_another_voxel_size(em, tmp_path):
    """What the refusal advises: pre-train on the volume resampled to the size of the labels."""
    config = override(tiny.pretrain_config(em, 1, held_out=(), crop=(4, 16, 16)), ["volumes.0.resample_nm=[40,16,16]"])
    assert pretrain(config, tmp_path / "run", say=tiny.quiet).voxel_size_nm == (40.0, 16.0, 16.0)


def test_without_held_out_raw_the_numbers_say_so(em, tmp_path):
    run = pretrain(tiny.pretrain_config(em, 2, held_out=()), tmp_path / "run", say=tiny.quiet)
    assert "training_loss" in run.metrics()[-1] and "held_out_loss" not in run.metrics()[-1]


def test_pre_training_learns(tmp_path):
    """A grating in y, the same in every section: after a few steps better than the mean of the visible voxels."""
    y = np.arange(64)[None, :, None] + np.zeros((12, 64, 64))
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["raw"] = np.uint8(128 + 100 * np.sin(y * np.pi / 8) + 9 * np.random.default_rng(0).random(y.shape))
    config = tiny.pretrain_config(tmp_path / "em.h5", schedule=tiny.schedule(
        40, rate=1e-2, report_every=1, validate_every=40, checkpoint_every=40))  # fmt: skip
    metrics = pretrain(config, tmp_path / "run", say=tiny.quiet).metrics()
    assert metrics[-1]["held_out_loss"] < 0.9 * metrics[-1]["held_out_visible_mean"]
    assert metrics[-1]["held_out_loss"] < 0.7 * metrics[0]["loss"]


def test_tensorboard_where_it_is_installed(em, tmp_path):
    pytest.importorskip("tensorboard")
    run = pretrain(tiny.pretrain_config(em, 1), tmp_path / "run", say=tiny.quiet)
    assert [p.name for p in (run.folder / "tensorboard").iterdir()][0].startswith("events.out.tfevents")


@pytest.mark.parametrize("target", ["pixels", "patch-normalised"])
def test_pictures_show_visible_patches_as_they_are(target):
    torch.manual_seed(0)
    model = Mae(tiny.MAE.model_copy(update={"target": target})).eval()
    x = torch.randn(2, 1, *tiny.CROP)
    hidden = torch.stack([sample_hidden(32, 0.75, torch.Generator().manual_seed(s)) for s in (1, 2)])
    black, imagined = (patchify(t, (2, 8, 8)) for t in imagine(model, x, hidden, tiny.NM))
    tokens = patchify(x, (2, 8, 8))
    assert torch.equal(imagined[~hidden], tokens[~hidden]) and torch.equal(black[~hidden], tokens[~hidden])
    assert bool((black[hidden] == -2).all())
    predicted = model.reconstruct(x, hidden, tiny.NM)[0].reshape(-1, 128)  # hidden tokens in the order of the mask
    if target == "patch-normalised":
        true = tokens[hidden]
        predicted = predicted * true.std(1, unbiased=False, keepdim=True) + true.mean(1, keepdim=True)
    torch.testing.assert_close(imagined[hidden], predicted.detach())


@pytest.mark.parametrize("values, wanted", [
    ({"crop": (4, 128, 128)}, "is larger than the volume"),
    ({"volumes": (Source(path="gone.h5:raw"),)}, "gone.h5"),
    ({"held_out": ("em", (40.0, 8.0, 11.0))}, "differ in voxel size by more than 1.25x"),
    ({"held_out": ("em", None)}, "does not state its voxel size"),
    ({"normalisation": Normalisation(percentiles=(0.0, 1e-6))}, "are equal"),
])
def test_everything_is_checked_before_work_starts(em, tmp_path, values, wanted):
    if "held_out" in values:
        values = {"held_out": (tiny.raw_of(em, voxel_size_nm=values["held_out"][1]),)}
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        pretrain(tiny.pretrain_config(em, **values), tmp_path / "run", say=tiny.quiet)
    assert not (tmp_path / "run").exists()


# ---- transfer


def segmenter(**values):
    torch.manual_seed(5)
    return Segmenter(tiny.SEGMENTER.model_copy(update=values), 4, tiny.NM)


def test_transfer_table():
    torch.manual_seed(0)
    weights, model = Mae(tiny.MAE).state_dict(), segmenter()
    head = model.head.weight.clone()
    moved = transfer(weights, model, tiny.VIT.patch)
    names = [k for k in weights if k.startswith("encoder.")]
    assert moved.matched == names and moved.coverage == 1 and not moved.resized + moved.missing + moved.unexpected
    assert all(torch.equal(model.state_dict()[k], weights[k]) for k in names) and torch.equal(model.head.weight, head)

    less = {k: v for k, v in weights.items() if k != "encoder.embed.weight"}
    less["encoder.norm.bias"] = torch.ones(25)
    less["encoder.blocks.7.up.weight"] = torch.ones(2)
    model = segmenter()
    before = model.encoder.embed.weight.clone()
    moved = transfer(less, model, tiny.VIT.patch)
    assert moved.missing == ["encoder.embed.weight", "encoder.norm.bias (25,) for (24,)"]
    assert moved.unexpected == ["encoder.blocks.7.up.weight"] and len(moved.matched) == len(names) - 2
    total = sum(v.numel() for k, v in weights.items() if k in names)
    assert moved.coverage == pytest.approx((total - 24 * 128 - 24) / total)
    assert torch.equal(model.encoder.embed.weight, before)
    text = str(moved)
    for part in ("matched", "missing       2", "unexpected    1", f"{moved.coverage:.1%}", "encoder.embed.weight"):
        assert part in text


def test_the_embedding_of_another_patch_is_resized():
    """A constant crop gives the tokens it gave; a ramp that the kernel averages still counts once."""
    torch.manual_seed(0)
    mae = Mae(tiny.MAE.model_copy(update={"encoder": tiny.VIT.model_copy(update={"patch": (2, 4, 4)})}))
    model = segmenter()
    moved = transfer(mae.state_dict(), model, (2, 4, 4))
    assert moved.resized == [f"encoder.embed.weight (2, 4, 4) to {tiny.VIT.patch}"] and moved.coverage == 1
    mine, theirs = model.encoder.embed, mae.encoder.embed
    ones = torch.ones(1, mine.in_features)
    torch.testing.assert_close(mine(ones), theirs(torch.ones(1, theirs.in_features)))
    kernel = torch.zeros(1, 32)
    kernel[0, 0] = 1.0  # the first voxel of its patch becomes the first corner of the larger one
    large = resize_kernel(kernel, (2, 4, 4), (2, 8, 8)).view(2, 8, 8)
    assert large[0, 0, 0] == large.max() and large[1].abs().max() == 0 and large[0, 4:].abs().max() == 0


def started(monkeypatch):
    """The model as finetune hands it to fit."""
    seen = []
    monkeypatch.setattr(finetune_module, "fit", lambda model, *args, **kw: seen.append(model) or tiny.stop())
    return seen


def test_scratch_and_pre_trained_begin_alike_but_for_the_encoder(em, mae, tmp_path, monkeypatch):
    seen, said = started(monkeypatch), []
    for name, start in (("scratch", "scratch"), ("mae", mae)):
        with pytest.raises(tiny.Stop):
            finetune(tiny.finetune_config(em), tmp_path / name, start=start, say=said.append)
    scratch, pre_trained = (m.state_dict() for m in seen)
    wanted = load_tensors(mae.weights)
    for name in scratch:
        if name.startswith("encoder."):
            assert torch.equal(pre_trained[name], wanted[name])
        else:
            assert torch.equal(pre_trained[name], scratch[name])
    assert not torch.equal(scratch["encoder.embed.weight"], wanted["encoder.embed.weight"])
    assert "transfer: 100.0% of the encoder's parameters filled" in said[-1]
    record = json.loads((tmp_path / "mae/run.json").read_text())
    assert record["transfer"]["coverage"] == 1 and record["start"] == str(mae.folder)
    assert json.loads((tmp_path / "scratch/run.json").read_text())["start"] == "scratch"


def other_mae(mae, folder, weights=None, **values):
    """A copy of the pre-training run with other weights or another configuration."""
    import shutil

    shutil.copytree(mae.folder, folder)
    if weights is not None:
        save_tensors(folder / "weights.safetensors", weights, {})
    config = json.loads((folder / "config.json").read_text())
    config["model"]["encoder"].update(values)
    (folder / "config.json").write_text(json.dumps(config))
    return load_run(folder)


def test_starts_that_are_refused(em, mae, tmp_path, monkeypatch):
    started(monkeypatch)
    config = tiny.finetune_config(em)
    weights = load_tensors(mae.weights)
    hollow = other_mae(mae, tmp_path / "hollow", {k: v for k, v in weights.items() if "blocks" not in k})
    with pytest.raises(ValueError, match="hollow: only .*% of the encoder would be filled, want 90% or more\ntransfer"):
        finetune(config, tmp_path / "out", start=hollow, say=tiny.quiet)
    for values, wanted in [({"width": 48}, "width: 48 there, 24 here"), ({"positions": "absolute"}, "positions"),
                           ({"wavelengths_nm": (8, 99)}, "wavelengths")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"a checkpoint of another architecture.*{wanted}"):
            finetune(config, tmp_path / "out", start=other_mae(mae, tmp_path / wanted[:4], **values), say=tiny.quiet)
    (hollow.folder / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="hollow: not finished; go on with emae pretrain --resume"):
        finetune(config, tmp_path / "out", start=hollow, say=tiny.quiet)
    seg = tiny.untrained_run(tmp_path / "seg")
    with pytest.raises(ValueError, match="seg: a finetune run; --from wants a pre-training run or scratch"):
        finetune(config, tmp_path / "out", start=seg, say=tiny.quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size, near", [((40.0, 8.0, 9.9), True), ((33.0, 6.5, 8.0), True), ((40.0, 8.0, 10.1), False),
                                        ((31.0, 8.0, 8.0), False)])  # fmt: skip
def test_another_voxel_size_needs_an_explicit_allowance(em, mae, tmp_path, monkeypatch, size, near):
    started(monkeypatch)
    cube = (tiny.labelled(em, raw=tiny.raw_of(em, voxel_size_nm=size)),)
    config = tiny.finetune_config(em, training=cube, validation=())
    if not near:
        with pytest.raises(ValueError) as error:
            finetune(config, tmp_path / "out", start=mae, say=tiny.quiet)
        for part in (str(tiny.NM), str(size), "--set volumes.0.resample_nm=[z,y,x]", "--any-voxel-size"):
            assert part in str(error.value)
    with pytest.raises(tiny.Stop):
        finetune(config, tmp_path / "out", start=mae, any_voxel_size=not near, say=tiny.quiet)
    with pytest.raises(tiny.Stop):
        finetune(config, tmp_path / "scratch", start="scratch", say=tiny.quiet)


# ---- finetune


def test_what_a_fine_tuning_leaves(em, mae, tmp_path):
    said = []
    run = finetune(tiny.finetune_config(em, 4), tmp_path / "run", start=mae, say=said.append)
    assert run.finished and "held_out_loss" in run.metrics()[-1]
    again = load_run(tmp_path / "run")
    table = again.record["threshold_table"]
    assert again.decoder.threshold in {row["threshold"] for row in table} and len(table) > 20
    best = min(row["criterion"] for row in table)
    chosen = [r for r in table if r["threshold"] == again.decoder.threshold]
    assert min(r["criterion"] for r in chosen) <= 1.02 * best + 1e-5
    assert "labels" in again.record["threshold_chosen_on"] and "0:12,0:64,0:64" in again.record["threshold_chosen_on"]
    assert any("chosen on held-out labels" in s for s in said)
    with pytest.raises(ValueError, match="run: was started from .*mae, not from scratch"):
        finetune(tiny.finetune_config(em, 4), tmp_path / "run", start="scratch", resume=True, say=tiny.quiet)
    weights = run.weights.read_bytes()
    finetune(tiny.finetune_config(em, 4), tmp_path / "run", start=mae, resume=True, say=tiny.quiet)
    assert run.weights.read_bytes() == weights


def test_killed_before_the_threshold_was_chosen(em, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        patch.setattr(finetune_module, "calibrate", tiny.stop)
        finetune(tiny.finetune_config(em, 1), tmp_path / "run", start="scratch", say=tiny.quiet)
    assert load_run(tmp_path / "run").decoder.threshold is None
    run = finetune(tiny.finetune_config(em, 1), tmp_path / "run", start="scratch", resume=True, say=tiny.quiet)
    assert run.decoder.threshold is not None


def test_without_validation_no_threshold_is_made_up(em, tmp_path):
    run = finetune(tiny.finetune_config(em, 1, validation=()), tmp_path / "run", start="scratch", say=tiny.quiet)
    assert run.decoder.threshold is None and not any("held_out_loss" in m for m in run.metrics())


def test_the_threshold_is_chosen_on_known_labels_only(em, tmp_path, monkeypatch):
    """A cube smaller than a crop, at an offset, with a valid mask and sparse sections; raw around it is read."""
    rng = np.random.default_rng(0)
    with h5py.File(em) as file:
        labels = file["labels"][3:6, 10:40, 20:44]
    path = tmp_path / "cube.h5"
    with h5py.File(path, "w") as file:
        file["labels"], file["valid"] = labels.astype(np.int32), (rng.random(labels.shape) < 0.5).astype(np.uint8)
        valid = file["valid"][...] != 0
    cube = tiny.labelled(em, labels=f"{path}:labels", valid=f"{path}:valid", offset_vx=(3, 10, 20), sections=(0, 2))
    seen = {}

    def choose(true, affinities, decoders, score, **values):
        seen.update(true=true, affinities=affinities, **values)
        raise tiny.Stop

    monkeypatch.setattr(finetune_module, "choose_decoder", choose)
    config = tiny.finetune_config(em, 1, validation=(cube,))
    with pytest.raises(tiny.Stop):
        finetune(config, tmp_path / "run", start="scratch", say=tiny.quiet)
    np.testing.assert_array_equal(seen["true"], labels)
    valid[1] = False
    np.testing.assert_array_equal(seen["valid"], valid)
    from emae._predict import predict

    whole = np.asarray(predict(load_run(tmp_path / "run"), open_cubes(
        (tiny.raw_of(em),), config.normalisation, config.crop)[0].raw))  # fmt: skip
    np.testing.assert_array_equal(seen["affinities"], whole[:, 3:6, 10:40, 20:44])
    assert seen["offsets"] == config.target.offsets and seen["voxel_size_nm"] == tiny.NM


def test_the_encoder_learns_at_its_own_rate(em, mae, tmp_path):
    run = finetune(tiny.finetune_config(em, 2, encoder_rate=0.0, validation=()), tmp_path / "run", start=mae,
                   say=tiny.quiet)  # fmt: skip
    before, after = load_tensors(mae.weights), load_tensors(run.weights)
    names = [k for k in after if k.startswith("encoder.")]
    assert all(torch.equal(before[k], after[k]) for k in names)
    torch.manual_seed(0)
    fresh = Segmenter(run.config.model, 4, tiny.NM).state_dict()
    assert not torch.equal(after["head.weight"], fresh["head.weight"])


def test_voxels_that_are_not_known_teach_nothing(em, tmp_path):
    """Labels changed where `valid` is 0 leave the very same weights."""
    with h5py.File(em) as file:
        labels = file["labels"][...]
    known = np.zeros(labels.shape, np.uint8)
    known[:, :40, :] = 1
    weights = []
    for k, filler in enumerate((0, 7)):
        path = tmp_path / f"{k}.h5"
        with h5py.File(path, "w") as file:
            file["labels"], file["valid"] = np.where(known, labels, filler), known
        cube = tiny.labelled(em, labels=f"{path}:labels", valid=f"{path}:valid")
        config = tiny.finetune_config(em, 2, training=(cube,), validation=())
        weights.append(load_tensors(finetune(config, tmp_path / str(k), start="scratch", say=tiny.quiet).weights))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# ---- real data, where it is

SMALL = ["model.encoder.width=24", "model.encoder.depth=1", "model.encoder.heads=2", "schedule.steps=1",
         "schedule.batch=1", "schedule.warmup=0"]  # fmt: skip


@pytest.mark.parametrize("name", ["fib25", "isbi2012"])
def test_recipes_on_real_data(name, tmp_path):
    needed = {"fib25": ("fib25", "fib25-unlabelled"), "isbi2012": ("isbi2012", "isbi2012-test")}[name]
    for data in needed:
        if not is_here(data):
            pytest.skip(f"the file of data set {data} is not here: set EMAE_DATA")
    config = override(recipe(name).pretrain(), [*SMALL, "model.decoder_depth=1", "model.decoder_width=24",
                                                "model.decoder_heads=2"])  # fmt: skip
    last = pretrain(config, tmp_path / "mae", say=tiny.quiet).metrics()[-1]
    assert all(np.isfinite(v) and v > 0 for v in last.values())
    assert last["held_out_oracle_mean"] < last["held_out_visible_mean"]
    finetuning = recipe(name).finetune()
    for sources, smaller in ((finetuning.training, False), (finetuning.validation, True)):
        for cube in open_cubes(sources, finetuning.normalisation, finetuning.crop, allow_smaller=smaller):
            assert cube.labels is not None and Path(cube.raw.name.split(":")[0]).suffix == ".h5"
