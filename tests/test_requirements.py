"""Requirements on every Python that the project names; scripts/resolve.py asks the package index as well."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest
import runs
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import resolve  # noqa: E402, which lies in scripts/

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PYTHONS = resolve.pythons()


def pins(file: str) -> list[Requirement]:
    lines = (line.split("  #")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_the_pythons_are_the_same_everywhere():
    assert PYTHONS == [f"3.{minor}" for minor in range(11, 11 + len(PYTHONS))]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    setup, bounds = (ROOT / "scripts" / "setup.sh").read_text(), "({}) <= sys.version_info[:2] <= ({})"
    assert bounds.format(*(python.replace(".", ", ") for python in (PYTHONS[0], PYTHONS[-1]))) in setup
    assert re.findall(r"python(3\.\d+)", setup) == PYTHONS[::-1]
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-test.txt"])
@pytest.mark.parametrize("python", PYTHONS)
def test_no_pin_asks_for_another_python(file, python):
    """A package that refuses a Python has a marker which leaves it out there, or pip would install nothing at all."""
    for pin in filter(lambda pin: applies(pin, python), pins(file)):
        try:
            installed = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a tool that the tests do not import, or not of this Python
        if not pin.specifier.contains(installed.version):
            continue  # the pin of another Python; scripts/resolve.py looks at it
        supported = installed.metadata.get("Requires-Python") or ""
        assert SpecifierSet(supported).contains(f"{python}.99"), f"{pin} needs Python {supported}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_package_and_the_pins_name_the_same(python):
    pinned = {pin.name.lower(): pin for pin in pins("requirements.txt") if applies(pin, python)}
    for dependency in map(Requirement, PROJECT["dependencies"]):
        assert applies(dependency, python) == (dependency.name.lower() in pinned), dependency
        if pin := pinned.get(dependency.name.lower()):
            (version,) = pin.specifier
            assert dependency.specifier.contains(version.version)


@pytest.mark.parametrize("package, extra", [("libtpu", "tpu"), ("jax-cuda13-plugin", "cuda"), ("jax-cuda13-pjrt", "")])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_tests_compile_with_what_the_extras_install(package, extra, python):
    """JAX names the libtpu that it is built for. The compilers for CUDA have the version of JAX itself."""
    (jax_pin,) = (pin for pin in pins("requirements.txt") if pin.name == "jax" and applies(pin, python))
    (compiler,) = (pin for pin in pins("requirements-aot.txt") if pin.name == package and applies(pin, python))
    (version,) = compiler.specifier
    if package != "libtpu":
        assert compiler.specifier == jax_pin.specifier
    if extra and jax_pin.specifier.contains(importlib.metadata.version("jax")):
        (jax_extra,) = (Requirement(line) for line in PROJECT["optional-dependencies"][extra])
        needs = [Requirement(line) for line in importlib.metadata.requires("jax")]
        (need,) = (n for n in needs if n.name == package and n.marker.evaluate({"extra": "".join(jax_extra.extras)}))
        assert need.specifier.contains(version.version), f"{jax_pin} needs {need}"


def test_a_marker_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("backports.zstd==1.8.0\n")
    if sys.version_info < (3, 14):
        with pytest.raises(AssertionError, match="needs Python <3.14"):
            test_no_pin_asks_for_another_python("requirements.txt", "3.14")


def test_without_an_index_nothing_is_refused(monkeypatch):
    assert resolve.OFFLINE.search("error: Failed to fetch: `https://pypi.org/simple/jax/` cause: dns error")
    assert not resolve.OFFLINE.search("No solution found when resolving dependencies")


def test_a_wheel_has_every_file_of_the_package():
    package = ROOT / "lowrank_jax"
    files = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    for folder in {file.parent for file in files if file.suffix == ".py"}:
        assert (folder / "__init__.py") in files, f"setuptools would leave out {folder}"
    by_glob = {glob: set(package.glob(glob)) for glob in PYPROJECT["tool"]["setuptools"]["package-data"]["lowrank_jax"]}
    assert all(by_glob.values()), by_glob
    listed = set.union(*by_glob.values())
    assert {file for file in files if file.suffix != ".py"} == {file for file in listed if file.is_file()}


BUILD = """
import os, sys, tarfile
from setuptools import build_meta
_, built, unpacked = sys.argv  # which setuptools changes
archive = build_meta.build_sdist(built)
tarfile.open(f"{built}/{archive}").extractall(unpacked, filter="data")
os.chdir(f"{unpacked}/{archive.removesuffix('.tar.gz')}")
build_meta.build_wheel(built)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """Build a source archive from a copy of the repository, and a wheel from that archive; return their folder."""
    folder = tmp_path_factory.mktemp("built")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "copy", ignore=unwanted)
    line = [sys.executable, "-c", BUILD, str(folder), str(folder / "unpacked")]
    done = subprocess.run(line, cwd=folder / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_an_archive_of_the_sources_is_complete_and_a_wheel_of_it_has_the_package_and_the_configs(built):
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(archive) as sources:
        archived = {name.split("/", 1)[1] for name in sources.getnames() if "/" in name}
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*") if path.is_file()}
    roots = ("lowrank_jax/", "configs/", "docs/", "scripts/", "tests/")
    wanted = {name for name in files if name.startswith(roots) and "__pycache__" not in name}
    assert wanted <= archived, sorted(wanted - archived)[:9]
    with zipfile.ZipFile(wheel) as package:
        packed = {name for name in package.namelist() if ".dist-info/" not in name}
    configs = {f"lowrank_jax/{name}" for name in wanted if name.startswith("configs/")}
    assert packed == {name for name in wanted if name.startswith("lowrank_jax/")} | configs


@pytest.mark.slow
def test_an_installed_wheel_plans_lists_the_keys_and_ships_the_configs_outside_the_repository(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python, (wheel,) = tmp_path / "env" / "bin" / "python", built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "packages.pth").write_text("\n".join(packages))  # all but this one, which the wheel brought

    def run(*line) -> str:
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | runs.ENVIRONMENT
        done = subprocess.run([*map(str, line)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lowrank = python.with_name("lowrank")
    assert "\n  verify-resume " in run(lowrank, "--help")
    plan = json.loads(run(lowrank, "plan", "--config=quickstart", "--json").splitlines()[-1])
    assert [stage["phase"] for stage in plan["stages"]] == ["pretrain"] * 3 + ["sft"]
    assert "--config.pretrain.tokens_per_step=49152" in run(lowrank, "config", "tokens_per_step")
    (tmp_path / "mine.py").write_text("import near\nfrom configs import default\nget_config = default.get_config\n")
    (tmp_path / "near.py").write_text("")
    read = "from lowrank_jax import cli; import lowrank_jax; print(lowrank_jax.__file__)"
    path = run(
        python, "-Pc", f"{read}; cli.read_config(['--config=mine.py']); cli.read_config(['--config=preset:base'])"
    )
    assert path.strip() == str(site / "lowrank_jax" / "__init__.py")
