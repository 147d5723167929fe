"""Everything the project runs, locally and in CI: `python -m nox -l` lists it.

The law: a session runs against the package as it is installed, never against the source tree,
and no session depends on another (`tests-all` only names others).

What must not live here: checks that only CI could run, and paths of one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typing", "tests", "docs"]

ROOT = Path(__file__).resolve().parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
VERSIONS = nox.project.python_versions(PYPROJECT)  # from the classifiers

# Programs that a session starts find the installed package, not the folder they stand in
# (from Python 3.11 on).
ENV = {"PYTHONSAFEPATH": "1"}


# -- Which Pythons are installed --------------------------------------------------------------
#
# "Found on PATH" is not "installed": a version manager puts a `python3.10` on PATH that only
# says which version to select first. So each candidate is run and asked what it is.

PROBE = """\
import json, platform, sys, sysconfig
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "implementation": platform.python_implementation(),
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "executable": getattr(sys, "_base_executable", "") or sys.executable,
}))
"""


def _output(*command: str | Path) -> str | None:
    """What the command prints, or None if it cannot be run or fails."""
    try:
        return subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            encoding="utf-8",
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    def numbers(path: Path) -> list[int]:
        digits = "".join(c if c.isdigit() else " " for c in path.name)
        return [int(number) for number in digits.split()]

    return sorted(directory.glob(pattern), key=numbers, reverse=True)


def _candidates(version: str) -> Iterator[Path]:
    """Files that may be this version of Python, the most deliberately chosen first."""
    name = f"python{version}"
    for folder in os.get_exec_path():
        if (Path(folder) / name).is_file():
            yield Path(folder) / name
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        yield Path(sys.executable)

    pyenv_root = os.environ.get("PYENV_ROOT") or _output("pyenv", "root") or "~/.pyenv"
    for folder in _newest_first(Path(pyenv_root).expanduser() / "versions", f"{version}*"):
        yield folder / "bin" / name

    uv_root = (
        os.environ.get("UV_PYTHON_INSTALL_DIR")
        or _output("uv", "python", "dir")
        or "~/.local/share/uv/python"
    )
    for folder in _newest_first(Path(uv_root).expanduser(), f"cpython-{version}*"):
        yield folder / "bin" / name


def _find_python(version: str) -> Path | None:
    for candidate in _candidates(version):
        answer = _output(candidate, "-I", "-c", PROBE)
        if answer is None:
            continue
        found = json.loads(answer)
        if (
            found["version"] == version
            and found["implementation"] == "CPython"
            and not found["free_threaded"]
        ):
            return Path(found["executable"])
    return None


def _put_on_path(version: str, python: Path) -> None:
    """Make `pythonX.Y` mean this file for nox, which looks versions up on PATH."""
    on_path = shutil.which(f"python{version}")
    if on_path is None or Path(on_path) != python:
        os.environ["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])


PYTHONS = {version: python for version in VERSIONS if (python := _find_python(version))}
MISSING = [version for version in VERSIONS if version not in PYTHONS]
for _version, _python in PYTHONS.items():
    _put_on_path(_version, _python)


def _order(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


# -- Sessions ---------------------------------------------------------------------------------


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """The main job on real input: `nox -s demo -- [FILE...]`."""
    session.install(".[cli]")
    session.run("trio-wal", "demo", *session.posargs, env=ENV)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, on the Python that runs nox: `nox -s tests -- [PYTEST ARGUMENTS]`.

    One process for each core; pytest's own `-n` says otherwise, as `-n 0` and `-p no:xdist` do.
    """
    _test(session, f"{sys.version_info[0]}.{sys.version_info[1]}")


def _test(session: nox.Session, version: str) -> None:
    session.install(".[cli,zstd,prometheus,otel]", *_group("test"))
    with session.chdir("tests"):
        session.run("python", "-c", INSTALLED, version, log=False)
        # A path is given as it is seen from the project's folder.
        arguments = [argument.removeprefix("tests/") for argument in session.posargs]
        beside = [] if {"no:xdist", "-pno:xdist"} & set(arguments) else BESIDE
        session.run("pytest", *beside, *arguments, env=ENV)


BESIDE = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
"""More than eight processes, of which each collects all tests, gain nothing."""


for _version in PYTHONS:

    @nox.session(name=f"tests-{_version}", python=_version, default=False)
    def tests_on(session: nox.Session) -> None:
        """The tests, on this Python."""
        _test(session, str(session.python))


@nox.session(
    name="tests-all",
    python=False,
    default=False,
    requires=[f"tests-{version}" for version in PYTHONS],
)
def tests_all(session: nox.Session) -> None:
    """The tests, on each installed Python: `nox -s tests-all -- [PYTEST ARGUMENTS]`."""
    session.log(f"tested: Python {', '.join(PYTHONS)}")
    if MISSING:
        session.log(f"not installed here, so not tested: Python {', '.join(MISSING)}")


INSTALLED = """\
import sys, sysconfig, trio_wal
assert "%d.%d" % sys.version_info[:2] == sys.argv[1], sys.version
assert trio_wal.__file__.startswith(sysconfig.get_path("purelib")), trio_wal.__file__
print("testing", trio_wal.__file__, "on Python", sys.version)
"""


@nox.session(default=False, python=min(PYTHONS, key=_order, default=False))
def tests_min(session: nox.Session) -> None:
    """The tests with the lowest version that `pyproject.toml` allows of each dependency, on the
    oldest Python: `nox -s tests_min -- [PYTEST ARGUMENTS]`."""
    constraints = Path(session.create_tmp()) / "floors.txt"
    # lmdb alone is newer: the tests judge stores with its own verifier, which came with 3.0.
    floors = [text for text in _floors("cli", "zstd", "prometheus", "otel") if "lmdb" not in text]
    constraints.write_text("\n".join(floors))
    wanted = (".[cli,zstd,prometheus,otel]", *_group("test"))
    session.install("--upgrade", "-c", str(constraints), *wanted)
    session.run("pip", "list")
    _run_tests(session)


@nox.session(default=False)
def tests_latest(session: nox.Session) -> None:
    """The tests with the newest of everything, pre-releases too, which may fail: it tells what is
    coming: `nox -s tests_latest -- [PYTEST ARGUMENTS]`."""
    session.install("--pre", "--upgrade", ".[cli,zstd,prometheus,otel]", *_group("test"))
    session.run("pip", "list")
    _run_tests(session, success_codes=range(256))


def _run_tests(session: nox.Session, success_codes: Iterable[int] = (0,)) -> None:
    with session.chdir("tests"):
        arguments = [argument.removeprefix("tests/") for argument in session.posargs]
        session.run("pytest", *arguments, env=ENV, success_codes=success_codes)


def _floors(*extras: str) -> list[str]:
    """``name==version`` for each ``name>=version`` that is declared."""
    project = PYPROJECT["project"]
    declared = [*project["dependencies"]]
    for extra in extras:
        declared += project["optional-dependencies"][extra]
    return [text.replace(">=", "==") for text in declared]


@nox.session(default=False)
def format_compat(session: nox.Session) -> None:
    """Logs, databases and archives of every released format: read, verified, gone on with.

    `nox -s format_compat -- [PYTEST ARGUMENTS]`
    """
    session.install(".[cli,zstd]", *_group("test"))
    with session.chdir("tests"):
        version = ".".join(map(str, sys.version_info[:2]))
        session.run("python", "-c", INSTALLED, version, log=False)
        session.run("pytest", "test_golden.py", "test_format_compat.py", *session.posargs, env=ENV)


@nox.session(default=False)
def cluster(session: nox.Session) -> None:
    """A log on real NATS servers, killed and paused: `nox -s cluster -- [PYTEST ARGUMENTS]`.

    Needs nothing but PyPI: the servers are three processes on this machine.
    """
    session.install(".[cli,zstd,nats]", *_group("cluster"))
    with session.chdir("tests"):
        arguments = [argument.removeprefix("tests/") for argument in session.posargs]
        session.run("pytest", *(arguments or CLUSTER_TESTS), env=ENV)


@nox.session(default=False)
def partitions(session: nox.Session) -> None:
    """Networks cut between real NATS servers and writers: `nox -s partitions -- [--count CUTS]`.

    Needs root and Debian's iproute2; without them it says so, and does nothing.
    """
    session.install(".[cli,zstd,nats]", *_group("cluster"))
    with session.chdir("tests"):
        session.run("pytest", "test_campaign_partitions.py", env=ENV)
        env = {**ENV, "PYTHONPATH": str(ROOT / "tests")}
        session.run("python", "-m", "campaigns", "partitions", *session.posargs, env=env)


@nox.session(default=False)
def outages(session: nox.Session) -> None:
    """Power cuts under real NATS servers: `nox -s outages -- [--count OUTAGES]`.

    Needs root, FUSE, loop devices and ext4; without them it says so, and does nothing.
    """
    session.install(".[cli,zstd,nats]", *_group("cluster"))
    with session.chdir("tests"):
        session.run("pytest", "test_campaign_outages.py", env=ENV)
        env = {**ENV, "PYTHONPATH": str(ROOT / "tests")}
        session.run("python", "-m", "campaigns", "outages", *session.posargs, env=env)


@nox.session(default=False)
def objects(session: nox.Session) -> None:
    """An archive in an object storage: `nox -s objects -- [PYTEST ARGUMENTS]`.

    Needs nothing but PyPI: the server is moto's, in the tests' own process.
    """
    session.install(".[cli,zstd,s3]", *_group("objects"))
    with session.chdir("tests"):
        arguments = [argument.removeprefix("tests/") for argument in session.posargs]
        session.run("pytest", *(arguments or ["test_objects.py"]), env=ENV)


@nox.session
def model(session: nox.Session) -> None:
    """The protocol of replicated logs, searched exhaustively by spin, and its seeded bugs.

    Needs spin and a C compiler (Debian: spin, gcc): `nox -s model -- [--batches N]`.
    """
    session.run("python", "tests/models/check.py", *session.posargs)


@nox.session(default=False)
def histories(session: nox.Session) -> None:
    """Replicated logs on servers in memory, with faults: `nox -s histories -- [--count N]`.

    10,000 histories, in about a minute on two cores; a campaign has `--count 1000000`.
    """
    _campaign(session, "replication", *session.posargs)


CLUSTER_TESTS = ("test_nats.py", "test_engine.py", "test_replicated.py", "test_failover.py")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and flake8-async."""
    session.install(*_group("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    for folder, disabled in FLAKE8_ASYNC_DISABLED.items():
        files = sorted(str(path) for path in Path(folder).rglob("*.py"))
        if files:
            session.run("flake8-async", "--disable", ",".join(disabled), *files)


# The rules that flake8-async itself leaves to choice are off: imports of trio's names, async
# generators (ours are context managers' bodies), and checkpoints on every path of every function,
# private ones included.
OPTIONAL = ("ASYNC106", "ASYNC900", "ASYNC910", "ASYNC911", "ASYNC912", "ASYNC913")
FLAKE8_ASYNC_DISABLED = {
    # ASYNC102 wants a time-out around whatever is awaited while closing. Leaving a log drains it
    # for as long as the disk takes: that is a promise, and what is awaited there cannot be
    # cancelled (the latch of `_wal`).
    "trio_wal": (*OPTIONAL, "ASYNC102"),
    # A test's stand-in is often async without awaiting anything (124), waits for a thread by
    # checkpoints (110), has its body behind a yield (100), and does on purpose what a program
    # should not: swallow an interrupt (104) or whatever a broken copy raises (103), use a
    # database that closes (111), or start one task to have another one (112). The engine in memory
    # is closed by a log, under its shield (102). What nurseries start stands on no list (114).
    "tests": (
        *OPTIONAL,
        *("ASYNC100", "ASYNC102", "ASYNC103", "ASYNC104"),
        *("ASYNC110", "ASYNC111", "ASYNC112", "ASYNC114", "ASYNC124"),
    ),
    # What nurseries start stands on no list here either.
    "perf": (*OPTIONAL, "ASYNC114", "ASYNC124"),
}


@nox.session
def typing(session: nox.Session) -> None:
    """mypy --strict for three platforms, pyright, how complete the public types are, and what
    a user's programs are told."""
    session.install(".[cli,zstd,nats,s3,prometheus,otel]", *_group("typing"))
    for platform in ("linux", "darwin", "win32"):
        session.run("mypy", "--strict", "--platform", platform, *session.posargs)
    session.run("pyright")
    session.run("pyright", "--verifytypes", "trio_wal", "--ignoreexternal")
    # What both find in a user's program: nothing in one, and a mistake on each line of another.
    session.run("python", "tests/typing/compare.py")


@nox.session(default=False)
def typing_compat(session: nox.Session) -> None:
    """A user's module, checked as those who still have trio-typing check theirs."""
    session.install(".", *_group("typing-compat"))
    # Away from the source tree, so that the installed package is what mypy reads.
    with session.chdir("tests/typing_compat"):
        session.run("mypy", "--config-file", "mypy.ini", "consumer.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation: spelling, warnings as errors, every page in a browser where there is one,
    and the news of the next release."""
    session.install(".[cli,zstd,nats,s3,prometheus,otel]", *_group("docs"))
    session.run("codespell", *SPELLED)
    shutil.rmtree("docs/_build", ignore_errors=True)
    session.run("sphinx-build", "-W", "-b", "html", "docs", "docs/_build/html")
    session.run("python", "tests/site/check.py", "docs/_build/html")
    session.run("towncrier", "build", "--draft", "--version", PYPROJECT["project"]["version"])


SPELLED = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs",
    "newsfragments",
    "trio_wal",
)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """A release, as far as this machine goes: `nox -s release -- VERSION [--dry-run]`.

    The version is set, the news become a part of CHANGELOG.md, both distributions are built from
    that and checked.  What is left is printed: to commit, tag and upload is a person's work.  With
    ``--dry-run`` nothing in the tree is changed.
    """
    arguments = [argument for argument in session.posargs if argument != "--dry-run"]
    dry = "--dry-run" in session.posargs
    if len(arguments) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", arguments[0]):
        session.error("a version such as 0.2.0 is needed: nox -s release -- 0.2.0 [--dry-run]")
    (version,) = arguments
    session.install("build", "twine", *_group("docs"))
    if dry:
        session.run("towncrier", "build", "--draft", "--version", version)
    else:
        if _output("git", "status", "--porcelain"):
            session.error("there are changes that are not committed")
        _set_version(session, version)
        session.run("towncrier", "build", "--yes", "--version", version)
    temporary = Path(session.create_tmp()).resolve()
    dist = temporary / f"dist-{version}"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    session.log("nothing was uploaded" + (", nothing changed" if dry else ". What is left:"))
    if not dry:
        session.log("  nox && nox -s build")
        session.log(f"  git commit -am 'Release {version}' && git tag -a v{version} -m {version}")
        session.log(f"  git push && git push origin v{version}")
        session.log(f"  twine upload {dist}/*")


def _set_version(session: nox.Session, version: str) -> None:
    """In the two files that say it."""
    for name, pattern in (
        ("pyproject.toml", r'(?m)^version = "[^"]*"$'),
        ("trio_wal/__init__.py", r'(?m)^__version__ = "[^"]*"$'),
    ):
        path = ROOT / name
        text = path.read_text("utf-8")
        line = re.search(pattern, text)
        if line is None:
            session.error(f"{name} says no version")
        key = line[0].partition(" = ")[0]
        path.write_text(text.replace(line[0], f'{key} = "{version}"'), "utf-8")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """The wheel, made from the sdist, used in an environment and a folder with nothing else."""
    session.install("build", "virtualenv")
    temporary = Path(session.create_tmp()).resolve()
    shutil.rmtree(temporary)
    dist, environment, empty = (temporary / name for name in ("dist", "environment", "empty"))
    empty.mkdir(parents=True)

    with _planted(*PLANTED):
        session.run("python", "-m", "build", "--outdir", str(dist))
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    allowed = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    if strangers := [name for name in names if name.partition("/")[0] not in (*allowed, *ADDED)]:
        session.error(f"the sdist holds more than it names: {strangers}")
    if strangers := [name for name in names if name in PLANTED]:
        session.error(f"the sdist holds what was only lying there: {strangers}")
    if missing := [
        name for name in allowed if not any(f"{n}/".startswith(f"{name}/") for n in names)
    ]:
        session.error(f"the sdist lacks {missing}")
    (wheel,) = dist.glob("*.whl")
    strangers = [
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.startswith(("trio_wal/", "trio_wal-"))
    ]
    if strangers:
        session.error(f"the wheel holds more than the package: {strangers}")

    session.run("virtualenv", "--quiet", str(environment))
    python = environment / "bin" / "python"
    session.run(str(python), "-m", "pip", "install", "--quiet", str(wheel), external=True)
    with session.chdir(empty):
        session.run(str(python), "-c", SMOKE, external=True, log=False)
    if left := [path.name for path in empty.iterdir() if path.name != "log"]:
        session.error(f"using the package left files behind: {left}")

    _test_sdist(session, sdist, wheel, temporary)


def _test_sdist(session: nox.Session, sdist: Path, wheel: Path, temporary: Path) -> None:
    """What was published passes its tests with nothing else of the tree; all of them where
    arguments are given: `nox -s build -- PYTEST ARGUMENTS`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(temporary / "unpacked", filter="data")
    (unpacked,) = (temporary / "unpacked").iterdir()
    environment = temporary / "tests"
    session.run("virtualenv", "--quiet", str(environment))
    python = str(environment / "bin" / "python")
    installed = (f"{wheel}[cli,zstd,prometheus,otel]", *_group("test"))
    session.run(python, "-m", "pip", "install", "--quiet", *installed, external=True)
    with session.chdir(unpacked / "tests"):
        session.run(
            python, "-m", "pytest", *(session.posargs or SDIST_TESTS), external=True, env=ENV
        )


SDIST_TESTS = ("test_golden.py", "test_wal.py", "test_readme.py", "test_examples.py")
"""Of an unpacked sdist: those that read the data, the pages and the examples in it."""
PLANTED = (".env", "shared/a", "notes.txt", "tests/.env")
"""What may lie in a tree and is nobody's business."""
ADDED = ("pyproject.toml", "PKG-INFO", ".gitignore")
"""What hatchling puts into every sdist."""


@contextlib.contextmanager
def _planted(*names: str) -> Iterator[None]:
    """Files in the tree, as long as the block runs; none that is there is touched."""
    made: list[Path] = []
    try:
        for path in (ROOT / name for name in names):
            if not path.parent.exists():
                path.parent.mkdir()
                made.append(path.parent)
            if not path.exists():
                path.write_text("not to be published")
                made.append(path)
        yield
    finally:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()


SMOKE = """\
import importlib.resources
import importlib.util

import trio
import trio_wal

EXTRAS = "cyclopts rich zstandard nats prometheus_client opentelemetry obstore"
for extra in EXTRAS.split():
    assert importlib.util.find_spec(extra) is None, extra + " is here without its extra"
assert (importlib.resources.files(trio_wal) / "py.typed").is_file()


async def main():
    async with trio_wal.open_wal("log") as wal:
        assert await wal.append(b"one record") == 1
    async with trio_wal.open_wal("log") as wal:
        assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (1, 1, 1)
        async with wal.read() as records:
            found = [(record.lsn, record.data) async for record in records]
    assert found == [(1, b"one record")], found


trio.run(main)
print("a record written, the log opened again, the record read:", trio_wal.__file__)
"""


def _campaign(session: nox.Session, name: str, *arguments: str) -> None:
    """Run a campaign of tests/campaigns against the installed package."""
    session.install(".[cli,zstd,nats]", *_group("test"))
    with session.chdir("tests"):
        # The campaigns, but not the source tree, are found where they stand.
        env = {**ENV, "PYTHONPATH": str(ROOT / "tests")}
        session.run("python", "-m", "campaigns", name, *arguments, env=env)


@nox.session(default=False)
def crash(session: nox.Session) -> None:
    """Simulated crashes at every file operation: `nox -s crash -- [PART...] [--minutes M]`."""
    _campaign(session, "crash", *session.posargs)


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Seeded bugs that the campaigns must find: `nox -s mutants -- [--sample N] [TEXT...]`."""
    _campaign(session, "mutants", *session.posargs)


@nox.session(default=False)
def kill(session: nox.Session) -> None:
    """Programs killed (SIGKILL) at random moments: `nox -s kill -- [--count KILLS]`."""
    _campaign(session, "kill", *session.posargs)


@nox.session(default=False)
def readers(session: nox.Session) -> None:
    """Readers of logs whose owners are killed: `nox -s readers -- [PART...] [--count KILLS]`."""
    _campaign(session, "readers", *session.posargs)


@nox.session(default=False)
def powercut(session: nox.Session) -> None:
    """Power cuts on real file systems (root): `nox -s powercut -- [PART...] [--count CUTS]`."""
    _campaign(session, "powercut", *session.posargs)


@nox.session(default=False)
def perf(session: nox.Session) -> None:
    """The benchmarks, in one run, side by side: `nox -s perf -- [NAME...]`."""
    session.install(".[cli,zstd,nats,prometheus]", *_group("perf"))
    session.run("python", "perf/run.py", *session.posargs, env=ENV)
