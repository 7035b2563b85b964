"""pretrain: a masked autoencoder learns a volume from its own hidden patches."""

from collections.abc import Callable
from pathlib import Path

import torch

from emae._augment import Augmentation
from emae._baselines import interpolate_visible, trivial_losses
from emae._experiments import Pretrain
from emae._fit import fit
from emae._patches import grid_shape, patchify, sample_hidden, unpatchify
from emae._runs import Run, create_run, load_run, load_tensors, load_weights
from emae._sampling import Crops, common_voxel_size, open_cubes, sample_generator
from emae._view import panel
from emae.models._mae import Mae

HELD_OUT_CROPS = 16
STILL = Augmentation(symmetry=False, contrast=0, brightness=0, section_jitter=0, noise=0)


def pretrain(config: Pretrain, out: str | Path, *, resume: bool = False, overwrite: bool = False,
             say: Callable[[str], None] = print) -> Run:
    """Train a masked autoencoder on `config.volumes` and return its run.

    out: the run's folder. resume: go on with the run that is there. Everything is checked before work starts.
    """
    # what it learns from, what it is tested on
    cubes = open_cubes(config.volumes, config.normalisation, config.crop)
    held_out = open_cubes(config.held_out, config.normalisation, config.crop)
    voxel_size_nm = common_voxel_size([*cubes, *held_out])
    crops = Crops(cubes, config.crop, config.augmentation, config.seed)
    tests = Crops(held_out, config.crop, STILL, seed=0) if held_out else None

    # what learns
    torch.manual_seed(config.seed)
    model = Mae(config.model)
    run = create_run(out, config, resume=resume, overwrite=overwrite, kind="pretrain", voxel_size_nm=voxel_size_nm)
    if run.finished and resume:
        say(f"{run.name}: finished already")
        return run
    tokens = grid_shape(config.crop, config.model.encoder.patch)
    batch = config.schedule.batch

    def sample(source: Crops, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        raw = source.batch(first, count).raw[:, None]
        hidden = [sample_hidden(torch.Size(tokens).numel(), config.hidden_ratio, sample_generator(source.seed + 1, i))
                  for i in range(first, first + count)]
        return raw, torch.stack(hidden)

    def step(i: int) -> dict[str, torch.Tensor]:
        return {"loss": model(*sample(crops, i * batch, batch), voxel_size_nm)}

    trivial: dict[int, dict[str, float]] = {}

    def validate(done: int) -> dict[str, float]:
        source = tests or crops  # without held-out raw, crops of the training volumes; the names say which
        name = "held_out" if tests else "training"
        parts = []
        for first in range(0, HELD_OUT_CROPS, batch):
            raw, hidden = sample(source, first, min(batch, HELD_OUT_CROPS - first))
            losses = {"loss": float(model(raw, hidden, voxel_size_nm))}
            if first not in trivial:  # the same crops every time
                trivial[first] = trivial_losses(model, raw, hidden, voxel_size_nm)
            losses |= trivial[first]
            parts.append((len(raw), losses))
        draw(model, *sample(source, 0, 3), voxel_size_nm, run.folder / "pictures" / f"step_{done:08d}.png")
        return {f"{name}_{k}": sum(n * p[k] for n, p in parts) / HELD_OUT_CROPS for k in parts[0][1]}

    fit(model, step, validate, config.schedule, run, resume=resume, say=say)
    run.close()
    return run


def load_mae(run: Run) -> Mae:
    """The trained autoencoder of a pre-training run."""
    model = Mae(run.config.model)
    load_weights(model, load_tensors(run.weights), run.weights)
    return model.eval()


@torch.no_grad()
def imagine(model: Mae, x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor,
            voxel_size_nm: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The crop with its hidden patches blacked out, and with them reconstructed; visible patches are shown as they are.

    With a patch-normalised target, each reconstructed patch is given the true patch's mean and variance: the network
    was never asked for them.
    """
    patch = model.config.encoder.patch
    predicted_BMP, hidden_BM = model.reconstruct(x_BCZYX, hidden_BN, voxel_size_nm)
    patches = patchify(x_BCZYX, patch)
    index = hidden_BM[..., None].expand_as(predicted_BMP)
    if model.config.target == "patch-normalised":
        true = patches.gather(1, index)
        predicted_BMP = predicted_BMP * true.std(-1, keepdim=True, unbiased=False) + true.mean(-1, keepdim=True)
    grid = grid_shape(tuple(x_BCZYX.shape[2:]), patch)
    blacked = patches.scatter(1, index, torch.full_like(predicted_BMP, -2.0))
    return unpatchify(blacked, grid, patch), unpatchify(patches.scatter(1, index, predicted_BMP), grid, patch)


def draw(model: Mae, x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor, voxel_size_nm: tuple[float, float, float],
         path: Path) -> None:
    """original | hidden | reconstruction | interpolation, the middle section of each crop, as a PNG."""
    blacked, imagined = imagine(model, x_BCZYX, hidden_BN, voxel_size_nm)
    filled = interpolate_visible(x_BCZYX, hidden_BN, model.config.encoder.patch, voxel_size_nm)
    middle = x_BCZYX.shape[2] // 2
    rows = []
    for parts in zip(x_BCZYX, blacked, imagined, filled, strict=True):
        rows.append([((part[0, middle].clamp(-2, 2) + 2) * (255 / 4)).to(torch.uint8).numpy() for part in parts])
    panel(rows, ["original", "hidden", "reconstruction", "interpolation"], path)


__all__ = ["draw", "imagine", "load_mae", "load_run", "pretrain"]
