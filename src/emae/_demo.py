"""demo: the whole path on one data set, ending with a page to look at."""

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from emae._config import nearest_name, override
from emae._datasets import DATASETS, open_labels, open_volume
from emae._decode import ClassicalConfig, choose_classical, classical_grid, decode, segment_raw
from emae._evaluate import score
from emae._experiments import Finetune, Pretrain
from emae._finetune import finetune
from emae._predict import predict
from emae._pretrain import pretrain
from emae._report import write_report
from emae._runs import Run, write_whole
from emae._segment import save_labels
from emae._volume import Volume
from emae.recipes import recipe

# A demo is a matter of minutes: what is shorter here than in the data set's own recipe, which is for results.
SHORT: dict[str, tuple[list[str], list[str]]] = {
    "phantom": ([], []),
    "fib25": (["schedule.steps=300", "schedule.warmup=30", "schedule.validate_every=100"],
              ["schedule.steps=150", "schedule.warmup=15", "schedule.validate_every=75"]),
    "isbi2012": (["schedule.steps=400", "schedule.warmup=40", "schedule.validate_every=100"],
                 ["schedule.steps=250", "schedule.warmup=25", "schedule.validate_every=125"]),
}
RUN_FILES = ("config.json", "run.json", "metrics.jsonl", "weights.safetensors")


def demo(data: str = "phantom", out: str | Path = "runs/demo", overwrite: bool = False, resume: bool = True,
         say: Callable[[str], None] = print) -> Path:
    """Pre-train, fine-tune from it and from scratch, segment the test volume, score; returns the page.

    data: phantom, or a data set with a recipe, neurons and a file here. out: the demo's folder, with the runs `mae`,
    `pretrained` and `scratch` in it and the page, `index.html`; it is itself a run to predict with (the pre-trained).
    Interrupted, it goes on where it was (resume), else an existing folder is refused, or replaced (overwrite).
    """
    if data not in SHORT:
        raise ValueError(f"--data {data}: no demo of it; {nearest_name(data, SHORT)}")
    out = Path(out)
    mae_config, config = experiments(data)
    test, truth = open_volume(f"{data}/test"), open_labels(f"{data}/test")
    state = State(out, data, resume=resume, overwrite=overwrite)

    with state.timed():
        say("== pre-training on unlabelled tissue")
        mae = pretrain(mae_config, out / "mae", resume=True, say=say)
    arms: dict[str, Run | Literal["scratch"]] = {"pretrained": mae, "scratch": "scratch"}
    for arm, start in arms.items():
        with state.timed():
            say(f"== fine-tuning, {'from it' if arm == 'pretrained' else 'from scratch'}")
            run = finetune(config, out / arm, start=start, resume=True, say=say)
        if arm not in state.results:
            with state.timed():
                labels = decoded(run, test, out / arm, say)
                state.keep(arm, score(true=truth, predicted=labels), run.decoder.threshold, say)
    if "classical" not in state.results:
        with state.timed() as started:
            say("== the classical baseline, its parameters chosen on the same held-out labels")
            classical, labels = classical_baseline(data, test)
            save_labels(labels, out / "classical.zarr", test, overwrite=True)
            state.keep("classical", score(true=truth, predicted=labels), classical.agglomeration.threshold, say,
                       config=classical.model_dump(mode="json"), seconds=time.perf_counter() - started)
    for name in RUN_FILES:
        shutil.copyfile(out / "pretrained" / name, out / name)
    state.describe(mae)
    return write_report(out)


def experiments(data: str) -> tuple[Pretrain, Finetune]:
    """The recipe's two configurations at the demo's size."""
    shorter = SHORT[data]
    return override(recipe(data).pretrain(), shorter[0]), override(recipe(data).finetune(), shorter[1])


def decoded(run: Run, test: Volume, folder: Path, say: Callable[[str], None]) -> np.ndarray:
    """Instances of the test volume by the run's own decoder; they and the affinities stay in `folder`."""
    affinities = predict(run, test, folder / "test_prediction.zarr", say=say)
    labels = decode(affinities, run.decoder)
    save_labels(labels, folder / "test.zarr", test, run, overwrite=True)
    return labels


def classical_baseline(data: str, test: Volume) -> tuple[ClassicalConfig, np.ndarray]:
    """Watershed and agglomeration on smoothed raw, its parameters the best of a grid on the validation labels."""
    held_out, labels = open_volume(f"{data}/validation"), np.asarray(open_labels(f"{data}/validation"))
    grid = [c for c in classical_grid(test.require_voxel_size()) if c.agglomeration.contact == "mean"]
    if data == "phantom":  # where the best of a wider grid lay, so that it takes seconds
        grid = [c.model_copy(update={"sigma_nm": sigma}) for c in grid[:2] for sigma in (16.0, 20.0, 24.0)]
    chosen, _ = choose_classical(labels, held_out, grid, score)
    return chosen, segment_raw(test, chosen)


class State:
    """demo.json: what is done and how it went, written after every stage."""

    def __init__(self, out: Path, data: str, *, resume: bool, overwrite: bool):
        self.out, self.path = out, out / "demo.json"
        self.values: dict[str, Any] = {"data": data, "results": {}, "seconds": 0.0}
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not self.path.is_file():
                raise FileExistsError(f"{out}: exists and is no demo of ours; choose another --out")
            there = json.loads(self.path.read_text())
            if overwrite:
                shutil.rmtree(out)
            elif not resume or there["data"] != data:
                raise FileExistsError(f"{out}: holds a demo of {there['data']}; choose another --out, or --overwrite")
            else:
                self.values = there
        out.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def results(self) -> dict:
        return self.values["results"]

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.values, indent=1).encode())

    @contextmanager
    def timed(self) -> Iterator[float]:
        started = time.perf_counter()
        try:
            yield started
        finally:
            self.values["seconds"] += time.perf_counter() - started
            self.save()

    def keep(self, name: str, scores: Any, threshold: float | None, say: Callable[[str], None], **more: Any) -> None:
        self.results[name] = {"scores": scores.model_dump(mode="json"), "threshold": threshold, **more}
        say(f"{name}, {self.values['data']}/test: {scores}")

    def describe(self, mae: Run) -> None:
        """What the page needs beside the numbers."""
        data, out = self.values["data"], shlex.quote(str(self.out))
        record, (short, _) = DATASETS[data], SHORT[data]
        about = f"{record.citation}."
        if record.file is None:
            about = "The tissue is synthetic, its labels exact: neurites with membranes, mitochondria and vesicles."
        if short:
            full = [part().schedule.steps for part in recipe(data)[:2]]
            about += f" This is a demo-sized schedule; the recipe {data} itself trains for {full[0]} + {full[1]} steps."
        self.values |= {
            "about": about, "licence": f"Data: {data}, {record.licence}.", "test": f"{data}/test",
            "chosen_on": f"{data}/validation",
            "commands": [
                f"emae demo --data {data} --out {out}", "", "# the same, step by step",
                f"emae pretrain {out}/mae/config.json --out again/mae",
                f"emae finetune {out}/pretrained/config.json --from again/mae --out again/pretrained",
                f"emae finetune {out}/pretrained/config.json --from scratch --out again/scratch",
                f"emae segment again/pretrained {data}/test again/test.zarr",
                f"emae score {data}/test again/test.zarr"]}
        self.save()
