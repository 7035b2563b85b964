"""MAE step, segmenter step and prediction beside MONAI 1.6, one process, round robin, medians and ratios.

    pip install 'emae[bench]'
    OMP_NUM_THREADS=1 python benchmarks/models.py [--rounds 7] [--threads 1] [--no-prediction]

Crop 32 x 160 x 160, patch 4 x 16 x 16, width 192, depth 6, 6 heads, batch 1, float32; forward and backward, no
optimiser. Both autoencoders compute the loss on their hidden patches. MONAI's UNETR has no anisotropic patch (16^3
fixed) and 12 blocks; both sliding windows use crops of 32 x 160 x 160, overlap 0.25 and Gaussian weights, over
64 x 250 x 250. Peak memory is that of a process which does the one thing once.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from emae._geometry import Box
from emae._normalise import Normalisation, measure_levels
from emae._patches import patchify
from emae._predict import predict_block
from emae._volume import Volume
from emae.models._mae import Mae, MaeConfig
from emae.models._segmenter import Segmenter, SegmenterConfig
from emae.models._vit import VitConfig

CROP, PATCH, NM = (32, 160, 160), (4, 16, 16), (40.0, 8.0, 8.0)
VOLUME = (64, 250, 250)


def mae_emae():
    model = Mae(MaeConfig(encoder=VitConfig(patch=PATCH)))
    x = torch.randn(1, 1, *CROP)
    hidden = torch.zeros(1, 800, dtype=torch.bool)
    hidden[0, torch.randperm(800)[:600]] = True
    return lambda: model(x, hidden, NM).backward()


def mae_monai():
    from monai.networks.nets import MaskedAutoEncoderViT

    model = MaskedAutoEncoderViT(
        in_channels=1,
        img_size=CROP,
        patch_size=PATCH,
        hidden_size=192,
        mlp_dim=768,
        num_layers=6,
        num_heads=6,
        masking_ratio=0.75,
        decoder_hidden_size=96,
        decoder_mlp_dim=384,
        decoder_num_layers=4,
        decoder_num_heads=6,
    )
    x = torch.randn(1, 1, *CROP)

    def step():
        predicted, hidden = model(x)
        error = (predicted - patchify(x, PATCH)).square().mean(-1)
        ((error * hidden).sum() / hidden.sum()).backward()

    return step


def segmenter():
    return Segmenter(SegmenterConfig(encoder=VitConfig(patch=PATCH)), 9, NM)


def unetr():
    from monai.networks.nets import UNETR

    return UNETR(1, 9, CROP, feature_size=16, hidden_size=192, mlp_dim=768, num_heads=6)


def training_step(model):
    x = torch.randn(1, 1, *CROP)
    target = (torch.rand(1, 9, *CROP) > 0.2).float()
    return lambda: torch.nn.functional.binary_cross_entropy_with_logits(model(x), target).backward()


def predict_emae():
    class Stub:  # what predict_block reads of a run
        class config:
            crop = CROP
            normalisation = Normalisation()
            from emae._targets import NEAREST, Affinities

            target = Affinities(
                offsets=(*NEAREST, (-2, 0, 0), (0, -5, 0), (0, 0, -5), (-3, 0, 0), (0, -9, 0), (0, 0, -9))
            )

        voxel_size_nm = NM

    model = segmenter().eval()
    array = np.random.default_rng(0).integers(0, 255, VOLUME, dtype=np.uint8)
    volume = Volume.from_array(array, NM)
    levels = measure_levels(volume, Stub.config.normalisation)
    return lambda: predict_block(model, Stub, volume, levels, Box.of_shape(VOLUME), overlap=0.25)


def predict_monai():
    from monai.inferers import sliding_window_inference

    model = unetr().eval()
    x = torch.randn(1, 1, *VOLUME)

    def run():
        with torch.inference_mode():
            sliding_window_inference(x, CROP, 1, model, overlap=0.25, mode="gaussian").sigmoid()

    return run


PAIRS = {
    "MAE step": (mae_emae, mae_monai, 4),
    "segmenter step": (lambda: training_step(segmenter()), lambda: training_step(unetr()), 1),
    "prediction": (predict_emae, predict_monai, 1),
}


def peak_gib(name: str, whose: int, threads: int) -> float:
    """Peak memory of one path in a process of its own, GiB."""
    command = [sys.executable, __file__, "--peak", name, str(whose), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-prediction", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("PATH", "0|1"), help="do one thing once, print its peak memory")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        PAIRS[arguments.peak[0]][int(arguments.peak[1])]()()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent that started this process
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds after one warm-up")
    print(f"{'path':16} {'emae s':>9} {'MONAI s':>9} {'emae/MONAI':>11} {'peak GiB':>16}")
    for name, (ours, theirs, repeats) in PAIRS.items():
        if name == "prediction" and arguments.no_prediction:
            continue
        paths = ours(), theirs()
        times: tuple[list, list] = ([], [])
        for round_ in range(arguments.rounds + 1):
            for path, kept in zip(paths, times, strict=True):
                for _ in range(repeats):
                    started = time.perf_counter()
                    path()
                    if round_:
                        kept.append(time.perf_counter() - started)
        mine, other = (statistics.median(t) for t in times)
        print(f"{name:16} {mine:9.3f} {other:9.3f} {mine / other:11.3f} {peak_gib(name, 0, arguments.threads):7.2f} "
              f"{peak_gib(name, 1, arguments.threads):8.2f}   (1/{other / mine:.1f})", flush=True)
        if name == "prediction":
            size = np.prod(VOLUME) / 1e6
            print(f"{'':16} {size / mine:.2f} and {size / other:.2f} Mvoxel/s")


if __name__ == "__main__":
    main()
