"""The page of a demo: scores, loss curves beside their baselines, pictures; one HTML file that needs nothing else.

Everything on it is read back from the demo's folder, so it can be made again at any time.
"""

import base64
import html
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from emae._baselines import interpolate_visible
from emae._datasets import open_labels, open_volume
from emae._evaluate import contingency
from emae._patches import grid_shape, sample_hidden, unpatchify
from emae._pretrain import STILL, imagine, load_mae
from emae._runs import Run, load_run, write_whole
from emae._sampling import Crops, open_cubes, sample_generator
from emae._view import enlarge, grey, overlay, png_bytes
from emae._volume import Volume, open_path

ARMS = {"pretrained": "pre-trained", "scratch": "from scratch"}
COLOURS = {"pretrained": "#0b6e8c", "scratch": "#c4572b", "classical": "#6d6d6d"}
PICTURES = 4
"""reconstructed crops on the page"""
SECTIONS = 3
"""sections of the test volume on the page"""
HIDDEN_COLOUR = np.array([205, 214, 226], np.uint8)


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: list[float]
    y: list[float]
    colour: str
    dash: str = ""
    """SVG's stroke-dasharray; "" = solid"""
    width: float = 2.0
    dots: bool = False


def line_chart(lines: list[Line], x_label: str, y_label: str, y_range: tuple[float, float] | None = None,
               mark: tuple[float, str] | None = None) -> str:
    """An SVG with axes, and an HTML legend below it. mark: a vertical line at x, and what it says."""
    lines = [line for line in lines if line.x]
    if not lines:
        return "<p>Nothing was reported.</p>"
    xs, ys = ([v for line in lines for v in getattr(line, k)] for k in "xy")
    room = 0.05 * (max(ys) - min(ys))
    low, high = y_range or (min(ys) - room, max(ys) + room)
    x_ticks, y_ticks = ticks(min(0, min(xs)), max(xs)), ticks(low, high)
    (x0, x1), (y0, y1) = (min(0, min(xs)), max(xs)), (min(low, y_ticks[0]), max(high, y_ticks[-1]))
    left, right, top, bottom, width, height = 68, 12, 10, 44, 560, 320

    def px(x: float) -> float:
        return left + (x - x0) / max(x1 - x0, 1e-12) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (min(max(y, y0), y1) - y0) / max(y1 - y0, 1e-12) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(y_label)} over {esc(x_label)}">']
    for y in y_ticks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
                   f'<text x="{left - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        out.append(f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{py(y0):.1f}" y2="{py(y0):.1f}"/>'
               f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{esc(x_label)}</text>'
               f'<text transform="translate(13 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
               f"{esc(y_label)}</text>")
    if mark is not None:
        out.append(f'<line class="axis" x1="{px(mark[0]):.1f}" x2="{px(mark[0]):.1f}" y1="{top}" y2="{py(y0):.1f}" '
                   f'stroke-dasharray="2 3"/><text x="{px(mark[0]) + 5:.1f}" y="{top + 12}">{esc(mark[1])}</text>')
    for line in lines:
        points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="{line.width}" '
                   f'stroke-dasharray="{line.dash}" stroke-linejoin="round"/>')
        if line.dots:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points]
    keys = [f'<span><svg viewBox="0 0 26 8" class="key"><line x1="0" x2="26" y1="4" y2="4" stroke="{line.colour}" '
            f'stroke-width="{line.width}" stroke-dasharray="{line.dash}"/></svg>{esc(line.name)}</span>' for line in lines]
    return "".join(out) + '</svg><div class="legend">' + "".join(keys) + "</div>"


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About `wanted` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 1e-12)
    power = 10.0 ** np.floor(np.log10(span / wanted))
    step = next(f * power for f in (1, 2, 5, 10) if span / (f * power) <= wanted)
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [round(k * step, 10) for k in range(first, last + 1)] or [low]


def esc(text: Any) -> str:
    return html.escape(str(text), quote=True)


def figure(image: np.ndarray, caption: str, width_nm: float | None = None, bar_nm: float | None = None) -> str:
    """A picture as a data URI under its caption, with a scale bar if the lengths are given."""
    source = base64.b64encode(png_bytes(image)).decode()
    bar = ""
    if width_nm and bar_nm:
        text = f"{bar_nm:g} nm" if bar_nm < 1000 else f"{bar_nm / 1000:g} µm"
        bar = f'<span class="bar" style="width:{100 * bar_nm / width_nm:.2f}%"></span><span class="barlabel">{text}</span>'
    return (f'<figure><div class="shot"><img alt="{esc(caption)}" src="data:image/png;base64,{source}" '
            f'width="{image.shape[1]}" height="{image.shape[0]}">{bar}</div><figcaption>{caption}</figcaption></figure>')


def round_length_nm(width_nm: float) -> float:
    """1, 2 or 5 times a power of ten, at most a third of the width."""
    power = 10.0 ** np.floor(np.log10(width_nm / 3))
    return float(power * max(f for f in (1, 2, 5) if f * power <= width_nm / 3))


def to_grey(x: torch.Tensor) -> np.ndarray:
    """Normalised grey values (about -2..2) as uint8."""
    return ((x.clamp(-2, 2) + 2) * (255 / 4)).to(torch.uint8).numpy()


def reconstructions(mae: Run, count: int = PICTURES) -> list[dict]:
    """Crops of held-out raw (of the training raw where there is none): their middle section as they are, hidden,
    reconstructed and interpolated, and the mean squared error of both over the hidden voxels of that section."""
    config, model = mae.config, load_mae(mae)
    cubes = open_cubes(config.held_out or config.volumes, config.normalisation, config.crop)
    crops = Crops(cubes, config.crop, STILL, seed=0)
    patch = config.model.encoder.patch
    grid = grid_shape(config.crop, patch)
    out = []
    for i in range(count):
        raw = crops.batch(i, 1).raw[:, None]
        hidden = sample_hidden(torch.Size(grid).numel(), config.hidden_ratio, sample_generator(crops.seed + 1, i))[None]
        _, imagined = imagine(model, raw, hidden, mae.voxel_size_nm)
        filled = interpolate_visible(raw, hidden, patch, mae.voxel_size_nm)
        where = unpatchify(hidden[..., None].expand(-1, -1, torch.Size(patch).numel()), grid, patch)
        middle = (0, 0, config.crop[0] // 2)
        there = where[middle].numpy()
        blacked = np.repeat(to_grey(raw[middle])[..., None], 3, axis=-1)
        blacked[there] = HIDDEN_COLOUR
        errors = [float((part[middle] - raw[middle])[where[middle]].square().mean()) for part in (imagined, filled)]
        out.append({"original": to_grey(raw[middle]), "hidden": blacked, "reconstruction": to_grey(imagined[middle]),
                    "interpolation": to_grey(filled[middle]), "errors": errors,
                    "width_nm": config.crop[2] * mae.voxel_size_nm[2]})
    return out


def paint_alike(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Predicted ids renamed so that each true object and the predicted one that holds most of it share an id."""
    table = contingency(true, predicted)
    names: dict[int, int] = {}
    taken = {0}
    for k in np.argsort(-table.count, kind="stable"):
        mine, theirs = int(table.predicted[k]), int(table.true[k])
        if mine and mine not in names and theirs not in taken:
            names[mine] = theirs
            taken.add(theirs)
    ids, inverse = np.unique(predicted, return_inverse=True)
    above = int(np.max(true)) + 1
    new = np.array([names.get(int(i), int(i) + above) if i else 0 for i in ids], np.uint64)
    return new[inverse].reshape(predicted.shape)


def boundary_picture(prediction: Volume, box: tuple[slice, ...]) -> np.ndarray:
    """Mean of the nearest affinities in y and x, 0..255: dark where the network sees a boundary."""
    offsets = [tuple(o) for o in prediction.attrs["offsets"]]
    parts = [prediction[(slice(k, k + 1), *box)] for k in (offsets.index((0, -1, 0)), offsets.index((0, 0, -1)))]
    return np.mean([np.asarray(p, np.float32)[0] for p in parts], axis=0).astype(np.uint8)


def segmentations(folder: Path, test: str) -> dict[str, list[dict[str, np.ndarray]]]:
    """Pictures of `SECTIONS` xy sections and one xz section (in true proportions) of the test volume."""
    raw, true = open_volume(test), np.asarray(open_labels(test))
    painted = {arm: paint_alike(true, np.asarray(open_path(folder / arm / "test.zarr"))) for arm in ARMS}
    affinities = open_path(folder / "pretrained" / "test_prediction.zarr")
    size_nm = raw.require_voxel_size()
    out: dict[str, list] = {"xy": [], "xz": []}
    depth, height, _ = raw.shape
    cuts = [("xy", (slice(z, z + 1), slice(None), slice(None)), f"z = {z}")
            for z in [(2 * k + 1) * depth // (2 * SECTIONS) for k in range(SECTIONS)]]
    cuts.append(("xz", (slice(None), slice(height // 2, height // 2 + 1), slice(None)), f"y = {height // 2}"))
    for name, cut, where in cuts:
        axis = 0 if name == "xy" else 1
        scale = size_nm[1 - axis] / size_nm[2], 1.0

        def shown(array: np.ndarray, axis: int = axis, scale: tuple[float, float] = scale) -> np.ndarray:
            return enlarge(np.squeeze(array, axis), *scale)

        image = grey(shown(np.asarray(raw[cut])))
        out[name].append({
            "where": where, "raw": image, "affinities": shown(boundary_picture(affinities, cut)),
            **{arm: overlay(image, shown(labels[cut]), 0.55) for arm, labels in painted.items()},
            "true": overlay(image, shown(true[cut]), 0.55)})
    return out


def write_report(folder: str | Path) -> Path:
    """`index.html` in the folder of a finished demo: one file, no network."""
    folder = Path(folder)
    demo = json.loads((folder / "demo.json").read_text())
    runs = {name: load_run(folder / name) for name in ("mae", *ARMS)}
    parts = [header(demo, runs), scores(demo, runs), pretraining(runs["mae"]), finetuning(runs), pictures(runs["mae"]),
             instances(folder, demo), transfer(runs["pretrained"]), settings(folder, demo, runs)]
    body = "\n".join(parts)
    title = f"emae demo: {demo['data']}"
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{esc(title)}</title><style>{STYLE}</style></head>'
            f"<body><main>{body}</main></body></html>\n")
    out = folder / "index.html"
    write_whole(out, page.encode())
    return out


def header(demo: dict, runs: dict[str, Run]) -> str:
    size = " × ".join(f"{s:g}" for s in runs["mae"].voxel_size_nm)
    return (f"<h1>Masked pre-training for EM segmentation: {esc(demo['data'])}</h1>"
            f'<p class="lead">An autoencoder learned to fill in hidden patches of unlabelled tissue; a segmenter started from it '
            f"and, as the control, from scratch with everything else equal; both separated the neurons of a test volume that "
            f"none of them had seen.</p><p>{esc(demo['about'])} Voxels {size} nm (z y x). "
            f"The whole demo took {minutes(demo['seconds'])} of wall time on {runs['mae'].record['threads']} "
            f"thread{'s' * (runs['mae'].record['threads'] != 1)}.</p>")


def scores(demo: dict, runs: dict[str, Run]) -> str:
    rows, results = [], demo["results"]
    mae = runs["mae"]
    for name in (*ARMS, "classical"):
        s = results[name]["scores"]
        if name == "classical":
            label, steps, time = "classical: watershed and agglomeration on smoothed raw", "", minutes(results[name]["seconds"])
        else:
            run = runs[name]
            label = {"pretrained": "fine-tuned from pre-training", "scratch": "the same, from scratch"}[name]
            steps, time = str(run.config.schedule.steps), minutes(trained_seconds(run))
            if name == "pretrained":
                steps, time = f"{mae.config.schedule.steps} + {steps}", f"{minutes(trained_seconds(mae))} + {time}"
        best = name == min(results, key=lambda k: results[k]["scores"]["adapted_rand_error"])
        rows.append(
            f'<tr{" class=best" * best}><th scope="row">{label}</th><td>{s["adapted_rand_error"]:.3f}</td><td>{s["precision"]:.3f}</td>'
            f'<td>{s["recall"]:.3f}</td><td>{s["voi_split"]:.2f}</td><td>{s["voi_merge"]:.2f}</td>'
            f'<td>{s["predicted_objects"]}</td><td>{results[name]["threshold"]:g}</td><td>{steps}</td><td>{time}</td></tr>')
    truth = results["pretrained"]["scores"]
    return f"""<h2>Scores on the test volume</h2>
<div class="scroll"><table><thead><tr><th></th><th>adapted Rand<br>error ↓</th><th>precision ↑</th><th>recall ↑</th>
<th>VOI split ↓<br>(bits)</th><th>VOI merge ↓<br>(bits)</th><th>objects<br>(true: {truth["true_objects"]})</th><th>threshold</th>
<th>steps</th><th>training<br>time</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<p>{verdict(demo)}</p>
<p class="note">Protocol: {esc(truth["protocol"])}. Precision is low where objects are falsely merged, recall where they are falsely
split. Every threshold, and the parameters of the classical method, were chosen on {esc(demo["chosen_on"])}; the test volume,
{esc(demo["test"])}, was only scored. Times are wall time of training, for pre-training + fine-tuning; for the classical method, of choosing
its parameters and segmenting.</p>"""


def verdict(demo: dict) -> str:
    """What the numbers say, and what they do not."""
    error = {k: r["scores"]["adapted_rand_error"] for k, r in demo["results"].items()}
    saved = 1 - error["pretrained"] / error["classical"]
    text = (f"The pre-trained network's error is {abs(saved):.0%} {'below' if saved >= 0 else 'above'} that of the classical method"
            + (" (the aim was a third or more). " if saved >= 1 / 3 else ": the aim, a third or more, was missed in this time. "))
    pretrained, scratch = (round(error[arm], 3) for arm in ARMS)
    text += (f"Pre-training {'lowered' if pretrained < scratch else 'did not lower'} the error against the same training from "
             f"scratch ({pretrained:.3f} against {scratch:.3f}).")
    return text + (" <strong>One seed and one test volume prove nothing</strong>: two trainings that differ in their seed alone "
                   "differ too; what pre-training is worth takes several seeds and label budgets.")


def pretraining(mae: Run) -> str:
    metrics = mae.metrics()
    kind = "held_out" if any("held_out_loss" in m for m in metrics) else "training"
    looks = [m for m in metrics if f"{kind}_interpolation" in m]
    steps = [m["step"] for m in looks]
    where = "held-out tissue" if kind == "held_out" else "training tissue"
    lines = [series(metrics, "loss", "training loss", "#8fb8c6", width=1.5),
             Line(f"loss on {where}", steps, [m[f"{kind}_loss"] for m in looks], COLOURS["pretrained"], width=2.6, dots=True)]
    for key, name, colour, dash in (("visible_mean", "mean of the visible voxels", "#9a9a9a", "2 4"),
                                    ("interpolation", "interpolation from visible patches", "#c4572b", "7 4"),
                                    ("oracle_mean", "true mean of each hidden patch (an oracle)", "#5b8c3a", "9 3 2 3")):
        values = [m[f"{kind}_{key}"] for m in looks]  # of the same crops at every look
        lines.append(Line(name, [0, *steps], [values[0], *values], colour, dash))
    last = looks[-1]
    below = last[f"{kind}_loss"] < last[f"{kind}_interpolation"]
    shown = [v for line in lines[1:] for v in line.y]
    span = max(shown) - min(shown)
    chart = line_chart(lines, "step", "mean squared error, hidden voxels",
                       (min(shown) - 0.1 * span, min(max(lines[0].y + shown), max(shown) + 0.4 * span)))
    return f"""<div class="two"><section><h2>Pre-training</h2>{chart}
<p class="note">{mae.config.hidden_ratio:.0%} of the patches are hidden; intensities are normalised so that the 1st and 99th percentile lie 4 apart.
At the end: {last[f"{kind}_loss"]:.3f} on {where}, <strong>{"below" if below else "not below"} interpolation</strong>
({last[f"{kind}_interpolation"]:.3f}; visible mean {last[f"{kind}_visible_mean"]:.3f}, oracle mean {last[f"{kind}_oracle_mean"]:.3f}).
{mae.config.schedule.steps} steps of {mae.config.schedule.batch} crops took {minutes(trained_seconds(mae))}.</p></section>"""


def finetuning(runs: dict[str, Run]) -> str:
    lines, sweeps, held = [], [], False
    for arm, name in ARMS.items():
        metrics = runs[arm].metrics()
        light = {"pretrained": "#8fb8c6", "scratch": "#e6b39d"}[arm]
        lines.append(series(metrics, "loss", f"{name}, training", light, width=1.5))
        lines.append(series(metrics, "held_out_loss", f"{name}, held-out labels", COLOURS[arm], width=2.6, dots=True))
        held |= bool(lines[-1].x)
        decoder = runs[arm].decoder.model_copy(update={"threshold": None}).model_dump()
        table = [row for row in runs[arm].record.get("threshold_table", []) if row["config"] == decoder]
        sweeps.append(Line(name, [r["threshold"] for r in table], [r["adapted_rand_error"] for r in table], COLOURS[arm]))
    schedule = runs["scratch"].config.schedule
    chosen = runs["pretrained"].record.get("threshold_chosen_on", "")
    losses = line_chart(lines, "step", "binary cross-entropy of affinities")
    sweep = line_chart(sweeps, "agglomeration threshold", "adapted Rand error, held-out labels")
    return f"""<section><h2>Fine-tuning</h2>{losses}
<p class="note">Both arms see the same crops in the same order: {schedule.steps} steps of {schedule.batch}, {minutes(trained_seconds(runs["scratch"]))} each.
{"" if held else "The held-out labels are smaller than a crop: only their scores were watched."}</p>
<details><summary>Choice of the threshold on held-out labels</summary>{sweep}<p class="note">{esc(chosen)}; the lowest
√(adapted Rand error × VOI) decides, of a plateau its middle.</p></details></section></div>"""


def pictures(mae: Run) -> str:
    rows = []
    for crop in reconstructions(mae):
        width = crop["width_nm"]
        captions = {"original": "original", "hidden": "what the encoder sees", "reconstruction":
                    f"reconstruction, error {crop['errors'][0]:.2f}", "interpolation": f"interpolation, error {crop['errors'][1]:.2f}"}
        rows.append('<div class="row four">' + "".join(
            figure(enlarge(crop[k], 2, 2), caption, width, round_length_nm(width) if k == "original" else None)
            for k, caption in captions.items()) + "</div>")
    return (f"<h2>Reconstructions</h2><p class=note>Middle sections of crops of "
            f"{'held-out' if mae.config.held_out else 'training'} tissue. Visible patches are shown as they are; errors are mean "
            f"squared, over the hidden voxels of the section. A network trained on squared error answers with the mean of what it "
            f"thinks possible, which is smooth.</p>{''.join(rows)}")


def instances(folder: Path, demo: dict) -> str:
    captions = {"raw": "raw", "affinities": "predicted affinities", "pretrained": "instances, pre-trained",
                "scratch": "instances, from scratch", "true": "truth"}
    raw = open_volume(demo["test"])
    width = raw.shape[2] * raw.require_voxel_size()[2]
    text = []
    for name, rows in segmentations(folder, demo["test"]).items():
        title = "Sections of the test volume (xy)" if name == "xy" else "Across the sections (xz), in true proportions"
        text.append(f"<h2>{title}</h2>")
        if name == "xy":
            text.append("<p class=note>Affinities: mean over the nearest neighbours in y and x of the pre-trained network, dark = boundary. "
                        "A predicted object has the colour of the true one it holds most of; other colours are splits, "
                        "one colour over two true objects is a merge.</p>")
        for row in rows:
            text.append('<div class="row five">' + "".join(
                figure(row[k], f"{caption}, {row['where']}" if k == "raw" else caption, width,
                       round_length_nm(width) if k == "raw" else None) for k, caption in captions.items()) + "</div>")
    return "".join(text)


def transfer(run: Run) -> str:
    moved = run.record["transfer"]
    kinds = ("matched", "resized", "missing", "unexpected")
    meaning = {"matched": "copied as they are", "resized": "interpolated to another shape",
               "missing": "left as initialised", "unexpected": "in the pre-training run only"}
    rows = "".join(f"<tr><th scope=row>{k}</th><td>{len(moved[k])}</td><td class=text>{meaning[k]}</td></tr>" for k in kinds)
    names = "\n".join(f"{k}: {name}" for k in kinds for name in moved[k])
    return (f"<h2>Transfer</h2><p>{moved['coverage']:.1%} of the encoder's parameters came from pre-training.</p>"
            f"<div class=scroll><table class=narrow><thead><tr><th></th><th>tensors</th><th></th></tr></thead><tbody>{rows}</tbody>"
            f"</table></div><details><summary>All tensors</summary><pre>{esc(names)}</pre></details>")


def settings(folder: Path, demo: dict, runs: dict[str, Run]) -> str:
    record = runs["mae"].record
    packages = "torch numpy scikit-image waterz".split()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    configs = {name: runs[name].config.model_dump_json(indent=1) for name in ("mae", "pretrained")}
    configs["scratch"] = "the same as pretrained; --from scratch" if runs["scratch"].config == runs["pretrained"].config else \
        runs["scratch"].config.model_dump_json(indent=1)
    configs["classical"] = json.dumps(demo["results"]["classical"]["config"], indent=1)
    details = "".join(f"<details><summary>Configuration: {esc(k)}</summary><pre>{esc(v)}</pre></details>" for k, v in configs.items())
    return (f"<h2>Again, by hand</h2><pre>{esc(chr(10).join(demo['commands']))}</pre>"
            f"<p>Seed {runs['mae'].config.seed}, {record['threads']} threads, emae {esc(record['code'])}, Python {esc(record['python'])}, "
            f"{esc(versions)}; started {esc(record['created'])}. The same seed at the same number of threads of the same machine gives the "
            f"same numbers.</p>{details}<p class=note>{esc(demo['licence'])}</p>")


def series(metrics: list[dict], key: str, name: str, colour: str, **style: Any) -> Line:
    found = [m for m in metrics if key in m]
    return Line(name, [m["step"] for m in found], [m[key] for m in found], colour, **style)


def trained_seconds(run: Run) -> float:
    return next((m["seconds"] for m in reversed(run.metrics()) if "seconds" in m), 0.0)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


STYLE = """
*{box-sizing:border-box}body{margin:0;background:#fcfcfb;color:#1d2328;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}main{max-width:1160px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}p{margin:.5rem 0;max-width:52rem}
.lead{font-size:1.08rem}.note,figcaption{color:#56606a;font-size:.86rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
table.narrow{width:auto}th,td{padding:.42rem .7rem;text-align:right;border-bottom:1px solid #e3e6e8;white-space:nowrap}
thead th{font-weight:500;color:#56606a;font-size:.82rem;line-height:1.3;vertical-align:bottom}
tbody th{font-weight:500;text-align:left;white-space:normal;min-width:11rem}td.text{text-align:left}
tr.best td:nth-child(2){font-weight:700}
.two{display:grid;grid-template-columns:1fr 1fr;gap:2.4rem}.two>section{min-width:0}
svg{width:100%;height:auto;display:block}svg text{font-size:13px;fill:#56606a}.grid{stroke:#e6e9eb}.axis{stroke:#8b949b}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;font-size:.84rem;margin:.3rem 0 .5rem}
.legend span{display:inline-flex;align-items:center;gap:.4rem}svg.key{width:26px;height:8px;flex:none}
.row{display:grid;gap:10px;margin:0 0 14px}.four{grid-template-columns:repeat(4,1fr)}.five{grid-template-columns:repeat(5,1fr)}
figure{margin:0;min-width:0}.shot{position:relative}img{width:100%;height:auto;display:block;image-rendering:auto}
.bar{position:absolute;left:10px;bottom:9px;height:4px;background:#fff;box-shadow:0 0 0 1px rgba(0,0,0,.55)}
.barlabel{position:absolute;left:10px;bottom:15px;color:#fff;font-size:.75rem;line-height:1.2;text-shadow:0 0 3px #000,0 0 3px #000}
figcaption{margin-top:.2rem;line-height:1.35}pre{background:#f1f3f4;padding:.8rem 1rem;overflow-x:auto;font-size:.82rem;line-height:1.45;border-radius:4px}
details{margin:.5rem 0}summary{cursor:pointer;color:#0b6e8c}
@media(max-width:760px){.two{grid-template-columns:1fr;gap:0}.four,.five{grid-template-columns:repeat(2,1fr)}h1{font-size:1.4rem}main{padding:18px 14px 40px}}
"""
