"""Make the stand-ins as they are installed, each in one file that a container may have by itself.

    stand_ins.py DIRECTORY MODULE:PROGRAM...

A program is its module of the package, with what the module imports from other modules of the package in the place of
the import, and with a beginning for /bin/sh. Of those modules only what the program needs is in it: Python compiles the
whole file at each start.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "loopd"

# To the shell the first line of Python's docstring is a command that does nothing, and what is behind `exit` a document
# that ends with the file. To Python this text is the beginning of the docstring, and the last line a comment.
# Where the kernel found no interpreter, a shell would take the next program of that name in PATH: the real one.
SHELL = r'''#!/bin/sh
""":"
for python in /usr/bin/python3 /usr/local/bin/python3; do
    [ -x "$python" ] && exec "$python" -ISc '
import sys
del sys.argv[0]
if sys.version_info < (3, 8):
    sys.exit("%s: the stand-in of loopd needs Python 3.8 or later, and %s is %d.%d"
             % ((sys.argv[0].split("/")[-1], sys.executable) + sys.version_info[:2]))
exec(compile(open(sys.argv[0], "rb").read(), sys.argv[0], "exec"))' "$0" "$@"
done
echo "${0##*/}: the stand-in of loopd needs Python 3.8 or later: /usr/bin/python3 or /usr/local/bin/python3" >&2
exit 1
: <<'# the end'

'''
END = "\n# the end\n"


# How a function of RARE is called for the first time.
RARELY = """

def rarely(name):
    def first(*arguments):
        exec(RARELY, globals())
        return globals()[name](*arguments)

    return first

"""


class Module:
    """The top-level statements of a module, each with the comments above it and the docstring below it."""

    def __init__(self, name: str) -> None:
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        self.doc = ast.get_docstring(tree, clean=False) or ""
        self.statements: list[ast.stmt] = []
        self.texts: list[str] = []
        end = tree.body[0].end_lineno or 0
        for statement in tree.body[1:]:
            piece = "".join(lines[end : statement.end_lineno])
            end = statement.end_lineno or 0
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                self.texts[-1] += piece
            elif "TYPE_CHECKING" not in used(statement) | set(defined(statement)):  # what is for a type checker
                self.statements.append(statement)
                self.texts.append(piece)

    def where(self) -> dict[str, int]:
        """By name, the statement that defines it."""
        return {name: index for index, statement in enumerate(self.statements) for name in defined(statement)}

    def needed(self, names: set[str], without: Collection[str] = ()) -> dict[int, set[str]]:
        """The statements that define these names and what they need in turn, each with its names that are needed."""
        where = {name: index for name, index in self.where().items() if name not in without}
        found: dict[int, set[str]] = {}
        left = set(names)
        while left:
            name = left.pop()
            index = where.get(name)
            if index is None or name in found.setdefault(index, set()):
                continue
            found[index].add(name)
            left |= used(self.statements[index])
        return found


def defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines at run time."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def used(node: ast.AST) -> set[str]:
    """The names that a statement needs at run time: all but its own and those in annotations."""
    found = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else set()
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            children = value if isinstance(value, list) else [value]
            found |= {name for child in children if isinstance(child, ast.AST) for name in used(child)}
    if isinstance(node, ast.FunctionDef | ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
        inside = list(ast.walk(node))
        found -= {name.id for name in inside if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        found -= {argument.arg for argument in inside if isinstance(argument, ast.arg)}
    return found


def is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.Try)


def imported(statement: ast.stmt) -> ast.ImportFrom | None:
    """The import from another module of the package that a statement is, or tries first."""
    first = statement.body[0] if isinstance(statement, ast.Try) else statement
    if isinstance(first, ast.ImportFrom) and (first.module or "").startswith("loopd."):
        return first
    return None


Needed = dict[str, dict[int, set[str]]]
"""By module, its statements that are needed, each with the names that are."""


def gather(source: ast.ImportFrom, needed: Needed) -> None:
    """Add what an import needs to `needed`, a module behind those that it takes something from."""
    name = (source.module or "").partition(".")[2]
    module, names = Module(name), {alias.name for alias in source.names}
    assert names <= module.where().keys(), f"{name} has no {names - module.where().keys()}"
    found = module.needed(names)
    for index, defines in found.items():
        inner = imported(module.statements[index])
        if inner is not None:
            inner.names = [alias for alias in inner.names if alias.name in defines]
            gather(inner, needed)
    known = needed.setdefault(name, {})
    for index, defines in found.items():
        known[index] = known.get(index, set()) | defines


def text_of(name: str, found: dict[int, set[str]]) -> str:
    """What is needed of a module."""
    module = Module(name)
    text = ""
    for index in sorted(found):
        statement = module.statements[index]
        if imported(statement) is not None:
            continue
        if isinstance(statement, ast.ImportFrom):
            statement.names = [alias for alias in statement.names if (alias.asname or alias.name) in found[index]]
            text += ast.unparse(statement) + "\n"
        else:
            text += module.texts[index]
    return text


def split_off_the_rare(module: Module) -> None:
    """Have what only functions of RARE need in a text that is compiled when one of them is called."""
    if "RARE" not in module.where():
        return
    rare = module.where()["RARE"]
    names = ast.literal_eval(module.statements[rare].value)  # type: ignore[attr-defined]
    roots = [used(statement) for statement in module.statements if not set(defined(statement))]
    often = module.needed(set().union(*roots), names)
    kept, moved = [], []
    for index, statement in enumerate(module.statements):
        always = index in often or is_import(statement) or not set(defined(statement))
        (kept if always else moved).append(index)
    text = "".join(module.texts[index] for index in moved if index != rare)
    compile(text, "rarely", "exec")
    assert "'''" not in text
    module.texts[rare] = f"{RARELY}RARELY = r'''{text}'''\n" + "".join(f'{name} = rarely("{name}")\n' for name in names)
    kept.append(rare)
    kept.sort()
    module.statements = [module.statements[index] for index in kept]
    module.texts = [module.texts[index] for index in kept]


def program(name: str) -> str:
    """The text of a program."""
    module = Module(name)
    split_off_the_rare(module)
    own = {word for statement in module.statements if not is_import(statement) for word in defined(statement)}
    needed: Needed = {}
    rest = ""
    for statement, piece in zip(module.statements, module.texts, strict=True):
        source = imported(statement)
        if source is None:
            rest += piece
        else:
            gather(source, needed)
    first, rest = rest.split("\n", 3)[:3], rest.split("\n", 3)[3]
    text = SHELL + module.doc.lstrip() + '"""\n' + "\n".join(first) + "\n"
    for taken, found in needed.items():
        text += text_of(taken, found)
        statements = Module(taken).statements
        names = [words for index, words in found.items() if not is_import(statements[index])]
        both = own & set().union(*names)
        assert not both, f"{name}: {both} are defined in {taken}, too"
    text += rest.rstrip("\n") + END
    compile(text, name, "exec")
    return text


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for pair in sys.argv[2:]:
        name, _, installed = pair.partition(":")
        path = directory / installed
        path.write_text(program(name), encoding="utf-8")
        path.chmod(0o755)


if __name__ == "__main__":
    main()
