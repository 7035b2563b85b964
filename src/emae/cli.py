"""The command line: each verb parses, calls the function of the same name, prints.

Exit codes: 2 bad input (one line says which file and what is wrong with it), 1 a failure, 130 interrupted. What is
heavy is imported inside the commands, so that --help is quick.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import emae
from emae._threads import limit_threads

if TYPE_CHECKING:
    from emae._sampling import LabelledSource, Source

OWN_DATA = ("isotropic", "sections")
"""recipes for a lab's own volumes, which are named on the command line"""
GAP_NM = 50
"""between the sections trained on and those held out by default; the sections next to a trained one are near copies"""
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

app = typer.Typer(
    name="emae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Masked pre-training for the segmentation of serial-section electron microscopy.",
    epilog="A VOLUME is a data set (phantom, fib25, fib25/test: see emae data list) or a file: TIFF, a folder of "
    "sections, file.h5:key, Zarr, OME-Zarr, N5, precomputed, MRC. Axes are z, y, x everywhere.",
)
data = typer.Typer(no_args_is_help=True, help="List the known data sets, look at any volume.")
app.add_typer(data, name="data")

# The words of the command line, each with one meaning everywhere.
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE|CONFIG.json", help="A recipe by name, or a configuration file.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a fine-tuned run.")]
VolumeName = Annotated[str, typer.Argument(metavar="VOLUME", help="A data set, or a file[:key].")]
OutVolume = Annotated[Path, typer.Argument(metavar="OUT", help="The OME-Zarr to write (name it .zarr).")]
OutRun = Annotated[Path, typer.Option("--out", metavar="RUN", help="The run's folder.")]
BoxOption = Annotated[
    str | None,
    typer.Option("--box", metavar="z0:z1,y0:y1,x0:x1", help="The part to read, in voxels; open ends allowed."),
]
VoxelSize = Annotated[
    str | None,
    typer.Option("--voxel-size", metavar="z,y,x", help="Nanometres, where the file does not say or says it wrong."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Change one setting of the configuration; may be repeated."),
]
AnyVoxelSize = Annotated[bool, typer.Option("--any-voxel-size", help="Allow a voxel size the run was not trained at.")]
Resample = Annotated[
    bool, typer.Option("--resample", help="Resample the volume to the voxel size of the training, on the fly.")
]
Overlap = Annotated[float, typer.Option(min=0, max=0.9, help="Share of a crop that the next one covers again.")]
Mirror = Annotated[int, typer.Option(min=1, max=16, help="Mirrored and transposed variants to average; 1 = none.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"emae {emae.__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (or EMAE_DEBUG=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """What holds for every verb; --debug is taken out in `run`, wherever it stands."""


@app.command()
def demo(
    name: Annotated[
        str, typer.Option("--data", metavar="NAME", help="phantom, or a data set whose file is here.")
    ] = "phantom",
    out: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """The whole path on one data set, ending with a page to look at.

    Pre-trains, fine-tunes from it and from scratch, segments, scores. Run again, it goes on where it was.

    [dim]emae demo --data fib25 --out runs/fib25[/dim]
    """
    print(f"page: {emae.demo(name, out, overwrite=overwrite, say=_say)}")


@data.command("list")
def data_list() -> None:
    """Every data set the package knows, and whether its file is here (EMAE_DATA names the folder).

    [dim]emae data list[/dim]
    """
    print(emae.list_datasets())


@data.command("show")
def data_show(
    volume: VolumeName,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PNG", help="Picture to write; without it NAME.png here, if free.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="KEY|FILE[:KEY]", help="Which labels of a data set; the labels of any other volume."),
    ] = None,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    overwrite: Overwrite = False,
) -> None:
    """What a volume holds, and a PNG: three sections, with the labels over them.

    [dim]emae data show phantom/test --out phantom.png[/dim]
    """
    if out is None:
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(volume).name) or "volume"
        out = Path(f"{volume.replace('/', '_') if volume.split('/')[0] in emae.DATASETS else stem}.png")
        if out.exists() and not overwrite:
            print(f"{out} is there already: no picture (--out, --overwrite)", file=sys.stderr)
            out = None
    print(emae.show(volume, out, labels, voxel_size_nm=_triple(voxel_size), box=box, overwrite=overwrite))
    if out is not None:
        print(f"{'picture':<11}{out}")


@app.command()
def pretrain(
    recipe: RecipeName,
    out: OutRun,
    volumes: Annotated[
        list[str] | None, typer.Argument(metavar="VOLUME", help="To train on, instead of the recipe's own.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="VOLUME", help="Raw never trained on, to watch the loss on; may be repeated."),
    ] = None,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    sets: Sets = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a masked autoencoder on unlabelled volumes.

    [dim]emae pretrain sections stack.tif --voxel-size 50,4,4 --out runs/mae --set schedule.steps=5000[/dim]
    """
    config = _config(recipe, "pretrain", bool(volumes))
    if volumes:
        own = tuple(_source(v, voxel_size, box) for v in volumes)
        config = _with(config, volumes=own, held_out=tuple(_source(v, voxel_size) for v in held_out or ()))
    elif held_out or box or voxel_size:
        raise ValueError(
            "--held-out, --box and --voxel-size belong to VOLUMEs given here; those of the configuration "
            "are changed with --set, for example --set volumes.0.box=0:50,:,:"
        )
    run = emae.pretrain(emae.override(config, sets or []), out, resume=resume, overwrite=overwrite, say=_say)
    print(f"{run.name}: done; next: emae finetune ... --from {run.name}")


@app.command()
def finetune(
    recipe: RecipeName,
    out: OutRun,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="RUN|scratch", help="A pre-training run, or scratch: the control, all else equal."
        ),
    ],
    cubes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VOLUME LABELS", help="Raw and its labels, instead of the recipe's own; may be repeated."
        ),
    ] = None,
    offset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="z,y,x",
            help="Where the first label voxel lies in its raw volume (in its --box), one for each pair.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:KEY]", help="Mask of the labels' shape, 0 where they are not known, one for each pair."
        ),
    ] = None,
    held_out: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="VOLUME LABELS",
            help="Where the threshold is chosen; without it, the last fifth of the "
            "labelled sections of the last pair, which is not trained on, nor are the sections within 50 nm before it. "
            "In near-isotropic data those are near copies still: give a cube from elsewhere.",
        ),
    ] = None,
    held_out_offset: Annotated[
        str | None, typer.Option(metavar="z,y,x", help="--offset of the --held-out labels in their VOLUME.")
    ] = None,
    held_out_valid: Annotated[
        str | None, typer.Option(metavar="FILE[:KEY]", help="--valid of the --held-out labels.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            "--box",
            metavar="z0:z1,y0:y1,x0:x1",
            help="The part of every VOLUME to train on, in voxels, open ends allowed; of its labels too where they "
            "have its shape and no --offset. Not of --held-out.",
        ),
    ] = None,
    voxel_size: VoxelSize = None,
    sets: Sets = None,
    any_voxel_size: AnyVoxelSize = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a segmenter on labelled cubes; its threshold is chosen on held-out labels.

    [dim]emae finetune sections stack.h5:raw cube.h5:labels --offset 10,200,200 --from runs/mae --out runs/seg[/dim]
    """
    config = _config(recipe, "finetune", bool(cubes))
    begin: Any = start if start == "scratch" else emae.load_run(start)
    if held_out is None and (held_out_offset or held_out_valid):
        raise ValueError("--held-out-offset and --held-out-valid belong to --held-out VOLUME LABELS")
    if cubes:
        training = _pairs(cubes, offset, valid, voxel_size, box)
        if held_out is None:
            training[-1], held = _last_fifth(training[-1])
        else:
            offsets, valids = ([v] if v else None for v in (held_out_offset, held_out_valid))
            held = _pairs(held_out, offsets, valids, voxel_size, None, "--held-out-offset")[0]
        config = _with(config, training=tuple(training), validation=(held,))
    elif offset or valid or held_out or box or voxel_size:
        raise ValueError(
            "--offset, --valid, --held-out, --box and --voxel-size belong to VOLUME LABELS given here; "
            "those of the configuration are changed with --set, for example --set training.0.raw.path=a.h5"
        )
    config = emae.override(config, sets or [])
    run = emae.finetune(
        config, out, start=begin, resume=resume, overwrite=overwrite, any_voxel_size=any_voxel_size, say=_say
    )
    print(f"{run.name}: done; next: emae segment {run.name} VOLUME OUT")


@app.command()
def predict(
    run: RunFolder,
    volume: VolumeName,
    out: OutVolume,
    overlap: Overlap = 0.5,
    mirror: Mirror = 1,
    resample: Resample = False,
    any_voxel_size: AnyVoxelSize = False,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Affinities of a volume, block by block to disk. Interrupted, the same command goes on.

    [dim]emae predict runs/seg phantom/test affinities.zarr --box 0:8,:,:[/dim]
    """
    made = emae.predict(
        emae.load_run(run),
        _open(volume, voxel_size, box),
        out,
        overlap=overlap,
        mirror=mirror,
        resample_to_run=resample,
        any_voxel_size=any_voxel_size,
        overwrite=overwrite,
        say=_say,
    )
    print(f"{made.name}: {made.shape} {made.dtype}")


@app.command()
def decode(
    prediction: Annotated[str, typer.Argument(metavar="PREDICTION", help="What emae predict wrote.")],
    out: OutVolume,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Whose decoder to use; without it, the run that predicted.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Merge while 1 - affinity is below this.")
    ] = None,
    sets: Sets = None,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Instances from affinities: watershed, then agglomeration.

    [dim]emae decode affinities.zarr neurons.zarr --threshold 0.4[/dim]
    """
    from emae._segment import save_labels
    from emae._volume import check_apart, check_output

    check_output(out, overwrite)
    affinities = _open(prediction, voxel_size, box)
    check_apart(out, affinities)
    config = _decoder(prediction, run, affinities.attrs.get("run"), threshold)
    config = emae.override(config, [*(sets or []), *([] if threshold is None else [f"threshold={threshold}"])])
    if config.threshold is None:
        raise ValueError(f"{prediction}: no threshold was chosen for its decoder; give --threshold")
    labels = emae.decode(affinities, config)
    print(f"{save_labels(labels, out, affinities, overwrite=overwrite).name}: {int(labels.max())} objects")


@app.command()
def segment(
    run: RunFolder,
    volume: VolumeName,
    out: OutVolume,
    overlap: Overlap = 0.5,
    mirror: Mirror = 1,
    resample: Resample = False,
    any_voxel_size: AnyVoxelSize = False,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Instances of a volume: predict, then decode with the run's threshold.

    [dim]emae segment runs/seg phantom/test neurons.zarr[/dim]
    """
    made = emae.segment(
        emae.load_run(run),
        _open(volume, voxel_size, box),
        out,
        overlap=overlap,
        mirror=mirror,
        resample_to_run=resample,
        any_voxel_size=any_voxel_size,
        overwrite=overwrite,
        say=_say,
    )
    print(f"{made.name}: {made.shape} {made.dtype}")


@app.command()
def score(
    true: Annotated[str, typer.Argument(metavar="TRUE", help="Labels: a data set (its labels), or a file[:key].")],
    predicted: Annotated[str, typer.Argument(metavar="PREDICTED", help="Labels to be judged: a file[:key].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    unpredicted: Annotated[
        Literal["nearest", "singletons", "one_segment", "drop"],
        typer.Option(
            help="What 0 in PREDICTED is: part of the nearest segment, a segment each, one segment, not scored."
        ),
    ] = "nearest",
    key: Annotated[str | None, typer.Option(help="Which labels of a data set; its first without.")] = None,
    valid: Annotated[str | None, typer.Option(metavar="FILE[:KEY]", help="Mask, 0 = not scored.")] = None,
    relabel: Annotated[
        bool, typer.Option(help="Cut the truth into the components it has inside the box; needed for a cropped region.")
    ] = True,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
) -> None:
    """Adapted Rand error, and variation of information in bits.

    --box is a part of TRUE, and of PREDICTED where that covers the same volume.

    [dim]emae score fib25/test neurons.zarr --json[/dim]
    """
    size = _triple(voxel_size)
    truth = emae.open_labels(true, key, voxel_size_nm=size)
    others = [emae.open_volume(p, voxel_size_nm=size) for p in (predicted, valid) if p is not None]
    if box is not None:
        others = [o.crop(box) if o.shape == truth.shape else o for o in others]
        truth = truth.crop(box)
    scores = emae.score(
        true=truth,
        predicted=others[0],
        valid=others[1] if valid else None,
        unpredicted=unpredicted,
        relabel_true=relabel,
        voxel_size_nm=size,
    )
    print(scores.model_dump_json(indent=1) if as_json else scores)


@app.command()
def baseline(
    volume: VolumeName,
    out: OutVolume,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Merge while the boundary is below this.")
    ] = None,
    choose_on: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="VOLUME LABELS", help="Choose filter and threshold here instead, by the scores."),
    ] = None,
    sets: Sets = None,
    box: BoxOption = None,
    voxel_size: VoxelSize = None,
    overwrite: Overwrite = False,
) -> None:
    """The classical way, as a baseline: watershed and agglomeration on smoothed raw, nothing learnt.

    [dim]emae baseline phantom/test classical.zarr --choose-on phantom/validation phantom/validation[/dim]
    """
    from emae._decode import classical_grid
    from emae._segment import save_labels
    from emae._volume import check_apart, check_output

    check_output(out, overwrite)
    raw = _open(volume, voxel_size, box)
    check_apart(out, raw)
    if (threshold is None) == (choose_on is None):
        raise ValueError("give --threshold, or --choose-on VOLUME LABELS to have it chosen")
    if choose_on is not None:
        held_raw, held_labels = (
            _open(choose_on[0], voxel_size),
            emae.open_labels(choose_on[1], voxel_size_nm=_triple(voxel_size)),
        )
        check_apart(out, held_raw, held_labels)
        config, _ = emae.choose_classical(
            held_labels, held_raw, classical_grid(held_raw.require_voxel_size()), emae.score
        )
        print(f"chosen: {config.model_dump_json()}", file=sys.stderr)
    else:
        config = emae.override(emae.ClassicalConfig(), [f"agglomeration.threshold={threshold}"])
    labels = emae.segment_raw(raw, emae.override(config, sets or []))
    print(f"{save_labels(labels, out, raw, overwrite=overwrite).name}: {int(labels.max())} objects")


# What the command line says, as the package's own records.


def _say(text: str) -> None:
    print(text, flush=True)


def _triple(text: str | None, option: str = "--voxel-size", kind: type = float) -> tuple | None:
    """ "50,4,4" as three numbers."""
    if text is None:
        return None
    try:
        z, y, x = (kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: want three numbers z,y,x, for example 50,4,4") from None
    return z, y, x


def _open(volume: str, voxel_size: str | None, box: str | None = None) -> "emae.Volume":
    return emae.open_volume(volume, voxel_size_nm=_triple(voxel_size), box=box)


def _decoder(prediction: str, run: Path | None, maker: str | None, threshold: float | None) -> "emae.Agglomeration":
    """That of --run; else of the run that predicted; with a threshold, and only without that run, the default one."""
    from emae._predict import check_run

    if run is None and (maker is None or not Path(maker).is_dir()):
        fault = "does not say which run made it" if maker is None else f"the run that made it, {maker}, is not there"
        if threshold is None:
            raise ValueError(f"{prediction}: {fault}; give --run or --threshold")
        print(f"{prediction}: {fault}; decoded with the default settings", file=sys.stderr)
        return emae.Agglomeration()
    found = emae.load_run(run or str(maker))
    check_run(found)
    return found.decoder


def _config(name: str, kind: str, volumes_given: bool) -> Any:
    """The recipe's configuration of this kind, or the file's."""
    from emae._experiments import KINDS

    if name in OWN_DATA and not volumes_given:
        wanted = "VOLUME" if kind == "pretrain" else "VOLUME LABELS"
        raise ValueError(f"the recipe {name} is for your own data: give {wanted} after it, as in emae {kind} --help; "
                         "the recipe phantom brings its own")  # fmt: skip

    if name.endswith(".json") or "/" in name:
        return emae.load_config(KINDS[kind], name)
    return getattr(emae.recipes.recipe(name), kind)()


def _with(config, **values):
    """The configuration with other sources, checked as a whole once more."""
    return type(config).model_validate(config.model_dump() | values)


def _source(volume: str, voxel_size: str | None, box: str | None = None) -> "Source":
    from emae._sampling import Source

    return Source(path=volume, voxel_size_nm=_triple(voxel_size), box=box)


def _pairs(
    cubes: Sequence[str], offsets, valids, voxel_size: str | None, box: str | None, offset_option: str = "--offset"
) -> list["LabelledSource"]:
    """VOLUME LABELS VOLUME LABELS ... with one --offset and one --valid each, where given."""
    from emae._sampling import LabelledSource

    if len(cubes) % 2:
        raise ValueError(f"{cubes[-1]}: a VOLUME without LABELS; give them in pairs, VOLUME LABELS")
    count = len(cubes) // 2
    for option, values in ((offset_option, offsets), ("--valid", valids)):
        if values and len(values) != count:
            raise ValueError(f"{option} is given {len(values)} times for {count} pairs of VOLUME and LABELS")
    pairs = []
    for k, (raw, labels) in enumerate(zip(cubes[::2], cubes[1::2], strict=True)):
        pairs.append(
            LabelledSource(
                raw=_source(raw, voxel_size, box),
                labels=labels,
                valid=valids[k] if valids else None,
                offset_vx=_triple(offsets[k], offset_option, int) if offsets else _cut(raw, labels, voxel_size, box),
            )
        )
    return pairs


def _cut(raw: str, labels: str, voxel_size: str | None, box: str | None) -> tuple[int, ...] | None:
    """The offset of labels of the whole VOLUME's shape in its --box; None for labels that fit the box themselves."""
    if box is None:
        return None
    whole, part, ids = _open(raw, voxel_size), _open(raw, voxel_size, box), emae.open_labels(labels)
    start = tuple(p - w for p, w in zip(part.box.start, whole.box.start))
    return tuple(-s for s in start) if ids.shape == whole.shape != part.shape else None


def _last_fifth(pair: "LabelledSource") -> tuple["LabelledSource", "LabelledSource"]:
    """The pair cut along z: sections to train on, a gap of 50 nm, and the last fifth, to choose on."""
    raw, labels, _ = pair.open()
    offset = pair.offset_vx or (0, 0, 0)
    if any(o < 0 and n > r for o, n, r in zip(offset[1:], labels.shape[1:], raw.shape[1:])):
        raise ValueError(f"{labels.name}: reach beyond {raw.name}, box {raw.box}, in y or x; "
                         "say where to choose the threshold with --held-out VOLUME LABELS")  # fmt: skip
    known = range(max(0, -offset[0]), min(labels.shape[0], raw.shape[0] - offset[0]))
    held_out = known[len(known) - max(1, len(known) // 5) :]
    gap = max(1, math.ceil(GAP_NM / raw.require_voxel_size()[0]))
    training = known[: max(0, len(known) - len(held_out) - gap)]
    if not training:
        raise ValueError(f"{labels.name}: {len(known)} sections are too few to hold out {len(held_out)} of them behind "
                         f"a gap of {gap}; give others with --held-out VOLUME LABELS")  # fmt: skip
    print(f"{labels.name}: trained on its sections {training.start} to {training[-1]}; "
          f"held out: {held_out.start} to {held_out[-1]}")  # fmt: skip
    one, other = (pair.model_copy(update={"sections": tuple(part)}) for part in (training, held_out))
    return one, other


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = list(arguments)
    debug = os.environ.get("EMAE_DEBUG", "") not in ("", "0")
    if "--debug" in arguments:  # anywhere
        arguments.remove("--debug")
        debug = True
    try:
        limit_threads()
        app(arguments, prog_name="emae")
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("emae: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        bad_input = isinstance(error, BAD_INPUT)
        text = str(error) or type(error).__name__
        print(f"emae: {text}" if bad_input else f"emae: failed: {type(error).__name__}: {text}", file=sys.stderr)
        return 2 if bad_input else 1
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
