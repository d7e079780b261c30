"""init.py from a fresh folder on: real environments and a real pip, but neither network nor torch.

Each test starts a copy of init.py in a folder of its own, with a requirements.txt that is served
from hand-made wheels beside it, and a main.py that tells what reached it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import init

REPOSITORY = Path(init.__file__).parent
BASE_PYTHON = init.base_python()
BIN = "Scripts" if os.name == "nt" else "bin"
STUB_MAIN = """
import json, sys
print(json.dumps({"prefix": sys.prefix, "flags": sys.argv[1:]}))
sys.exit(sys.argv.count("--fail") * 7)
"""
FLAGS = ["--prompts", "a black dog", "une fée", 'quo"te', "--k", "0"]


def house_at(folder: Path, requirements: str = "tinypkg") -> Path:
    """A folder as a user would have it after a clone, with wheels instead of an index."""
    folder.mkdir(parents=True)
    shutil.copy(init.__file__, folder / "init.py")
    (folder / "main.py").write_text(STUB_MAIN, encoding="utf-8")
    require(folder, requirements)
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n", encoding="utf-8")
    wheel(folder, "tinypkg", "1.0")
    return folder


def require(house: Path, requirements: str) -> None:
    """Write requirements.txt."""
    text = f"# A comment\n--no-index\n--find-links wheels\n{requirements}\n"
    (house / "requirements.txt").write_text(text, encoding="utf-8")


def wheel(house: Path, name: str, version: str, source: str = "", module: str = "__init__") -> None:
    """Make a wheel of one package by hand, since a build tool would have to be downloaded."""
    (house / "wheels").mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "",
        f"{name}/{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(house / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def settings(**changes: str) -> dict[str, str]:
    """The process environment of a user without an active environment or settings for pip."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CONDA", "PIP_", "PYTHON", "VIRTUAL_ENV", "COV_"))
    }
    return {**kept, "PIP_CONFIG_FILE": os.devnull, **changes}


def start(
    house: Path, *flags: str, python: str | Path = BASE_PYTHON, **changes: str
) -> subprocess.CompletedProcess[str]:
    """`python init.py flags`, from another folder than the program's."""
    return subprocess.run(
        [str(python), str(house / "init.py"), *flags],
        cwd=house.parent,
        env=settings(PYTHONIOENCODING="utf-8", **changes),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def python_in(house: Path) -> Path:
    """The Python of a house's .venv."""
    return house / ".venv" / BIN / ("python.exe" if os.name == "nt" else "python")


def stamp_of(house: Path) -> Path:
    """Where a house's stamp is, or is not."""
    return house / ".venv" / init.STAMP


def site_packages(house: Path) -> Path:
    """Where a house's packages are."""
    return next((house / ".venv").rglob("pip/__init__.py")).parents[1]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that init.py itself wrote about a failure; never is there a traceback."""
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A first start on a fresh machine, whose pip has a setting that can not work in a venv."""
    house = house_at(tmp_path_factory.mktemp("fresh") / "Été à la plage")
    done = start(house, *FLAGS, PIP_USER="1")
    done.args = house
    return done


@pytest.fixture
def house(first: subprocess.CompletedProcess[str], tmp_path: Path) -> Path:
    """A house with a complete environment, but without a stamp. Copied: a venv takes seconds."""

    def copy(source: str, target: str) -> None:
        # pip never writes into an existing file, so its thousand files can be shared.
        (os.link if "site-packages" in source else shutil.copy2)(source, target)

    house = tmp_path / "Größe 2"
    shutil.copytree(first.args, house, symlinks=True, copy_function=copy)
    stamp_of(house).unlink()
    return house


@pytest.fixture
def ready(first: subprocess.CompletedProcess[str], house: Path) -> Path:
    """A house as a successful start leaves it."""
    stamp = json.loads(stamp_of(first.args).read_text(encoding="utf-8"))
    stamp["location"] = str((house / ".venv").resolve())
    stamp_of(house).write_text(json.dumps(stamp), encoding="utf-8")
    assert start(house).stderr == ""
    return house


def test_first_start_makes_installs_and_hands_over(
    first: subprocess.CompletedProcess[str],
) -> None:
    told = json.loads(first.stdout)  # nothing else is on stdout: pip's messages are not results
    assert told["flags"] == FLAGS
    assert Path(told["prefix"]).samefile(first.args / ".venv")
    assert first.returncode == 0 and not errors(first)
    assert (site_packages(first.args) / "tinypkg").is_dir()
    assert stamp_of(first.args).exists()


def test_later_starts_are_silent_fast_and_forward_the_exit_code(
    first: subprocess.CompletedProcess[str],
) -> None:
    later = start(first.args, *FLAGS, "--fail")
    assert (later.returncode, later.stderr) == (7, "")
    assert json.loads(later.stdout)["flags"] == [*FLAGS, "--fail"]

    def seconds(script: str) -> float:
        began = time.perf_counter()
        subprocess.run(
            [BASE_PYTHON, str(first.args / script)], env=settings(), stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - began

    # The least of several starts: other processes can only make one slower.
    pairs = [(seconds("init.py"), seconds("main.py")) for _ in range(8)]
    through_init, alone = (min(column) for column in zip(*pairs, strict=True))
    assert through_init - alone < 0.2


def test_help_and_version_install_nothing(tmp_path: Path) -> None:
    house = house_at(tmp_path / "house")
    for flag in ("-h", "--help", "--version"):
        done = start(house, "--tempered_inference", flag)
        assert json.loads(done.stdout)["flags"] == ["--tempered_inference", flag]
        assert (done.returncode, done.stderr) == (0, "")
    assert not (house / ".venv").exists()


@pytest.mark.parametrize("flow", ["--tempered_inference", "--evaluate"])
def test_update_with_another_flow_is_the_users_mistake(tmp_path: Path, flow: str) -> None:
    house = house_at(tmp_path / "house")
    done = start(house, flow, "--update")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "--update runs alone" in done.stderr
    assert not (house / ".venv").exists()


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 9), (3, 9, 18), (3, 14, 0)])
def test_unsupported_python_is_refused_in_one_line(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    house = house_at(tmp_path / "house")
    pretend = (
        f"import pkgutil, runpy, sys; sys.version_info = {(*version, 'final', 0)};"
        f"sys.modules.update(dict.fromkeys(['pathlib'] if {version} < (3,) else []));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [BASE_PYTHON, "-c", pretend, str(house / "init.py")],
        env=settings(),
        capture_output=True,
        text=True,
    )
    shown = ".".join(map(str, version))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "3.10 to 3.13" in done.stderr and f"this is {shown}" in done.stderr
    assert not (house / ".venv").exists()


def test_an_unsupported_python_can_read_init() -> None:
    """Nothing in it is newer than Python 2.7, as far as a newer Python's parser can tell."""
    text = Path(init.__file__).read_text(encoding="ascii")  # 2.7 takes no other bytes
    tree = ast.parse(text, feature_version=(3, 4))
    assert [ast.unparse(node) for node in ast.walk(tree) if is_newer_than_2_7(node)] == []


def is_newer_than_2_7(node: ast.AST) -> bool:
    """Whether Python 2.7 has no syntax for it; what Python 3.4 has none for is not looked for."""
    if isinstance(node, ast.arguments):
        everyone = [*node.args, node.vararg, node.kwarg]
        return bool(node.kwonlyargs) or any(each and each.annotation for each in everyone)
    if isinstance(node, ast.FunctionDef):
        return node.returns is not None
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return any(isinstance(element, ast.Starred) for element in node.elts)
    if isinstance(node, ast.Call):
        starred = [isinstance(argument, ast.Starred) for argument in node.args]
        return any(starred[:-1]) or [each.arg for each in node.keywords].count(None) > 1
    if isinstance(node, ast.Dict):
        return None in node.keys
    if isinstance(node, ast.ClassDef):
        return bool(node.keywords)
    if isinstance(node, ast.Raise):
        return node.cause is not None
    return isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.Nonlocal, ast.YieldFrom))


def test_failed_pip_leaves_no_stamp_and_says_what_to_do(ready: Path) -> None:
    require(ready, "no-such-package")
    done = start(ready)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = errors(done)
    assert "requirements.txt" in line and "proxy" in line and "run the same command again" in line
    assert "no-such-package" in done.stderr  # pip's own message
    assert not stamp_of(ready).exists()

    require(ready, "tinypkg")
    assert start(ready).returncode == 0
    assert stamp_of(ready).exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libfoo.so is missing')", "ImportError: libfoo.so is missing"),
        ("import os; os._exit(13)", "exit code 13"),
    ],
)
def test_package_that_does_not_import_leaves_no_stamp(
    house: Path, source: str, reason: str
) -> None:
    wheel(house, "broken", "1.0", source)
    require(house, "tinypkg\nbroken")
    done = start(house)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = errors(done)
    assert "broken is installed but can not be imported" in line and reason in line
    assert not stamp_of(house).exists()


def test_changed_requirements_are_installed(ready: Path) -> None:
    wheel(ready, "second", "1.0")
    require(ready, "tinypkg\nsecond")
    done = start(ready)
    assert done.returncode == 0
    assert (site_packages(ready) / "second").is_dir()
    assert start(ready).stderr == ""


def test_stamp_for_another_python_or_a_damaged_one_is_no_stamp(ready: Path) -> None:
    found = "{}.{}.{}".format(*sys.version_info)
    config = ready / ".venv" / "pyvenv.cfg"
    config.write_text(config.read_text().replace(f"version = {found}", "version = 3.99.0"))
    assert "Checking" in start(ready).stderr
    assert start(ready).stderr == ""
    stamp_of(ready).write_text("[1, 2", encoding="utf-8")
    assert "Checking" in start(ready).stderr


@pytest.mark.parametrize("damage", ["interrupted pip", "no record", "no pyvenv.cfg", "no python"])
def test_half_made_venv_is_recognised(house: Path, damage: str) -> None:
    environment = init.Environment(house / ".venv", str(python_in(house)), ours=True)
    assert init.is_usable(environment)
    pip = site_packages(house) / "pip"
    {
        "interrupted pip": (pip / "_internal" / "cli" / "main.py").unlink,
        "no record": (next(pip.parent.glob("pip-*.dist-info")) / "RECORD").unlink,
        "no pyvenv.cfg": (house / ".venv" / "pyvenv.cfg").unlink,
        "no python": python_in(house).unlink,
    }[damage]()
    assert not init.is_usable(environment)


def test_half_made_venv_is_repaired_even_by_its_own_python(house: Path) -> None:
    (next(site_packages(house).glob("pip-*.dist-info")) / "RECORD").unlink()
    done = start(house, *FLAGS, python=python_in(house))
    assert json.loads(done.stdout)["flags"] == FLAGS
    assert "Rebuilding" in done.stderr and not errors(done)
    assert start(house).stderr == ""


def test_moved_folder_recovers(first: subprocess.CompletedProcess[str], house: Path) -> None:
    shutil.copy(stamp_of(first.args), stamp_of(house))
    (house / ".venv" / "leftover").touch()
    done = start(house, *FLAGS)
    assert json.loads(done.stdout)["flags"] == FLAGS
    assert Path(json.loads(done.stdout)["prefix"]).samefile(house / ".venv")
    assert not (house / ".venv" / "leftover").exists()  # made anew, not merely stamped anew
    assert start(house).stderr == ""


def test_machine_without_ensurepip_is_told_what_to_install(tmp_path: Path) -> None:
    house = house_at(tmp_path / "house")
    hide = (
        "import runpy, sys; sys.modules['ensurepip'] = None; import importlib.util as util;"
        "real = util.find_spec; util.find_spec = lambda n: None if n == 'ensurepip' else real(n);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [BASE_PYTHON, "-c", hide, str(house / "init.py")],
        env=settings(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(r"sudo apt install python3\.\d+-venv", done.stderr)


def test_active_virtual_environment_is_used_as_it_is(house: Path, tmp_path: Path) -> None:
    other = house_at(tmp_path / "another clone")
    done = start(other, python=python_in(house))
    assert Path(json.loads(done.stdout)["prefix"]).samefile(house / ".venv")
    assert not (other / ".venv").exists()
    assert stamp_of(house).exists()
    assert start(other, python=python_in(house)).stderr == ""


def test_active_conda_environment_is_used_and_an_inactive_one_is_not(tmp_path: Path) -> None:
    house = house_at(tmp_path / "house")
    base = Path(sys.base_prefix)
    managed = Path(os.__file__).with_name("EXTERNALLY-MANAGED").exists()

    def found(conda: Path) -> Path:
        program = "import init; print(init.find_environment().prefix)"
        command = [BASE_PYTHON, "-c", program]
        changed = settings(CONDA_PREFIX=str(conda))
        return Path(subprocess.check_output(command, cwd=house, env=changed, text=True).strip())

    assert found(base).samefile(base) if not managed else found(base) == house / ".venv"
    assert found(tmp_path) == house / ".venv"


def test_update_reports_what_changed(ready: Path) -> None:
    wheel(ready, "tinypkg", "2.0")
    done = start(ready, "--update")
    assert (done.returncode, done.stdout) == (0, "tinypkg 1.0 -> 2.0\n")
    assert start(ready).stderr == ""  # the stamp is valid
    done = start(ready, "--update", python=python_in(ready))
    assert (done.returncode, done.stdout) == (0, "Everything is up to date.\n")


def test_failed_update_is_a_failure(ready: Path) -> None:
    require(ready, "no-such-package")
    for done in (start(ready, "--update"), start(ready, "--update", python=python_in(ready))):
        assert (done.returncode, done.stdout) == (1, "")
        assert len(errors(done)) == 1
        assert not stamp_of(ready).exists()


def test_test_flag_installs_what_tests_need_and_runs_them(house: Path) -> None:
    tests = "import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(5)"
    wheel(house, "pytest", "1.0", tests, module="__main__")
    done = start(house, "--test", "-k", "a name")
    assert (done.returncode, done.stdout) == (5, f"{house.resolve()} ['-k', 'a name']\n")
    assert start(house, "--test").stderr == ""  # pip is not called again
    assert start(house).stderr == ""  # and what tests need includes what the program needs


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted_installation_leaves_no_stamp(name: str, ready: Path) -> None:
    (ready / "slow").mkdir()
    (ready / "slow" / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n'
    )
    (ready / "slow" / "slow.py").write_text(
        "import pathlib, time\n"
        "def get_requires_for_build_wheel(settings=None):\n"
        f"    pathlib.Path({str(ready / 'building')!r}).touch()\n"
        "    time.sleep(100)\n"
    )
    require(ready, "tinypkg\n./slow")
    process = subprocess.Popen(
        [BASE_PYTHON, ready / "init.py"],
        cwd=ready,
        env=settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (ready / "building").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, getattr(signal, name))  # as a terminal does on Ctrl-C
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and stdout == ""
    said = [line for line in stderr.splitlines() if line.startswith("interrupted: ")]
    assert len(said) == 1 and "run the same command again" in said[0]
    assert not stamp_of(ready).exists()


def test_requirements_name_every_package_that_the_program_imports() -> None:
    files = ("requirements.txt", "requirements-openvino.txt")
    required = [module for file in files for module in init.required_modules(REPOSITORY / file)]
    known = {module.split(".")[0] for module in required} | set(sys.stdlib_module_names)
    own = {file.stem for file in REPOSITORY.glob("*.py")}
    own |= {folder.parent.name for folder in REPOSITORY.glob("*/__init__.py")}
    for file in REPOSITORY.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in known | own, f"{file.name} imports {name}"
