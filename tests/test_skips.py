"""A skipped test counts as failed where the whole suite runs."""

import os
import pathlib
import shutil
import subprocess

import conftest
import pytest

pytest_plugins = ["pytester"]
SKIPS = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("no browser")

def test_in_a_fixture(browser):
    pass

def test_in_its_body():
    pytest.skip("no compiler")

@pytest.mark.skipif(True, reason="no device")
def test_by_a_mark():
    pass

def test_that_runs():
    pass
"""
REASONS = ("no browser", "no compiler", "no device", "could not import 'no_such_package'")


@pytest.mark.parametrize("variable, allowed", [("1", False), ("", True), (None, True)])
def test_a_skip_fails_with_its_reason_where_none_is_allowed(pytester, monkeypatch, variable, allowed):
    monkeypatch.delenv("LOWRANK_NO_SKIP", raising=False)
    if variable is not None:
        monkeypatch.setenv("LOWRANK_NO_SKIP", variable)
    pytester.makepyfile(test_a=SKIPS, test_b='import pytest\npytest.importorskip("no_such_package")')
    report = pytester.inline_run("-ra", "--continue-on-collection-errors", "-p", "no:cacheprovider", plugins=[conftest])
    passed, skipped, failed = report.listoutcomes()
    assert [item.nodeid for item in passed] == ["test_a.py::test_that_runs"]
    assert len(skipped if allowed else failed) == 4 and not (failed if allowed else skipped)
    assert report.ret == (0 if allowed else 1)
    reasons = sorted(str(item.longrepr) for item in (skipped if allowed else failed))
    assert all(any(reason in text for text in reasons) for reason in REASONS), reasons


def test_without_python_3_12_the_smoke_set_is_left_out_in_one_line(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(pathlib.Path(__file__).parents[1] / "scripts" / "smoke.sh", tmp_path / "scripts")
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([tmp_path / "bash", tmp_path / "scripts/smoke.sh"], env=env, capture_output=True, text=True)
    expected = "== no smoke set on the newest JAX: Python 3.12 with its venv module is not installed\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.parametrize("browser", ["chromium", "google-chrome", None])
def test_the_script_allows_no_skip_and_needs_a_browser(tmp_path, browser):
    """Run the script itself with stand-ins for all programs that it calls."""
    script, tools = pathlib.Path(__file__).parents[1] / "scripts" / "test.sh", tmp_path / "tools"
    tools.mkdir()
    shutil.copy(script, tmp_path / "test.sh")
    (tmp_path / "setup.sh").write_text("")
    for name in ("bash", "dirname", "id", "cat", "cmp"):
        (tools / name).symlink_to(shutil.which(name))
    says = {"python": 'echo "pytest $* no_skip=$LOWRANK_NO_SKIP"', "ruff": "", "apt-get": "exit 1", "sudo": "exit 1"}
    for name, line in (says | ({browser: ""} if browser else {})).items():
        (tools / name).write_text(f"#!{tools}/bash\n{line}\n")
        (tools / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "LOWRANK_NO_SKIP"} | {"PATH": str(tools)}
    pipes = {"capture_output": True, "text": True}
    run = lambda *args: subprocess.run([tools / "bash", tmp_path / "test.sh", *args, "-k", "x"], env=env, **pipes)
    if browser:
        marks = {(): "not study", ("quick",): "not slow and not study", ("studies",): "study"}
        for args, expected in marks.items():
            done = run(*args)
            assert done.returncode == 0 and f"-m {expected} -k x no_skip=1" in done.stdout.splitlines()[-1], done
    else:
        done = run()
        assert done.returncode == 1 and "error: the chat page" in done.stderr and "pytest" not in done.stdout, done
