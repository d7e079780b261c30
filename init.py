"""Start Tempering Stable Diffusion: `python init.py <flags>` is all that a fresh machine needs.

Finds or makes the environment, installs requirements.txt into it, checks that the packages import,
and hands every flag to main.py. A stamp inside the environment records what was proven, so later
starts only compare the stamp. Standard library only, in what Python 2.7 and 3 both can read: a
Python that is too old says so. Hence types in comments, and no f-string.

    python init.py <flags>           whatever main.py understands
    python init.py --update          upgrade the packages and report what changed
    python init.py --test [args]     install what the tests need, then run pytest with args
"""

import sys

OLDEST, NEWEST = (3, 10), (3, 13)  # what PyTorch publishes wheels for, in the range we ask for


def refuse_python():
    # type: () -> NoReturn
    """End this process in one line that names the Pythons that will do."""
    needed = "{}.{} to {}.{}".format(*OLDEST + NEWEST)
    found = "{}.{}.{}".format(*sys.version_info)
    line = "error: Python {} is needed, this is {}: start init.py with another one\n"
    sys.stderr.write(line.format(needed, found))
    sys.exit(2)


if sys.version_info[:2] < OLDEST:  # which may lack what is imported next
    refuse_python()

import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple, NoReturn  # noqa: F401 (in a type)

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
STAMP = ".tempering-stamp.json"
RUN = ("requirements.txt",)  # type: tuple[str, ...]
TEST = ("requirements.txt", "requirements-dev.txt")  # the last one includes the first
FLOWS = ("--tempered_inference", "--evaluate")
ANSWERS = ("-h", "--help", "--version")  # main.py answers these without any package

# What to import for a distribution whose own name would not do. diffusers, transformers and scipy
# load lazily: their bare names import even when what we use of them is broken.
MODULES = {
    "pillow": "PIL.Image",
    "diffusers": "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers": "transformers.models.clipseg.modeling_clipseg",
    "scipy": "scipy.stats",
    "pytest-xdist": "xdist",
}

# Programs for the environment's Python. They run in HERE, so they see the modules main.py sees.
USABLE = """
import importlib.metadata, os, sys
# Without its pyvenv.cfg a venv's Python is the base Python, where nothing of ours may go.
right = os.path.samefile(sys.prefix, sys.argv[1]) and {} <= sys.version_info[:2] <= {}
# The list of pip's files is written last: after an interruption it, or some file, is missing.
pip = importlib.metadata.distribution("pip")
files = [line.split(",")[0] for line in pip.read_text("RECORD").splitlines()]
whole = all(pip.locate_file(file).exists() for file in files if file.endswith(".py"))
sys.exit(0 if right and whole else 1)
""".format(OLDEST, NEWEST)
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    print(name, flush=True)  # before the import, which may end the process
    importlib.import_module(name)
"""
VERSIONS = """
import importlib.metadata, json
print(json.dumps({found.metadata["Name"]: found.version
                  for found in importlib.metadata.distributions()}))
"""


class SetupError(Exception):
    """What stops a start; the message is the one line that the user sees."""


# Where packages go. `ours` is the .venv beside this file, which may be rebuilt at will.
Environment = NamedTuple("Environment", [("prefix", Path), ("python", str), ("ours", bool)])


def main():
    # type: () -> int
    """The command line; returns the exit code, or becomes another program."""
    flags = sys.argv[1:]
    if sys.version_info[:2] > NEWEST:
        refuse_python()
    others = [flag for flag in FLOWS + ("--test",) if flag in flags]
    if "--update" in flags and others:
        say("error: --update runs alone, without {}".format(" or ".join(others)))
        return 2
    try:
        return start(flags)
    except (SetupError, OSError) as error:
        say("error: {}".format(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted: nothing was marked as installed, run the same command again to go on")
        return 130


def start(flags):
    # type: (list[str]) -> int
    """Do what the flags ask of this file, or prepare and hand over to main.py or pytest."""
    environment = find_environment()
    program = [str(HERE / "main.py")] + flags
    if not set(flags).isdisjoint(ANSWERS):
        ready = is_ready(environment, RUN)
        return hand_over(environment.python if ready else sys.executable, program)
    if "--update" in flags:
        return upgrade_packages()
    files = RUN
    if "--test" in flags:
        files = TEST
        program = ["-m", "pytest"] + [flag for flag in flags if flag != "--test"]
        os.chdir(HERE)
    if not is_ready(environment, files):
        prepare(environment, files)
    return hand_over(environment.python, program)


def hand_over(python, program):
    # type: (str, list[str]) -> int
    """Become `python program`, with its exit code. Returns on Windows only."""
    command = [python] + program
    if os.name != "nt":
        os.execv(python, command)
    # On Windows os.execv returns to the shell at once, and splits arguments at spaces.
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass  # the console sent it to the other process too, which decides what follows


def upgrade_packages():
    # type: () -> int
    """`pip install --upgrade`, check, stamp, and one line `name old -> new` a change."""
    environment = find_environment()
    before = installed_versions(environment)
    prepare(environment, RUN, "--upgrade")
    after = installed_versions(environment)
    changed = [name for name in dict(before, **after) if before.get(name) != after.get(name)]
    for name in sorted(changed, key=str.lower):
        print("{} {} -> {}".format(name, before.get(name, "(none)"), after.get(name, "(none)")))
    if not changed:
        print("Everything is up to date.")
    return 0


def installed_versions(environment):
    # type: (Environment) -> dict[str, str]
    """Version of every distribution in the environment; empty without a Python that runs."""
    try:
        versions = json.loads(run(environment.python, "-c", VERSIONS).stdout)  # type: dict[str, str]
    except (OSError, ValueError):
        return {}
    return versions


def find_environment():
    # type: () -> Environment
    """The active virtual or conda environment, else .venv beside this file, made or not."""
    prefix = Path(sys.prefix).resolve()
    if sys.prefix != sys.base_prefix or in_conda(prefix):
        return Environment(prefix, sys.executable, ours=prefix == VENV.resolve())
    python = VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"
    return Environment(VENV, str(python), ours=True)


def in_conda(prefix):
    # type: (Path) -> bool
    """Whether this Python belongs to the active conda environment, and pip may install into it."""
    if not os.environ.get("CONDA_PREFIX"):
        return False
    conda = Path(os.environ["CONDA_PREFIX"]).resolve()
    managed = Path(os.__file__).with_name("EXTERNALLY-MANAGED").exists()  # PEP 668
    return (prefix == conda or conda in prefix.parents) and not managed


def is_ready(environment, files):
    # type: (Environment, tuple[str, ...]) -> bool
    """Whether the stamp vouches for everything as it is now. Costs milliseconds: no process."""
    try:
        now, stamp = facts(environment, files), read_stamp(environment)
    except OSError:
        return False
    return all(stamp.get(name) == fact for name, fact in now.items())


def facts(environment, files):
    # type: (Environment, tuple[str, ...]) -> dict[str, str]
    """What a stamp vouches for. OSError when the environment or its base Python is gone."""
    unix = hasattr(os, "uname")  # the platform module may take longer than all the rest
    machine = os.uname().machine if unix else os.environ.get("PROCESSOR_ARCHITECTURE", "")
    return dict(
        {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in files},
        location=str(environment.prefix.resolve()),  # a venv does not survive being moved
        python=identify_python(environment),
        platform="{} {}".format(sys.platform, machine),
    )


def identify_python(environment):
    # type: (Environment) -> str
    """Version and binary of the environment's Python, found without starting it."""
    version = ".".join(map(str, sys.version_info[:3]))  # conda: this very process runs in it
    settings = environment.prefix / "pyvenv.cfg"
    if settings.exists():
        text = settings.read_text(encoding="utf-8", errors="replace")
        config = dict(re.findall(r"^(\w+) *= *(.*?) *$", text, re.MULTILINE))  # type: dict[str, str]
        version = config.get("version", config.get("version_info", version))
        os.stat(config.get("home", ""))  # the base installation, gone after some system upgrades
    # A system upgrade leaves pyvenv.cfg as it was, but puts another binary behind the link.
    binary = os.path.realpath(environment.python)
    return "{} {} {}".format(version, binary, os.stat(binary).st_mtime_ns)


def read_stamp(environment):
    # type: (Environment) -> dict[str, str]
    """What was proven about this environment; empty when nothing was."""
    try:
        stamp = json.loads((environment.prefix / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def prepare(environment, files, *pip_options):
    # type: (Environment, tuple[str, ...], *str) -> None
    """Make the environment if it is missing or broken, install, check, and only then stamp."""
    here, stamp = str(environment.prefix.resolve()), environment.prefix / STAMP
    moved = read_stamp(environment).get("location", here) != here
    if environment.ours and (moved or not is_usable(environment)):
        make_venv()
    # From here until the check has passed nothing is certain, even if this process is killed.
    stamp.unlink(missing_ok=True)
    install(environment, files[-1], *pip_options)
    check_imports(environment, files)
    unfinished = stamp.with_suffix(".part")
    unfinished.write_text(json.dumps(facts(environment, files), indent=1), encoding="utf-8")
    os.replace(unfinished, stamp)


def is_usable(environment):
    # type: (Environment) -> bool
    """Whether the environment's Python runs, has a supported version and a complete pip."""
    try:
        return run(environment.python, "-c", USABLE, str(environment.prefix)).returncode == 0
    except OSError:
        return False


def make_venv():
    # type: () -> None
    """Make .venv anew, whatever is there."""
    from importlib.util import find_spec

    if not (find_spec("venv") and find_spec("ensurepip")):
        package = "python{}.{}-venv".format(*sys.version_info)
        raise SetupError(
            "this Python can not make virtual environments: install its venv package (Debian and "
            "Ubuntu: sudo apt install {}), then start again".format(package)
        )
    doing = "Rebuilding" if VENV.exists() else "Making"
    say("{} the virtual environment {}".format(doing, VENV))
    made = run(base_python(), "-m", "venv", "--clear", str(VENV))
    if made.returncode:
        raise SetupError(
            "could not make {} ({}): check that its folder can be written to, delete .venv, then "
            "start again".format(VENV, last_line(made.stderr or made.stdout))
        )


def base_python():
    # type: () -> str
    """The Python to make .venv with: not that of the very .venv which is about to be cleared."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    name = "python.exe" if os.name == "nt" else "bin/python{}.{}".format(*sys.version_info)
    return str(Path(sys.base_prefix, name))


def install(environment, file, *pip_options):
    # type: (Environment, str, *str) -> None
    """Let pip install a requirements file; index, proxy and certificates are pip's own settings."""
    where = "Installing {} into {} (PyTorch is large, this may take a while)"
    say(where.format(file, environment.prefix))
    options = ("--disable-pip-version-check",) + pip_options + ("-r", str(HERE / file))
    failed = subprocess.call(
        (environment.python, "-m", "pip", "install") + options,
        cwd=HERE,
        env=dict(os.environ, PIP_USER="0"),  # a user-wide `user = true` fails in a venv
        stdout=2,  # to stderr, live: pip's messages are no result of this program
    )
    if failed:
        raise SetupError(
            "pip could not install {}, its own message is above; nothing was marked as installed: "
            "check network, proxy and free space, then run the same command again".format(file)
        )


def check_imports(environment, files):
    # type: (Environment, tuple[str, ...]) -> None
    """Import every required package in the environment's Python: being there is not enough."""
    say("Checking that the packages import")
    modules = [module for file in files for module in required_modules(HERE / file)]
    done = run(environment.python, "-c", IMPORT, *modules)
    if done.returncode:
        reason = last_line(done.stderr) or "exit code {}".format(done.returncode)
        raise SetupError(
            "{} is installed but can not be imported ({}); nothing was marked as installed: repair "
            "{} or remove it, then start again".format(
                last_line(done.stdout), reason, environment.prefix
            )
        )


def required_modules(file):
    # type: (Path) -> list[str]
    """The module to import for each distribution that a requirements file names."""
    text = file.read_text(encoding="utf-8")
    names = re.findall(r"^[A-Za-z0-9][A-Za-z0-9._-]*", text, re.MULTILINE)  # no option, no comment
    return [MODULES.get(name.lower(), name.replace("-", "_")) for name in names]


def run(*command):
    # type: (*str) -> subprocess.CompletedProcess[str]
    """Run a command in HERE and keep what it writes. OSError if there is no such program."""
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, errors="replace")


def last_line(text):
    # type: (str) -> str
    """The last line that says something: in a traceback the reason. Empty if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def say(line):
    # type: (str) -> None
    """Tell the user, on stderr: stdout is for results."""
    if sys.stderr:  # None where it was closed
        sys.stderr.write("{}\n".format(line))
        sys.stderr.flush()


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):  # of docker, slurm, a closed terminal: as Ctrl-C
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup's stays
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
