"""The documentation: links lead somewhere, commands can be given, code can be run, quoted messages exist."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fellrec
from fellrec.aggregation.conformance import check_rule
from fellrec.cli.main import command_parser
from fellrec.config.compose import compose
from fellrec.config.sweep import expand

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "experiments/*/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"[A-Za-z_]\w*")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def without_code(path: Path) -> str:
    """A page without its blocks of code."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in words}


def dead_links(page: Path) -> Iterator[str]:
    """Links to files, headings and names of code that do not exist."""
    for text, target in LINK.findall(without_code(page)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or not path.is_relative_to(ROOT):
            yield f"{target} does not exist"
        elif anchor and anchor not in anchors(path):
            yield f"{target}: no such heading; there are {sorted(anchors(path))}"
        elif path.suffix == ".py" and text.startswith("`") and not defines(path, text.strip("`")):
            yield f"{target} does not define {text}"


def defines(path: Path, name: str) -> bool:
    """Whether a module has the name at its top; what is no name, such as a path, is not looked for."""
    pattern = re.compile(rf"^((class|def) )?{re.escape(name)}\b", re.MULTILINE)
    return not NAME.fullmatch(name) or bool(pattern.search(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.py").write_text("class There:\n    pass\n")
    page = tmp_path / "a.md"
    page.write_text("# One `two`, three\n[x](b.md) [x](#one-two-three) [x](#one) [`There`](a.py) [`Gone`](a.py)\n")
    found = [line.split(":")[0] for line in dead_links(page)]
    assert found == ["b.md does not exist", "#one", "a.py does not define `Gone`"]


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = {target for _, target in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")} - {"README.md"}
    assert pages <= listed
    in_site = set((ROOT / "docs" / "index.rst").read_text(encoding="utf-8").split())
    assert {name.removesuffix(".md") for name in pages if name.endswith(".md")} <= in_site
    assert {f"../experiments/{path.name}/README.md" for path in (ROOT / "experiments").iterdir() if path.is_dir()} - {
        "../experiments/__pycache__/README.md"
    } <= listed


def test_the_readme_is_short_and_names_every_verb() -> None:
    assert len(README.splitlines()) <= 150
    names = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`[^`]+`", README)) + README))
    assert not command_parser().verbs.keys() - names


def commands(page: Path) -> Iterator[str]:
    """The commands in the blocks of a page, one line each."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for language, code in FENCED.findall(text) if language == "sh" for line in code.split("\n")]
    plain = re.sub(r" \\\n\s+", " ", FENCED.sub("", text)).split("\n")
    for line in [*fenced, *(line.strip() for line in plain if line.startswith("    "))]:
        command = re.sub(r"^((\w+=\S+ )*|torchrun .*? -m |srun .*?)(?=fellrec )", "", line)
        if command.startswith("fellrec "):
            yield command


def mentions(page: Path) -> Iterator[str]:
    """The commands in backquotes in the text of a page; they may lack arguments."""
    yield from re.findall(r"`(fellrec [a-z][^`\n]*)`", FENCED.sub("", page.read_text(encoding="utf-8")))


CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
COMMANDS = sorted({(name_of(page), command) for page in CURRENT for command in commands(page)})


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the modules that the pages print."""
    folder = tmp_path_factory.mktemp("modules")
    for page in PAGES:
        for language, code in FENCED.findall(page.read_text(encoding="utf-8")):
            if language == "python" and (found := re.match(r"# (\w+\.py)\n", code)):
                with (folder / found[1]).open("a", encoding="utf-8") as file:
                    file.write(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder


def parsed(command: str) -> argparse.Namespace:
    """The options of a command, as the command line reads them; ``…`` stands for overrides."""
    options, rest = command_parser().whole.parse_known_args(shlex.split(command, comments=True)[1:])
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    assert not unknown, f"{command}: {unknown}"
    if hasattr(options, "overrides"):
        options.overrides = [word for word in [*options.overrides, *rest] if word != "…"]
    return options


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value)
def test_a_command_of_the_documentation_can_be_given(page: str, command: str, own_modules: Path) -> None:
    """It is parsed, and its settings compose; of a sweep, those of its first and last run."""
    if command == "fellrec --version" or re.fullmatch("fellrec +#.*", command):
        return
    options = parsed(command)
    is_resumed = any(word.startswith("resume=") for word in getattr(options, "overrides", []))
    if is_resumed or options.verb not in ("train", "compare", "submit", "prepare", "plan"):
        return
    optional = ("backbone.path",) if options.verb == "plan" else ()
    absent = [] if not {"backbone=smollm2", "backbone=minilm"} & {*options.overrides} else ["backbone.path=x"]
    for run in getattr(options, "run", None) or [""]:
        configurations = list(expand([*options.overrides, *absent, *shlex.split(run)]))
        for overrides in [*configurations[:1], *configurations[1:][-1:]]:
            compose(overrides, optional)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_verbs_and_options_of_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mention in mentions(page):
        try:
            parsed(mention)
        except SystemExit:
            error = capsys.readouterr().err
            assert re.search(r"are required|is required|invalid choice: '…'", error), f"{mention}: {error}"


def test_the_rule_of_the_readme_keeps_all_laws() -> None:
    (code,) = [code for _, code in FENCED.findall(README) if code.startswith("# my_rules.py")]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    found: dict[str, type] = {}
    exec(code, found)
    assert not [result for result in check_rule(found["LowestLoss"]) if result.outcome == "failed"]


def test_the_python_of_the_readme_uses_what_exists() -> None:
    """The functions get settings that compose; ``tests/integration/test_library.py`` runs the same in a notebook."""
    (code,) = [code for _, code in FENCED.findall(README) if code.startswith("import fellrec")]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    tree = ast.parse(code)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for argument in (item for item in call.args if isinstance(item, ast.List)):
            assert all(compose(overrides) for overrides in expand(ast.literal_eval(argument)))
    used = {
        node.attr: node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    kinds = {"fellrec": fellrec, "result": fellrec.RuleResult, "comparison": fellrec.Comparison}
    for attribute, of in used.items():
        kind = kinds[of]
        assert hasattr(kind, attribute) or attribute in inspect.get_annotations(kind), f"{of}.{attribute}"


@cache
def messages() -> tuple[str, ...]:
    """All texts of the source, without docstrings; a value in a text is ``…``."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return (*found, (ROOT / "Makefile").read_text(encoding="utf-8"))


TROUBLES = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("message", TROUBLES)
def test_a_message_that_troubleshooting_quotes_exists(message: str) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in messages()), message
