"""The wheel that users install, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = ("torch", "transformers", "lightning", "datasets", "peft", "pyarrow", "matplotlib")


def run(*command: object, cwd: Path) -> str:
    """Run a command away from the repository and return what it printed."""
    env = {**os.environ, "COLUMNS": "200"}
    env.pop("PYTHONPATH", None)
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, made from the source distribution, so that neither can lack a file."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of programs of a fresh environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    programs, packages = (Path(sysconfig.get_path(p, scheme, paths)) for p in ("scripts", "purelib"))
    python = programs / Path(sys.executable).name
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # Dependencies come from here without a second download. Lines of a .pth are not read for further .pth files,
    # so that an editable install of the repository stays out of sight.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return programs


def assets(kind: str) -> dict[str, Path]:
    """Return the repository's YAML files by bare name, found without the package's own code."""
    return {p.relative_to(ROOT / kind).with_suffix("").as_posix(): p for p in (ROOT / kind).rglob("*.yaml")}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_robust"}
    for kind in ("recipes", "callbacks"):
        packed = {name for name in names if name.startswith(f"lightning_robust/_assets/{kind}/")}
        assert {f"lightning_robust/_assets/{kind}/{name}.yaml" for name in assets(kind)} <= packed
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_robust").rglob("*.py")}
    assert sources | {"lightning_robust/py.typed"} <= set(names)
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_robust").rglob("*.jinja")}
    assert templates
    assert templates <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_finds_its_recipes_and_leaks_no_package(installed, tmp_path):
    python = installed / Path(sys.executable).name
    where = run(python, "-c", "import lightning_robust; print(lightning_robust.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    for name in ("recipes", "callbacks"):
        code = f"import importlib.util as u; raise SystemExit(u.find_spec({name!r}) is not None)"
        run(python, "-c", code, cwd=tmp_path)

    listed = {
        line.split()[0]
        for line in run(installed / "lightning-robust", "ls", cwd=tmp_path).splitlines()
        if line
    }
    recipes, fragments = assets("recipes"), assets("callbacks")
    assert recipes
    assert fragments
    assert {*recipes, *fragments} <= listed
    name, path = next(iter(recipes.items()))
    assert run(installed / "lightning-robust", "show", name, cwd=tmp_path) == path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_trains(installed, tmp_path):
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    run(
        installed / "lightning-robust",
        "fit",
        "-c",
        "demo",
        "--trainer.fast_dev_run=true",
        *quiet,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("arguments", [None, ["ls"], ["show", "demo"], ["--help"], ["report", "--help"]])
def test_what_trains_nothing_imports_nothing_heavy(arguments, tmp_path):
    command = "" if arguments is None else f"import lightning_robust.cli as c; c.main({arguments!r})"
    code = f"""
import sys, lightning_robust
try:
    {command or "pass"}
except SystemExit:
    pass
print("heavy:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "heavy:"
