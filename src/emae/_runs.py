"""Run: one folder that holds all of an experiment.

    config.json       the resolved configuration; the same command on this file repeats the run
    run.json          what kind of run, code version, voxel size, results such as the chosen threshold
    metrics.jsonl     one line a report: step, losses, baselines, rate
    checkpoints/      step_00000123.safetensors: weights, optimiser and step in one file, written whole or not at all
    weights.safetensors   the finished model
    pictures/         PNGs
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emae._config import Config, read_object

OWN = ("config.json", "run.json", "metrics.jsonl", "weights.safetensors", "checkpoints", "pictures", "tensorboard")
"""what a run folder holds of a run, and --overwrite removes"""
KEEP = 2
"""checkpoints kept; the newest is never removed"""
BEGUN = ("checkpoints", "pictures", "run.json", "run.json.part", "config.json.part")
"""what a run that was killed while its folder was made may hold; config.json comes last"""


@dataclass
class Run:
    """An opened run folder. `record` is run.json; `save_record` writes it."""

    folder: Path
    config: Any
    record: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def voxel_size_nm(self) -> tuple[float, float, float]:
        """Of the data it was trained on, z y x."""
        z, y, x = self.record["voxel_size_nm"]
        return z, y, x

    @property
    def decoder(self) -> Any:
        """The decoder, with the threshold, that held-out labels chose; without any, the first candidate."""
        first = self.config.decoders[0]
        return type(first).model_validate(self.record["decoder"]) if "decoder" in self.record else first

    @property
    def finished(self) -> bool:
        return self.weights.is_file()

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    def save_record(self, **values: Any) -> None:
        self.record.update(values)
        write_whole(self.folder / "run.json", json.dumps(self.record, indent=1).encode())

    def metrics(self) -> list[dict]:
        """Every report so far; a last line cut short (killed, disk full) is not one."""
        path = self.folder / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.is_file() else ("", "", "")
        return [json.loads(line) for line in whole.splitlines()]

    def report(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard where that is installed."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")
        writer = self._tensorboard()
        if writer is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and key not in ("step", "time"):
                    writer.add_scalar(key, value, values["step"])

    def _tensorboard(self) -> Any:
        if not hasattr(self, "_writer"):
            try:
                from torch.utils.tensorboard import SummaryWriter
                self._writer = SummaryWriter(str(self.folder / "tensorboard"))
            except ImportError:
                self._writer = None
        return self._writer

    def close(self) -> None:
        if getattr(self, "_writer", None) is not None:
            self._writer.close()

    # checkpoints

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.folder / "checkpoints").glob("step_*.safetensors"))

    def save_checkpoint(self, step: int, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Weights and optimiser state after `step` steps, in one file, then the old ones go."""
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        save_tensors(self.folder / "checkpoints" / f"step_{step:08d}.safetensors", tensors, {"step": str(step)})
        for path in self.checkpoints()[:-KEEP]:
            path.unlink()

    def load_checkpoint(self, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> int:
        """Restore the newest readable checkpoint and return its step; 0 where there is none.

        metrics.jsonl loses what was reported after it, so a resumed run reads like an unbroken one.
        """
        step = 0
        for path in reversed(self.checkpoints()):
            try:
                tensors = load_tensors(path)
            except ValueError:
                continue  # cut short by a full disk under an older system; the one before is whole
            step = int(re.findall(r"\d+", path.stem)[-1])
            weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            load_weights(model, weights, path)
            states: dict[int, dict] = {}
            for key, value in tensors.items():
                if key.startswith("optimiser."):
                    _, index, name = key.split(".")
                    states.setdefault(int(index), {})[name] = value
            optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
            break
        kept = [m for m in self.metrics() if m.get("step", 0) <= step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_whole(self.folder / "metrics.jsonl", text.encode())
        return step

    def save_weights(self, model: torch.nn.Module) -> None:
        """The finished model, with what a stranger needs to know in the file's own header."""
        header = {"config": self.config.model_dump_json(), "record": json.dumps(self.record), "format": "pt"}
        save_tensors(self.weights, model.state_dict(), header)


def create_run(folder: str | Path, config: Config, *, resume: bool, overwrite: bool, **record: Any) -> Run:
    """Make the folder and write what will run, or open the same run again.

    FileExistsError for a folder that is there, unless `resume` (same configuration wanted: ValueError names the
    difference) or `overwrite`.
    """
    folder = Path(folder)
    record |= {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "created": time.strftime("%Y-%m-%d %H:%M:%S")}
    if (folder / "config.json").is_file() and (folder / "run.json").is_file():
        if resume:
            run = load_run(folder)
            if run.config != config:
                raise ValueError(f"{folder}: --resume with another configuration ({difference(run.config, config)}); "
                                 "give the same one, or another --out")
            return run
        if not overwrite:
            raise FileExistsError(f"{folder}: there is a run here already; --resume goes on with it, --overwrite "
                                  "replaces it, another --out keeps both")
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= set(BEGUN)):
        raise FileExistsError(f"{folder}: exists and is no run of ours; choose another --out")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    run = Run(folder, config, record)
    run.save_record()
    write_whole(folder / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    return run


def load_run(folder: str | Path) -> Run:
    """Open a run folder. FileNotFoundError / ValueError say what is missing."""
    from emae._experiments import parse_experiment

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    for name in ("config.json", "run.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no run here ({name} is missing)")
    config = parse_experiment(read_object(folder / "config.json"), f"{folder}/config.json")
    return Run(folder, config, read_object(folder / "run.json"))


def difference(one: Config, other: Config) -> str:
    """The settings that differ, 'a.b: 1 against 2'."""
    def flat(values: Any, path: str = "") -> dict:
        if isinstance(values, dict):
            parts = [flat(value, f"{path}.{key}" if path else key) for key, value in values.items()]
            return {k: v for part in parts for k, v in part.items()}
        return {path: values}
    a, b = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return ", ".join(f"{k}: {a.get(k)} against {b.get(k)}" for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def code_version() -> str:
    """Version, and the commit where the package lies in a git checkout of its own."""
    root, commit = Path(__file__).resolve().parents[2], ""
    if (root / ".git").exists():
        try:
            out = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True,
                                 text=True, timeout=10)
            commit = out.stdout.strip() if out.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            pass
    return f"{importlib.metadata.version('emae')} {commit}".strip()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that whoever looks finds the old one or the new one, never half."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        fault = f"{path}: could not be written ({error.strerror}); what was there before is whole"
        raise OSError(error.errno, fault) from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save

    write_whole(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, header))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """ValueError for a file that is cut short or no safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Every tensor must be there with its shape; ValueError names those that are not."""
    own = model.state_dict()
    faults = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    faults += [f"{k}: {tuple(weights[k].shape)} for {tuple(own[k].shape)}" for k in own
               if k in weights and weights[k].shape != own[k].shape]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"{path}: a checkpoint of another architecture: " + "; ".join(faults[:4]) + more)
    model.load_state_dict(weights)
