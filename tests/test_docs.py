"""Every python and bash block of README.md and docs/ runs, in order, in a lab's folder; links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL, SMALL_SEGMENTER, emae_command, sets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = {"pretrain": sets(SMALL, "crop=[4,64,64]"), "finetune": sets(SMALL, SMALL_SEGMENTER, "crop=[4,64,64]")}
"""Added to the trainings of the pages: they run as written, but small and short."""


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, text) of the blocks to run."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


def run_line(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    assert program == "emae", f"{line}: only emae and make are run; write other things as ```text"
    if arguments[0] in QUICK:
        again = "config.json" in arguments[1]  # that one is small already
        arguments += [] if again else QUICK[arguments[0]]
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    code, _, err = emae_command(*arguments)
    assert code == 0, f"{line}: {err}"


@pytest.fixture
def beside_the_lab(lab, tmp_path, monkeypatch):
    """A copy of the lab's folder, its fine-tuned run as the demo's; `phantom` is small."""
    from emae import PhantomConfig, _datasets

    folder = tmp_path / "lab"
    shutil.copytree(lab, folder, ignore=shutil.ignore_patterns("*.zarr", "*.png"))
    shutil.copytree(folder / "runs/seg", folder / "runs/demo")
    monkeypatch.chdir(folder)
    small = {name: PhantomConfig(seed=k, shape=(12, 96, 96)) for k, name in enumerate(_datasets.PHANTOMS)}
    monkeypatch.setattr(_datasets, "PHANTOMS", small)
    return folder


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b[1] in ("python", "bash") for b in blocks(p))], ids=lambda p: p.name
)
def test_blocks_run(page, beside_the_lab):
    names: dict = {}
    for line, language, text in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), names)
        elif language == "bash":
            for command in text.replace("\\\n", " ").splitlines():
                if command.strip() and not command.startswith("#"):
                    run_line(command)


def test_the_first_screen_holds_the_path():
    """What it is, a picture, the two commands and the six lines, in this order, at the top."""
    text = (ROOT / "README.md").read_text()
    places = [
        text.index(part) for part in ("# emae", "](docs/images/", "make demo\nmake test", "import emae\n", "\n## ")
    ]
    assert places == sorted(places) and text[: places[-1]].count("\n") < 60
    path = next(block for _, language, block in blocks(ROOT / "README.md") if language == "python")
    assert len(path.splitlines()) == 6


def test_other_blocks_are_text():
    assert {language for page in PAGES for _, language, _ in blocks(page)} <= {"python", "bash", "text", "json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_wrong_block_fails(beside_the_lab):
    with pytest.raises(AssertionError, match="only emae and make"):
        run_line("rm -r x")
    with pytest.raises(AssertionError, match="absent"):
        run_line("emae score absent.h5:a stack.tif")
    with pytest.raises(subprocess.CalledProcessError):
        run_line("make nothing")
    assert not os.path.exists("x")
