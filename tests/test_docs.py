"""What the documents say is so: links, commands, topics, parameters, keys and error texts."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from code_blocks import BLOCK, code_blocks
from pydantic import BaseModel

from genforce_bringup.cli import COMMANDS
from genforce_bringup.graph import GRAPHS, parse_assignments
from genforce_collect.config import CellConfig, SensorConfig
from genforce_collect.trajectory import PlanFile
from genforce_infer.bundle import Manifest
from genforce_train.train_cli import STAGES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "docker/README.md", "bench/README.md")
MODELS_PAGES = sorted((ROOT / "models").glob("*/README.md"))
PAGES = [README, *DOCS, *(ROOT / name for name in BESIDE), *MODELS_PAGES]
SOURCES = [
    path
    for package in ("collect", "sim", "infer", "train")
    for path in (ROOT / f"genforce_{package}" / f"genforce_{package}").rglob("*.py")
] + list((ROOT / "launch" / "genforce_bringup").glob("*.py"))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODELS: dict[str, type[BaseModel]] = {
    "cell": CellConfig,
    "sensor": SensorConfig,
    "plan": PlanFile,
}

by_name = functools.partial(pytest.mark.parametrize, ids=lambda p: str(p.relative_to(ROOT)))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def links(page: Path) -> list[tuple[Path, str]]:
    """Targets of the relative links of a page, and the heading they point to."""
    found = []
    for target in LINK.findall(prose(page)):
        if "://" not in target:
            name, _, heading = target.partition("#")
            found.append(((page.parent / name).resolve() if name else page, heading))
    return found


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines(page: Path) -> list[str]:
    """Command lines of the shell blocks of a page."""
    text = "\n".join(code_blocks(page.read_text(), "bash", "sh", "console")).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def genforce_words(line: str) -> list[str]:
    """Words behind `genforce` of a command line, which another program may call; none where it
    calls something else."""
    words = shlex.split(line.replace("…", "").replace("...", ""), comments=True)
    if "genforce" not in words:
        return []
    call = words[words.index("genforce") + 1 :]
    ends = [i for i, word in enumerate(call) if word in {"&&", "||", "|", ";", "&"}]
    return call[: ends[0]] if ends else call


def commands(page: Path) -> Iterator[list[str]]:
    """Words behind `genforce` of each of its calls in the shell blocks of a page."""
    yield from filter(None, map(genforce_words, shell_lines(page)))


def mentions(page: Path) -> Iterator[list[str]]:
    """The same, of the calls named in the text, which may be cut short."""
    yield from filter(None, map(genforce_words, re.findall(r"`(genforce [^`]+)`", prose(page))))


# --- links --------------------------------------------------------------------------------------


@by_name("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, heading in links(page):
        assert target.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings(target), f"{page.name}: {target.name}#{heading}"


def test_every_page_is_two_clicks_from_the_readme():
    first = {target for target, _ in links(README)}
    second = {target for page in first if page.suffix == ".md" for target, _ in links(page)}
    assert set(DOCS) <= first | second


def test_paths_named_in_the_readmes_tree_exist():
    folders = re.findall(r"^\| (`.*?`) \|", README.read_text(), re.MULTILINE)
    names = [name for cell in folders for name in re.findall(r"`([\w./]+/)`", cell)]
    assert len(names) >= 7
    assert all((ROOT / name).is_dir() for name in names)


# --- commands -----------------------------------------------------------------------------------


class Refused(Exception):
    """A parser did not take a command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise Refused(message)


def refusal(name: str, words: list[str]) -> str:
    """Why `genforce NAME WORDS` is not understood, empty where it is."""
    if name not in COMMANDS:
        return "no such command"
    parser = Parser()
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    try:
        parser.parse_args(words)
    except Refused as why:
        return str(why)
    return ""


@by_name("page", PAGES)
def test_every_command_line_on_a_page_is_understood(page):
    for name, *words in commands(page):
        if name != "--help":
            assert not refusal(name, words), f"{page.name}: genforce {shlex.join([name, *words])}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_of_a_command_are_understood(command):
    text = importlib.import_module(COMMANDS[command].module).__doc__
    # Behind the command, at two blanks and more, stands what it is good for.
    calls = re.findall(r"^(?: *|.*[:?] )(genforce [^`\n]+?)(?:  .*)?$", text, re.MULTILINE)
    assert calls
    for name, *words in map(genforce_words, calls):
        assert not refusal(name, words), shlex.join([name, *words])
        for path in (word for word in words if word.startswith("models/")):
            assert (ROOT / path).exists(), path


def test_no_command_of_a_page_escapes_those_that_are_understood():
    """Of what is no program of the project's own, only these; of it, one call a line."""
    others = {"cd", "cp", "dask", "docker", "echo", "export", "pip", "rosdep", "rviz2", "source"}
    checked = {"accelerate", "genforce", "make", "python", "ros2", "sudo"}
    for page in PAGES:
        for line in shell_lines(page):
            words = shlex.split(line, comments=True)
            first = next((word for word in words if not re.match(r"[A-Z_]+=", word)), "cd")
            assert first in others | checked, f"{page.name}: {line}"
            assert words.count("genforce") <= 1, f"{page.name}: {line}"
        for kind, text in BLOCK.findall(page.read_text()):
            if kind not in {"bash", "sh", "console"}:
                assert not re.search(r"^(\$ )?genforce ", text, re.MULTILINE), page.name


@by_name("page", PAGES)
def test_every_command_named_in_the_text_has_what_is_named_of_it(page):
    for name, *words in mentions(page):
        assert name in COMMANDS, f"{page.name}: genforce {name}"
        spec = importlib.util.find_spec(COMMANDS[name].module)
        assert spec
        assert spec.origin
        source = Path(spec.origin).read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, f"{page.name}: genforce {shlex.join([name, *words])}"


@by_name("page", PAGES)
def test_every_graph_and_argument_on_a_page_exists(page):
    for words in (*commands(page), *mentions(page)):
        if words[0] == "up" and len(words) > 1:
            graph = GRAPHS[words[1]]
            given = parse_assignments(words[2:])
            assert set(given) <= {argument.name for argument in graph.arguments}, words
    for line in shell_lines(page):
        if line.startswith("ros2 launch"):
            package, file, *words = shlex.split(line)[2:]
            assert package == "genforce_bringup"
            assert (ROOT / "launch" / file).is_file(), line
            graph = GRAPHS[file.removesuffix(".launch.py")]
            given = parse_assignments(words)
            assert set(given) <= {argument.name for argument in graph.arguments}, line


@by_name("page", PAGES)
def test_every_module_and_make_target_on_a_page_exists(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    for name in re.findall(r"make bench ONLY=(\w+)|bench/run.py --only (\w+)", page.read_text()):
        assert set(name) <= known | {"", "name"}, name
    for line in shell_lines(page):
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, line
        if words[:2] == ["python", "-m"] and words[2].startswith("genforce"):
            assert importlib.util.find_spec(words[2]), line
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


# --- topics, types, parameters ------------------------------------------------------------------


@functools.cache
def texts_of_the_code() -> str:
    """Every string of the sources, `…` for what is put in, one a line."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def interface_names() -> set[str]:
    """Topics, services and actions of the sources, `<sensor>` for the sensor's name."""
    found = set()
    pattern = re.compile(
        r"^/?(?:genforce/)?((?:robot|netft|recorder|replay|…)/[a-z_/]+|contact|stream_times)$"
    )
    for line in texts_of_the_code().splitlines():
        if match := pattern.match(line):
            found.add(match[1].replace("…", "<sensor>"))
    return found


@by_name("page", PAGES)
def test_every_topic_on_a_page_exists_in_the_code(page):
    known = interface_names()
    for name in re.findall(r"(?<![\w.])/genforce/([\w<>/]+)", page.read_text()):
        generic = re.sub(r"^(array_1|mine|gelsight|\w*<sensor>)/", "<sensor>/", name.rstrip("/"))
        assert generic in known, f"{page.name}: /genforce/{name}"


def test_every_topic_of_the_code_is_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text().replace("\\", "")
    named = {name for name in interface_names() if name in page}
    assert {"robot/tcp_pose", "netft/wrench", "<sensor>/wrench", "<sensor>/markers"} <= named
    table = re.findall(r"^\| (\S+) \| genforce_msgs|^\| (\S+) \| \w+_msgs", page, re.MULTILINE)
    for name in (first or second for first, second in table):
        assert name.lstrip("/") in interface_names() | {"diagnostics"}, name


@by_name("page", PAGES)
def test_every_message_type_of_the_project_on_a_page_exists(page):
    for package, name in re.findall(r"(genforce_msgs)/(?:msg/)?([A-Z]\w+)", page.read_text()):
        assert list((ROOT / package).glob(f"*/{name}.*")), f"{page.name}: {package}/{name}"


@by_name("page", PAGES)
def test_every_parameter_set_on_a_page_is_declared(page):
    declared = texts_of_the_code().splitlines()
    for line in shell_lines(page):
        for name in re.findall(r"-p (\w+):=", line):
            assert name in declared, f"{page.name}: {line}"


# --- keys ---------------------------------------------------------------------------------------


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a model with their fields, sections opened."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        found |= keys_of(section, f"{prefix}{name}.") if section else {f"{prefix}{name}": field}
    return found


@pytest.mark.parametrize(
    ("title", "model"), [("Cell file", CellConfig), ("Sensor file", SensorConfig)]
)
def test_the_tables_of_keys_are_complete_and_their_defaults_right(title, model):
    text = (ROOT / "docs" / "data_formats.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", section, re.MULTILINE))
    fields = keys_of(model)
    assert set(told) == set(fields)
    for key, field in fields.items():
        if told[key] == "needed" or field.is_required():
            assert told[key] == "needed"
            assert field.is_required(), key
        else:
            expected = field.default
            expected = list(expected) if isinstance(expected, tuple) else expected
            written = None if told[key] == "none" else yaml.safe_load(told[key])
            assert expected in (written, told[key]), key


def written(value: Any) -> str:
    """A default as the tables of settings show it."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else {None: "none", "": "–"}.get(value, value)


@pytest.mark.parametrize("stage", ["all stages", *STAGES])
def test_the_tables_of_settings_are_complete_and_their_defaults_right(stage):
    from genforce_train.training import RunSettings

    text, fields = (ROOT / "docs" / "training.md").read_text(), RunSettings.model_fields
    title = "Settings of all stages"
    if stage in STAGES:
        title = f"Settings of train {stage}"
        own = importlib.import_module(f"genforce_train.train_{stage}")
        common, fields = fields, getattr(own, f"{stage.capitalize()}Settings").model_fields
        fields = {
            name: field
            for name, field in fields.items()
            if name not in common or field.default != common[name].default
        }
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert told == {
        name: "needed" if field.is_required() else str(written(field.default))
        for name, field in fields.items()
    }


def test_every_key_of_the_manifest_is_described():
    text = (ROOT / "docs" / "data_formats.md").read_text()
    section = text.split("\n## Model bundle\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(
        Manifest.model_fields
    )


@by_name("page", PAGES)
def test_every_configuration_on_a_page_is_valid(page):
    for text in code_blocks(page.read_text(), "yaml"):
        kind = re.match(r"# (cell|sensor|plan):", text)
        if kind:
            MODELS[kind[1]].model_validate(yaml.safe_load(text))
        else:
            assert yaml.safe_load(text) is not None


@by_name("page", PAGES)
def test_every_key_named_in_the_text_exists(page):
    """`section.key` of the sections of cell and sensor files."""
    known = set(keys_of(CellConfig)) | set(keys_of(SensorConfig))
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    for name in re.findall(rf"`((?:{sections})\.\w+(?:\.\w+)?)`", prose(page)):
        is_file = name.rsplit(".")[-1] in {"py", "md", "yaml"}
        assert is_file or name in known or any(k.startswith(f"{name}.") for k in known), name


# --- faults --------------------------------------------------------------------------------------


def test_every_fault_has_an_outcome_and_a_test_that_exists():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (?!fault \||-)(.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) >= 24
    for fault, outcome, tests in rows:
        assert outcome, fault
        assert re.fullmatch(r"`\w+\.py::\w+`(, `\w+\.py::\w+`)*", tests), fault
    tests_of = {
        path.name: {f.name for f in ast.parse(path.read_text()).body if hasattr(f, "name")}
        for path in (*ROOT.glob("*/test/test_*.py"), *ROOT.glob("tests/test_*.py"))
    }
    for file, name in re.findall(r"`(\w+\.py)::(\w+)`", text):
        assert name in tests_of[file], f"{file}::{name}"


# --- packaging ----------------------------------------------------------------------------------


def test_the_services_of_the_compose_file_run_commands_that_exist():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert {"cell", "estimator"} <= set(compose["services"])
    for name, service in compose["services"].items():
        line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["command"])
        command, *words = genforce_words(line)
        parser = Parser()
        importlib.import_module(COMMANDS[command].module).add_arguments(parser)
        parser.parse_args(words)
        assert service["network_mode"] == "host", name
        assert (
            (ROOT / "docker" / "compose.yaml")
            .parent.joinpath(service["build"]["context"], service["build"]["dockerfile"])
            .is_file()
        )


@by_name("path", sorted((ROOT / "docker").glob("*.Dockerfile")))
def test_what_a_dockerfile_copies_exists_and_is_not_ignored(path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (\S+) \S+$", path.read_text(), re.MULTILINE)
    assert "." in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name not in ignored


@by_name("path", sorted((ROOT / "docker").glob("*.Dockerfile")))
def test_a_dockerfile_keeps_the_rules_of_its_linter(path):
    steps = path.read_text().replace("\\\n", " ").splitlines()
    steps = [line for line in steps if line and not line.startswith("#")]
    assert re.fullmatch(r"FROM \S+:(?!latest)[\w.-]+", steps[0])  # DL3006, DL3007
    installs = [line for line in steps if "apt-get install" in line]
    assert installs
    for line in installs:
        assert "--no-install-recommends" in line  # DL3015
        assert " -y " in line  # DL3014
        assert "rm -rf /var/lib/apt/lists/*" in line  # DL3009
    for line in steps:
        assert "sudo" not in line  # DL3004
        assert not re.match(r"(ADD|MAINTAINER) ", line)  # DL3020, DL4000
        assert " pip install" not in line or "--no-cache-dir" in line  # DL3042
        if re.match(r"(CMD|ENTRYPOINT) ", line):
            assert "[" in line  # DL3025


def test_all_packages_have_one_version():
    versions = {}
    for path in (*ROOT.glob("genforce_*/package.xml"), ROOT / "launch" / "package.xml"):
        versions[path] = re.findall(r"<version>(.*?)</version>", path.read_text())[0]
    for path in (*ROOT.glob("genforce_*/setup.py"), ROOT / "launch" / "setup.py"):
        versions[path] = re.findall(r'version="(.*?)"', path.read_text())[0]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    versions[ROOT / "CITATION.cff"] = cited["version"]
    assert len(versions) >= 10
    assert len(set(versions.values())) == 1, versions


def test_rosdep_finds_every_dependency_at_the_version_that_is_pinned():
    rules = yaml.safe_load((ROOT / "ros2_ws" / "rosdep.yaml").read_text())
    named = set()
    for path in (*ROOT.glob("genforce_*/package.xml"), ROOT / "launch" / "package.xml"):
        named |= set(re.findall(r"_depend>(genforce-.*?)<", path.read_text()))
    assert named == set(rules)
    pinned = re.findall(r"^[\w.-]+==[\w.]+", (ROOT / "requirements/base.txt").read_text(), re.M)
    for rule in rules.values():
        assert set(rule["ubuntu"]["pip"]["packages"]) <= set(pinned)


def test_the_bill_of_materials_holds_what_is_pinned():
    """Mended by `python scripts/bill_of_materials.py`."""
    page = (ROOT / "docs" / "dependencies.md").read_text()
    told = set(re.findall(r"^\| (\S+) \| \S+ \| (\w+\.txt) \|", page, re.MULTILINE))
    pinned = {
        (re.split(r"[=\[]", line)[0], path.name)
        for path in (ROOT / "requirements").glob("*.txt")
        for line in path.read_text().splitlines()
        if "==" in line.split("#")[0] and 'python_version < "3.11"' not in line
    }
    assert pinned == told


def test_the_hooks_of_a_commit_are_the_linters_of_the_project():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text()
    assert [hook["language"] for hook in hooks] == ["system"] * len(hooks)
    assert all(hook["entry"] in lint for hook in hooks)


# --- error texts --------------------------------------------------------------------------------


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    page = ROOT / "docs" / "troubleshooting.md"
    rows = re.findall(r"^\| (.*?) \| .* \|$", prose(page), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    code = re.sub(r"…+", "…", texts_of_the_code())
    commands_and_tools = {"genforce: command not found", "rclpy", "genforce bag verify"}
    missing = []
    for text in quoted:
        # What is put in may itself be text of the code: the fixed parts must stand in one line.
        parts = [part.strip() for part in text.split("…") if len(part.strip()) > 3]
        if text in commands_and_tools or not parts:
            continue
        pattern = re.compile(".*".join(map(re.escape, parts)))
        if not any(pattern.search(line) for line in code.splitlines()):
            missing.append(text)
    assert len(quoted) > 30
    assert not missing
