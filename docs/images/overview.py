"""overview.png of the README, from a finished demo on the phantom: python docs/images/overview.py runs/demo"""

import sys
from pathlib import Path

import numpy as np
import torch

import emae
from emae._normalise import measure_levels
from emae._patches import grid_shape, sample_hidden, unpatchify
from emae._pretrain import imagine, load_mae
from emae._report import HIDDEN_COLOUR, boundary_picture, paint_alike, to_grey
from emae._sampling import sample_generator
from emae._view import enlarge, overlay, panel

SECTION, CORNER, TILES = 12, (16, 32), 2  # a square of TILES x TILES of the autoencoder's crops

demo = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
mae = emae.load_run(demo / "mae")
model, (depth, side, _), patch = load_mae(mae), mae.config.crop, mae.config.model.encoder.patch
volume, true = emae.open_volume("phantom/test"), np.asarray(emae.open_labels("phantom/test"))
levels, first = measure_levels(volume, mae.config.normalisation), SECTION - depth // 2
grid = grid_shape(mae.config.crop, patch)

hidden_rows, imagined_rows = [], []
for row in range(TILES):
    seen, made = [], []
    for column in range(TILES):
        y, x = CORNER[0] + row * side, CORNER[1] + column * side
        crop = volume[first : first + depth, y : y + side, x : x + side]
        raw = torch.from_numpy(levels.apply(crop, first))[None, None]
        hidden = sample_hidden(torch.Size(grid).numel(), mae.config.hidden_ratio, sample_generator(row, column))
        where = unpatchify(hidden[None, :, None].expand(-1, -1, torch.Size(patch).numel()), grid, patch)
        _, imagined = imagine(model, raw, hidden[None], mae.voxel_size_nm)
        blacked = np.repeat(to_grey(raw[0, 0, depth // 2])[..., None], 3, axis=-1)
        blacked[where[0, 0, depth // 2].numpy()] = HIDDEN_COLOUR
        seen.append(blacked)
        made.append(to_grey(imagined[0, 0, depth // 2]))
    hidden_rows.append(np.hstack(seen))
    imagined_rows.append(np.hstack(made))

box = (slice(SECTION, SECTION + 1), *(slice(c, c + TILES * side) for c in CORNER))
raw = np.asarray(volume[box])[0]
labels = paint_alike(true, np.asarray(emae.open_volume(demo / "pretrained" / "test.zarr")))[box][0]
affinities = boundary_picture(emae.open_volume(demo / "pretrained" / "test_prediction.zarr"), box)[0]
tiles = [raw, np.vstack(hidden_rows), np.vstack(imagined_rows), affinities, overlay(raw, labels, 0.55)]
titles = ["raw", "what the encoder sees", "reconstruction", "predicted affinities", "instances"]
panel([enlarge(t, 1.5, 1.5) for t in tiles], titles, Path(__file__).with_name("overview.png"))
