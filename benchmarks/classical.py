"""The classical baseline on real data: parameters chosen on held-out labels, scored once on the test labels.

`python benchmarks/classical.py fib25` or `isbi2012`; files are looked for in EMAE_DATA, else in ../shared/data.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import h5py

from emae._decode import choose_classical, classical_grid, segment_raw
from emae._evaluate import score

# file, voxel size in nm, first training, validation and test section, end (the splits of the README of the data)
SETS = {
    "fib25": ("fib25_sample2.h5", (10, 10, 10), 0, 120, 150, 250),
    "isbi2012": ("isbi2012_train_z10-29.h5", (50, 4, 4), 0, 10, 12, 16),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=SETS)
    parser.add_argument("--train-too", action="store_true", help="choose on training and validation labels together")
    options = parser.parse_args()
    file, size, train, validation, test, end = SETS[options.data]
    held_out, test = slice(train if options.train_too else validation, test), slice(test, end)
    folder = Path(os.environ.get("EMAE_DATA", Path(__file__).parents[2] / "shared/data"))
    with h5py.File(folder / file) as opened:
        raw, labels = opened["raw"], opened["labels"]
        raw, labels = ({k: a[s] for k, s in (("validation", held_out), ("test", test))} for a in (raw, labels))

    start = time.perf_counter()
    config, table = choose_classical(
        labels["validation"], raw["validation"], classical_grid(size), score, voxel_size_nm=size
    )
    chosen = time.perf_counter()
    for row in sorted(table, key=lambda row: row["criterion"]):
        c, a = row["config"], row["config"]["agglomeration"]
        print(
            f"sigma {c['sigma_nm']:5.1f} nm ridge {c['ridge']:.1f} foreground {a['foreground']:.1f} "
            f"{a['contact']:11} threshold {row['threshold']:.2f}: "
            f"adapted Rand error {row['adapted_rand_error']:.4f} VOI {row['voi_split'] + row['voi_merge']:.3f}"
        )
    labels_found = segment_raw(raw["test"], config, size)
    done = time.perf_counter()
    print(config)
    print(f"test: {score(true=labels['test'], predicted=labels_found, voxel_size_nm=size)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"choice {chosen - start:.0f} s, test segmentation {done - chosen:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
