"""The documentation says what the code does: its commands, links, keys, numbers and examples; and
the Makefile does what it promises.
"""

import glob
import importlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from checkpoint import save_weights
from config import KEYS, SECTIONS, get_config, load_config, parse_args
from models import build_model
from tests.helpers import ROOT, copy_project, imported_packages, run_main

FOLDERS = ("", "docs/", "benchmarks/", "kernels/*/")
PAGES = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md")]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in PAGES)
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCS}
REQUIREMENTS = sorted(path.name for path in ROOT.glob("requirements*.txt"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# First line of a part of an example: a file of its own, lines for the end of one, changed lines.
PART = re.compile(r"# (file|append|edit): (\S+)\n")
YAML_PATH = re.compile(r"(?<![\w/.])(?:configs/)[\w./*-]*\.yaml")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def commands(text: str) -> list[list[str]]:
    """The words of each command line in the bash blocks, continuation lines joined."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [
        words for line in lines if "$(" not in line and (words := shlex.split(line, comments=True))
    ]


def main_commands(name: str) -> list[list[str]]:
    """What follows main.py in each command of a document."""
    return [
        words[words.index("main.py") + 1 :] for words in commands(TEXT[name]) if "main.py" in words
    ]


@dataclass(frozen=True)
class Example:
    """A section of CONTRIBUTING.md that adds a part: (what to do, path, text) of each file, and
    the commands.
    """

    parts: list[tuple[str, str, str]]
    commands: list[list[str]]

    @property
    def files(self) -> list[str]:
        """The files that a reader writes."""
        return [path for action, path, _ in self.parts if action == "file"]

    def write(self, folder: Path) -> None:
        """Does to a copy of the project what the section says."""
        for action, path, text in self.parts:
            target = folder / path
            if action == "file":
                assert not target.exists(), f"{path} is an example; a reader could not write it"
            else:
                text = changed(target.read_text(encoding="utf-8"), action, text)
            target.write_text(text, encoding="utf-8")


def changed(content: str, action: str, text: str) -> str:
    """`content` with `text` at its end, or after the lines of a diff, found where they stand."""
    if action == "append":
        return f"{content}\n\n{text}"
    lines = text.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert content.count(old) == 1, old
    return content.replace(old, new)


def examples() -> dict[str, Example]:
    """Heading -> what CONTRIBUTING.md tells a reader to write under it."""
    found = {}
    for section in TEXT["CONTRIBUTING.md"].split("\n### ")[1:]:
        bodies = [body for _, body in BLOCK.findall(section.partition("\n## ")[0])]
        parts = [
            (part[1], part[2], body[part.end() :]) for body in bodies if (part := PART.match(body))
        ]
        found[section.partition("\n")[0]] = Example(parts, commands(section))
    return found


def example_files() -> set[str]:
    return {path for example in examples().values() for path in example.files}


def test_all_documents_are_looked_at():
    assert {
        "README.md",
        "get_started.md",
        "SwinV2_README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        "docs/near_identity.md",
        "kernels/window_attention/README.md",
    } <= set(DOCS)
    assert len(main_commands("README.md")) >= 8
    assert len(main_commands("get_started.md")) >= 10
    assert len(examples()) == 5


def test_the_readme_is_a_page_of_at_most_200_lines():
    assert len(TEXT["README.md"].splitlines()) <= 200


# Commands, as written


@pytest.mark.parametrize("name", DOCS)
def test_flags_keys_and_values_of_every_documented_command_are_accepted(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in main_commands(name):
        if not set(words) & example_files():
            get_config(parse_args(words))


def test_the_command_at_the_head_of_every_yaml_is_accepted_and_names_that_yaml(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(glob.glob("configs/**/*.yaml", recursive=True)):
        head = "\n".join(
            line[1:] for line in Path(path).read_text().splitlines() if line.startswith("#")
        ).replace("\\\n", " ")
        lines = [shlex.split(line) for line in head.splitlines() if " main.py --cfg" in line]
        assert len(lines) == 1, path
        args = parse_args(lines[0][lines[0].index("main.py") + 1 :])
        assert args.cfg == path and get_config(args)


@pytest.mark.parametrize("name", DOCS)
def test_scripts_tests_and_modules_named_in_commands_exist(name):
    for words in commands(TEXT[name]):
        if words[0] == "python":
            module = words[1] == "-m"
            target = (
                words[1]
                if not module
                else words[3]
                if words[2] == "pytest"
                else words[2].replace(".", "/") + ".py"
            )
            assert (ROOT / target).is_file() or target in example_files(), words


@pytest.mark.parametrize("name", DOCS)
def test_every_make_command_names_a_target(name):
    makes = [words[1:] for words in commands(TEXT[name]) if words[0] == "make"]
    for words in makes + [
        shlex.split(found) for found in re.findall(r"`make ([^`]+)`", TEXT[name])
    ]:
        done = subprocess.run(
            ["make", "-n", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=clean_environment(),
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)


# Links, paths, keys


@pytest.mark.parametrize("name", DOCS)
def test_every_link_within_the_repository_leads_somewhere(name):
    for target, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(?:#([\w-]+))?\)", TEXT[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCS)
def test_every_yaml_that_is_named_exists(name):
    for path in YAML_PATH.findall(TEXT[name]):
        assert path in example_files() or glob.glob(str(ROOT / path)), path


@pytest.mark.parametrize("name", DOCS)
def test_every_configuration_key_that_is_named_exists(name):
    named = re.findall(r"`([A-Z]+(?:\.[A-Z_0-9]+)+)\b", TEXT[name])
    unknown = [key for key in named if key not in KEYS and key not in SECTIONS]
    assert not unknown


@pytest.mark.parametrize(
    "name",
    [*DOCS, "Makefile", ".ci/run", "pyproject.toml", *REQUIREMENTS],
)
def test_no_document_or_script_names_a_place_of_one_machine(name):
    place = re.compile(
        r"(?<![\w.])/(?:home|root|tmp|opt|work|mnt|Users)/|index-url|\d+\.\d+\.\d+\.\d+:"
    )
    assert not place.findall((ROOT / name).read_text(encoding="utf-8"))


# Numbers


def counted_rows(name: str) -> list[tuple[str, str, str]]:
    """(YAML, parameters, GMACs) of each table row that links a YAML and ends with these two."""
    counted = []
    for line in TEXT[name].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        link = re.search(r"\((configs/[^)]+\.yaml)\)", cells[0])
        if line.startswith("|") and link and "," in cells[-2]:
            counted.append((link[1], cells[-2], cells[-1]))
    return counted


COUNT = """
import sys, torch
from config import load_config
from models import build_model

linspace = torch.linspace
# the models read its values
torch.linspace = lambda *values, **options: linspace(*values, **{**options, "device": "cpu"})
torch.set_default_device("meta")  # shapes only
for path in sys.argv[1:]:
    model = build_model(load_config(path))
    print(path, f"{sum(p.numel() for p in model.parameters()):,}", f"{model.flops() / 1e9:.3f}")
"""


def test_parameters_and_multiply_accumulates_in_the_tables_are_those_of_the_models():
    rows = counted_rows("README.md") + counted_rows("SwinV2_README.md")
    assert len(rows) >= 30
    paths = [path for path, _, _ in rows]
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == rows


def test_published_accuracies_in_the_tables_are_those_in_the_yamls():
    for line in TEXT["SwinV2_README.md"].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        link = re.search(r"\((configs/[^)]+\.yaml)\)", cells[0])
        if link and len(cells) == 9 and cells[4]:
            assert f"Published: {cells[4]} / {cells[5]} %" in (ROOT / link[1]).read_text(), line


# Commands, run


@pytest.fixture
def quiet(monkeypatch):
    """main.main in this process, from the repository root; what it changes for the whole process is
    put back.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    root, warnings_shown, state = (
        logging.getLogger(),
        sys.modules["warnings"].showwarning,
        torch.get_rng_state(),
    )
    handlers, threads = list(root.handlers), torch.get_num_threads()
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)
    sys.modules["warnings"].showwarning = warnings_shown
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def reduced(words: list[str], folder: Path, places: dict[str, str]) -> list[str]:
    """The same command with one update, a few images, on the CPU, with output below `folder`."""
    words = [
        places.get(
            word, str(folder / word.removeprefix("output/")) if word.startswith("output/") else word
        )
        for word in words
    ]
    batch = [] if "configs/digits" in " ".join(words) else ["--batch-size", "2"]
    extra = [
        "TRAIN.MAX_STEPS",
        "1",
        "DATA.NUM_WORKERS",
        "0",
        "LOG.TENSORBOARD",
        "False",
        "LOG.PLOT",
        "False",
    ]
    return [*words, *batch, "--output", str(folder), "--device", "cpu", "--opts", *extra]


def test_documented_commands_on_digits_run(quiet, tmp_path, capsys):
    """In the order of the documents, as a reader would, since some use what an earlier one has
    written.
    """
    run, seen = 0, set()
    first = ["--cfg", "configs/digits/digits_tiny.yaml"]
    for words in [first, *main_commands("README.md"), *main_commands("get_started.md")]:
        if "configs/digits" not in " ".join(words) or tuple(words) in seen:
            continue
        seen.add(tuple(words))
        argv = reduced(words, tmp_path, {})
        assert main.main(argv) == 0, (words, capsys.readouterr().err)
        run += 1
    assert run >= 8
    assert (tmp_path / "digits_tiny/default/per_class.csv").is_file()


def test_the_documented_prediction_runs(quiet, tmp_path, capsys):
    assert main.main(reduced(["--cfg", "configs/digits/digits_tiny.yaml"], tmp_path, {})) == 0
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "digit.png")
    code = next(block for block in blocks(TEXT["get_started.md"], "python") if "digit.png" in block)
    exec(
        compile(
            code.replace("output/", f"{tmp_path}/").replace("digit.png", f"{tmp_path}/digit.png"),
            "get_started.md",
            "exec",
        ),
        {},
    )
    assert re.search(r"^digit \d, probability [01]\.\d\d$", capsys.readouterr().out, re.MULTILINE)


def test_the_statistics_in_the_documented_prediction_are_those_of_training(quiet):
    from data.sets import DATASETS

    mean, std = DATASETS["digits"].statistics(channels=1)
    assert f"mean={mean}, std={std}" in TEXT["get_started.md"]


def test_python_in_the_readme_runs_and_gives_the_shapes_it_states(quiet):
    names: dict = {}
    (code,) = blocks(TEXT["README.md"], "python")
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 1000)
    assert [224 // feature.shape[-1] for feature in names["maps"]] == [4, 8, 16, 32]


def test_the_documented_torchrun_command_trains_with_two_processes(tmp_path):
    (words,) = [
        words
        for words in commands(TEXT["get_started.md"])
        if words[0] == "torchrun" and "--nproc-per-node=2" in words
    ]
    done = run_main(*reduced(words[words.index("main.py") + 1 :], tmp_path, {}), nproc=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits_tiny/two/log_rank1.txt").is_file()


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    """Stand-ins for what the documents call IMAGENET, MY_IMAGES, ...: the same layout, noise for
    images, random weights.
    """
    timm = pytest.importorskip("timm")
    wnids = list(timm.data.ImageNetInfo("imagenet-1k").label_names())
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    for root, classes in (("IMAGENET", wnids), ("MY_IMAGES", ["cat", "dog", "owl"])):
        for split, shown in (("train", classes), ("val", classes[:2])):
            for name in classes:
                (tmp_path / root / split / name).mkdir(parents=True)
            for name in shown:
                shutil.copy(tmp_path / "image.jpg", tmp_path / root / split / name / "a.jpg")
                shutil.copy(tmp_path / "image.jpg", tmp_path / root / split / name / "b.jpg")
    found = {
        name: str(tmp_path / name) for name in ("IMAGENET", "MY_IMAGES", "IMAGENET_ZIP", "MY_ZIP")
    }
    for name in re.findall(r"\b(swin\w+?)\.(?:pth|safetensors)\b", "".join(TEXT.values())):
        path = ROOT / "configs" / name.split("_")[0] / f"{name}.yaml"
        if path.is_file():
            found[f"{name}.pth"] = str(tmp_path / f"{name}.pth")
            save_weights(found[f"{name}.pth"], build_model(load_config(path)).state_dict(), {})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "get_started.md", "SwinV2_README.md"])
def test_documented_commands_on_imagenet_and_own_images_run(name, quiet, places, tmp_path, capsys):
    """One update of a few images, on stand-ins for the data and the weights; under torchrun in the
    documents, in one process here.
    """
    for number, words in enumerate(commands(TEXT[name])):
        if "main.py" in words and "configs/digits" not in " ".join(words):
            argv = reduced(words[words.index("main.py") + 1 :], tmp_path / f"out{number}", places)
            assert main.main(argv) == 0, (words, capsys.readouterr().err)
        elif words[:2] == ["python", "-m"] and words[2].startswith("tools."):
            assert (
                importlib.import_module(words[2]).main(
                    [places.get(word, word) for word in words[3:]]
                )
                == 0
            ), words
        elif words[0] == "python" and words[1].startswith("tools/"):
            module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
            argv = [
                places.get(word, str(tmp_path / word) if word.endswith(".safetensors") else word)
                for word in words[2:]
            ]
            assert module.main(argv) == 0, words


def run_examples(chosen: list[Example], project: Path) -> None:
    """Their tests and one update of each of their trainings, in a copy of the project that has
    their files.
    """
    copy_project(project)
    for path in ("pyproject.toml", "tests/__init__.py"):
        (project / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, project / path)
    for name in ("models", "data"):
        (project / "tests" / name).mkdir()
        shutil.copy(ROOT / "tests" / name / "__init__.py", project / "tests" / name)
    for example in chosen:
        example.write(project)
    tests, trainings = zip(*(example.commands for example in chosen))
    files = [words[-1] for words in tests]
    once = ("--output", "out", "--opts", "TRAIN.MAX_STEPS", "1", "LOG.TENSORBOARD", "False")
    argvs = [[*words[words.index("main.py") + 1 :], *once] for words in trainings]
    code = f"import pytest, main; assert pytest.main({files}) == 0"
    code += f"; assert not any([main.main(argv) for argv in {argvs}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**clean_environment(), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(project.glob("out/*/default/best.pth"))) == len(chosen)


def test_the_examples_of_contributing_work_as_they_stand(tmp_path):
    run_examples(list(examples().values()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", examples())
def test_each_example_of_contributing_works_alone(name, tmp_path):
    run_examples([examples()[name]], tmp_path)


@pytest.mark.parametrize("name", examples())
def test_contributing_counts_the_files_and_edits_of_each_example(name):
    (row,) = [
        line
        for line in TEXT["CONTRIBUTING.md"].splitlines()
        if line.startswith(f"| [{name[0].lower()}{name[1:]}]")
    ]
    _, files, edits = [cell.strip() for cell in row.strip("| ").split("|")]
    parts = examples()[name].parts
    assert files.split(":")[0] == str(len(examples()[name].files))
    assert edits.split(":")[0] == str(sum(action != "file" for action, _, _ in parts))


def test_the_map_of_contributing_has_every_room_in_at_most_25_lines():
    section = TEXT["CONTRIBUTING.md"].partition("\n## A map\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) <= 25
    assert all("?" in row for row in rows[2:])
    named = re.findall(r"`([\w./]+)`", "\n".join(rows))
    rooms = {path.name for path in ROOT.glob("*.py")}
    rooms |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= {path.partition("/")[0] for path in named}
    assert all((ROOT / path).exists() for path in named)


# Installation


def clean_environment() -> dict[str, str]:
    """Without what a calling make or pytest has set."""
    dropped = ("MAKE", "MFLAGS", "PYTEST", "PYTHON", "VENV", "SYSTEM_PYTHON", "ARGS", "JOBS")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
        check=False,
    )


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A folder with the Makefile and a stand-in for Python that writes down what it is asked to
    do.
    """
    for name in ("Makefile", *REQUIREMENTS):
        shutil.copy(ROOT / name, tmp_path / name)
    script = tmp_path / "python-stand-in"
    script.write_text(
        '#!/bin/sh\necho "$*" >> calls\ncase "$*" in\n"-m venv "*) mkdir -p "$3/bin" && cp "$0"'
        ' "$3/bin/python";;\nesac\n'
    )
    script.chmod(0o755)
    return tmp_path


def test_quickstart_creates_installs_and_trains_and_the_second_time_only_trains(fresh):
    run = ["-m kernels.window_attention", "main.py --cfg configs/digits/digits_tiny.yaml"]
    assert make("quickstart", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode == 0
    calls = (fresh / "calls").read_text().splitlines()
    assert calls[-4:] == [
        "-m venv .venv",
        "-m pip install --disable-pip-version-check -r requirements.txt",
        *run,
    ]
    (fresh / "calls").unlink()
    assert make("quickstart", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode == 0
    assert (fresh / "calls").read_text().splitlines() == run


def test_a_changed_requirements_file_is_installed_again(fresh):
    assert make("test", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode == 0
    (fresh / "calls").unlink()
    later = (fresh / ".venv/requirements-dev.done").stat().st_mtime + 10
    os.utime(fresh / "requirements.txt", (later, later))
    assert make("test", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode == 0
    assert (
        "-m pip install --disable-pip-version-check -r requirements-dev.txt"
        in (fresh / "calls").read_text()
    )


def test_a_failed_installation_is_tried_again(fresh):
    script = fresh / "python-stand-in"
    script.write_text(script.read_text() + 'case "$*" in *pip*) [ -e online ] || exit 1;; esac\n')
    assert make("quickstart", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode != 0
    (fresh / "online").touch()
    assert make("quickstart", "SYSTEM_PYTHON=./python-stand-in", cwd=fresh).returncode == 0


def test_an_existing_environment_is_used_and_nothing_is_created(fresh):
    assert make("quickstart", "PYTHON=./python-stand-in", cwd=fresh).returncode == 0
    assert (fresh / "calls").read_text().splitlines() == [
        "tools/check_environment.py requirements.txt",
        "-m kernels.window_attention",
        "main.py --cfg configs/digits/digits_tiny.yaml",
    ]
    assert not (fresh / ".venv").exists()


def test_missing_packages_of_an_existing_environment_are_named_in_one_line():
    done = make("quickstart", f"PYTHON={sys.executable} -S")  # -S: without its packages
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(errors) == 1
    assert "torch is missing" in errors[0] and "-m pip install -r requirements.txt" in errors[0]


def test_a_python_that_is_too_old_or_absent_is_an_error_that_creates_nothing(fresh):
    (fresh / "python-stand-in").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n'
    )
    for name, word in (("./python-stand-in", "Python 3.9.1"), ("no-such-python", "not found")):
        done = make("quickstart", f"SYSTEM_PYTHON={name}", cwd=fresh)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert (
            done.returncode != 0 and len(errors) == 1 and word in errors[0] and "3.10" in errors[0]
        )
        assert not (fresh / ".venv").exists()


def test_the_environment_check_names_old_versions_and_accepts_replacements(tmp_path, monkeypatch):
    check = importlib.import_module("tools.check_environment")
    versions = {"torch": "2.9.1+cu128", "numpy": "2.4.6", "opencv-python": "5.0.0.93"}

    def version(name):
        if name not in versions:
            raise check.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(check.metadata, "version", version)
    (tmp_path / "base.txt").write_text(
        "torch>=2.10  # a reason\nnumpy>=1.26\n\n# opencv\nopencv-python-headless>=4.8\n"
    )
    (tmp_path / "more.txt").write_text("-r base.txt\nyacs\n")
    assert check.problems(tmp_path / "more.txt") == [
        "torch is 2.9.1+cu128, needed is 2.10",
        "yacs is missing",
    ]


def test_the_development_packages_are_the_same_in_both_files():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [
        line
        for line in (ROOT / "requirements-dev.txt").read_text().splitlines()
        if line and line[0] not in "#-"
    ]
    assert project["project"]["optional-dependencies"]["dev"] == lines
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]


def test_every_module_of_the_repository_is_packaged():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    assert packages == {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}


def test_every_package_that_is_imported_is_required():
    """Directly imported ones; tests and tools may use the development packages too."""
    known = {
        "cv2": "opencv-python-headless",
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
    required = {
        line.split(">=")[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    }
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    own = packages | {path.stem for path in ROOT.glob("*.py")}
    own |= {"library"}  # kernels/setup.py runs in its own folder
    # an extra; a dependency of torch; what pip builds with
    optional = {"wandb", "filelock", "setuptools"}
    files = [
        *ROOT.glob("*.py"),
        *(path for name in packages for path in (ROOT / name).rglob("*.py")),
    ]
    for path in files:
        for name in imported_packages(path) - own - set(sys.stdlib_module_names):
            assert known.get(name, name) in required | optional, f"{path}: {name}"


def test_ci_runs_the_two_commands_and_checks_the_accuracy():
    script = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert script.index("\nmake quickstart") < script.index("< 98") < script.index("\nmake test\n")
    assert script.index("\nmake test\n") < script.index("\nmake test-integration\n")
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=False).returncode == 0


@pytest.mark.parametrize("scores, status", [([97.0, 98.4, 98.1], 0), ([97.99], 1)])
def test_the_accuracy_check_of_ci_fails_below_98_percent(scores, status, tmp_path):
    code = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON\n", (ROOT / ".ci/run").read_text(), re.DOTALL)[1]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "val", "acc1": score}) + "\n" for score in scores)
    )
    for name in ("best.pth", "last.pth", "model.safetensors", "curves.png"):
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
