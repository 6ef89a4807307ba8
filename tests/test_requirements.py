"""Requirements on every Python that the project names; scripts/resolve.py asks the package index as well."""

import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest
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
