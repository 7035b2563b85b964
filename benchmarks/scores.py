"""Scores of a large volume against scikit-image, in one process, in turns: `python benchmarks/scores.py`.

Both count the same two label arrays as given (no relabelling, no filling): adapted Rand error with precision and
recall, and variation of information. The whole protocol of a cropped region is timed beside it.
"""

import argparse
import resource
import statistics
import time

import numpy as np

from emae._evaluate import score


def volumes(voxels, seed):
    """Two label volumes of about `voxels`: Voronoi-like cells and the same cells cut and joined at random."""
    rng = np.random.default_rng(seed)
    side = round(voxels ** (1 / 3))
    z, y, x = np.ogrid[:side, :side, :side]
    wave = [8 * np.sin(axis / 17 + phase) for axis, phase in ((z, 0), (y, 1), (x, 2))]
    size = 24
    n = side // size + 3
    true = (
        ((z + wave[1] + 8) // size).astype(np.uint32) * n * n
        + ((y + wave[2] + 8) // size).astype(np.uint32) * n
        + ((x + wave[0] + 8) // size).astype(np.uint32)
        + 1
    )
    joined = rng.integers(1, n**3 // 2, n**3 + n * n + n + 2, dtype=np.uint32)
    predicted = joined[true] * 4 + ((x + y) // 13 % 4).astype(np.uint32) % 2
    return true, predicted


def scikit_image(true, predicted):
    from skimage.metrics import adapted_rand_error, variation_of_information

    error, precision, recall = adapted_rand_error(true, predicted, ignore_labels=(0,))
    split, merge = variation_of_information(true, predicted, ignore_labels=(0,))
    return error, recall, precision, split, merge  # its precision and recall are exchanged


def ours(true, predicted):
    s = score(true=true, predicted=predicted, relabel_true=False, unpredicted="one_segment")
    return s.adapted_rand_error, s.precision, s.recall, s.voi_split, s.voi_merge


def protocol(true, predicted):
    return score(true=true, predicted=predicted).adapted_rand_error


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=float, default=1e8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    true, predicted = volumes(options.voxels, options.seed)
    print(f"{true.size / 1e6:.1f} M voxels, {len(np.unique(true[::4, ::4, ::4]))} true objects, {true.dtype}")

    seconds = {f: [] for f in (ours, scikit_image, protocol)}
    peak = {}
    for _ in range(options.rounds):
        results = []
        for f in (ours, protocol, scikit_image):  # the peak only grows: ours before scikit-image's larger one
            start = time.perf_counter()
            results.append(f(true, predicted))
            seconds[f].append(time.perf_counter() - start)
            peak.setdefault(f, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        np.testing.assert_allclose(results[0], results[2], rtol=1e-9, atol=1e-12)
    for f, times in seconds.items():
        print(
            f"{f.__name__:13} median {statistics.median(times):7.2f} s "
            f"({min(times):.2f} to {max(times):.2f}), peak memory {peak[f]:.2f} GiB with the volumes"
        )
    ratio = statistics.median(seconds[scikit_image]) / statistics.median(seconds[ours])
    print(f"scikit-image / ours = {ratio:.1f} (wanted: at least 5)")
    raise SystemExit(ratio < 5)


if __name__ == "__main__":
    main()
