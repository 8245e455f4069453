"""The house itself: layers, sizes, documents, recipes, and what no file may contain. Read from the source; nothing is run."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "src" / "posttrain"
FILES = sorted(HOUSE.rglob("*.py"))
ORDER = [
    "errors", "component", "yaml", "paths", "draws", "faults", "text", "batch",
    "answer", "expressions", "losses", "data", "models", "tuners", "objectives", "sandbox", "environments", "sampling", "tasks", "rl", "evaluation", "training", "synth", "compress",
    "pipeline", "check", "api", "cli",
]  # fmt: skip
LONGEST = 400
HEAVY = {"torch", "transformers", "peft", "safetensors", "tokenizers", "datasets", "pyarrow", "matplotlib"}
INDEPENDENT = ["objectives", "tuners", "data", "sampling"]  # which parameters, what signal, what rows, where tokens come from


@cache
def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def part_of(file):
    """The layer that a file belongs to."""
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


def typing_only(tree):
    """The nodes under `if TYPE_CHECKING:`."""
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for node in guarded for each in node.body for inner in ast.walk(each)}


def imports(file, with_annotations=True, top=False):
    """(module, line) of everything a file imports, also inside of functions unless `top`."""
    tree = parsed(file)
    skipped = set() if with_annotations else typing_only(tree)
    if top:
        skipped = skipped | {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            if node.module == "posttrain":
                yield from ((f"posttrain.{name.name}", node.lineno) for name in node.names)
            else:
                yield node.module, node.lineno


def inner(module):
    """The layer of a module of our own, or None."""
    parts = module.split(".")
    return parts[1] if parts[0] == "posttrain" and len(parts) > 1 and parts[1] != "__version__" else None


def test_every_folder_has_its_place_in_the_order():
    unknown = {part_of(file) for file in FILES} - {*ORDER, "__init__", "__main__"}
    assert not unknown, f"give {sorted(unknown)} a place in ORDER"


def test_a_folder_imports_only_from_those_above_it():
    """Imports inside of functions and for annotations count. The package's own __init__, which hands out names, is exempt."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in FILES
        if (mine := part_of(file)) not in {"__init__", "__main__"}
        for module, line in imports(file)
        if (layer := inner(module)) is not None and ORDER.index(layer) > ORDER.index(mine)
    ]
    assert not wrong


@pytest.mark.parametrize("mine", INDEPENDENT)
def test_objective_tuner_data_and_sampler_do_not_import_each_other(mine):
    """What runs; annotations may name another's types."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in FILES
        if part_of(file) == mine
        for module, line in imports(file, with_annotations=False)
        if inner(module) in set(INDEPENDENT) - {mine}
    ]
    assert not wrong


def test_losses_import_torch_and_nothing_of_the_house():
    allowed = {"torch", "jaxtyping", "typing", "importlib", "math"}
    found = {
        module
        for file in FILES
        if part_of(file) == "losses"
        for module, _ in imports(file)
        if module.split(".")[0] not in allowed and not module.startswith("posttrain.losses")
    }
    assert not found


def test_no_source_file_is_longer_than_400_lines():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file: length for file, length in lengths.items() if length > LONGEST}


def test_every_module_says_what_it_is_for():
    assert not [str(file.relative_to(ROOT)) for file in FILES if parsed(file).body and not ast.get_docstring(parsed(file))]


def defines_kinds(file):
    return any(
        isinstance(node, ast.ClassDef) and any(word.arg == "kind" for word in node.keywords) for node in ast.walk(parsed(file))
    )


def test_files_that_define_kinds_import_nothing_heavy_at_module_level():
    kinds = [file for file in FILES if defines_kinds(file)]
    assert len(kinds) > 8
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in kinds
        for module, line in imports(file, with_annotations=False, top=True)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec", "os.system", "os.popen", "numpy.load", "np.load"}


def test_nothing_is_pickled_evaluated_or_given_to_a_shell():
    assert not [f"{file.relative_to(ROOT)} {what}" for file in FILES for what in unsafe(file)]


def unsafe(file):
    found = [f"imports {module}" for module, _ in imports(file) if module.split(".")[0] in UNSAFE_MODULES]
    foreign_yaml = any(module == "yaml" for module, _ in imports(file))
    for node in ast.walk(parsed(file)):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        inside = name == "exec" and file.as_posix().endswith(("sandbox/guest.py", "sandbox/judge.py"))  # its purpose
        if (name in UNSAFE_CALLS and not inside) or (name == "yaml.load" and foreign_yaml) or name in {"yaml.unsafe_load", "yaml.full_load"}:
            found.append(f"calls {name}")
        if words.get("shell", "False") != "False" or words.get("allow_pickle", "False") != "False":
            found.append(f"calls {name} with {words}")
        if words.get("weights_only") == "False" or words.get("use_safetensors") == "False":
            found.append(f"calls {name} with {words}")
    return found


def test_nothing_is_imported_by_star_and_no_fault_is_swallowed_whole():
    nodes = [(file, node) for file in FILES for node in ast.walk(parsed(file))]
    stars = [node for _, node in nodes if isinstance(node, ast.ImportFrom) and [name.name for name in node.names] == ["*"]]
    bare = [f"{file}:{node.lineno}" for file, node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not stars
    assert not bare, "a bare except"


# ---- in a process of its own, where nothing is imported yet


def fresh(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


REPORT_HEAVY = (
    "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'peft', 'datasets'})))"
)


def test_every_recipe_loads_and_no_torch_is_imported_for_it():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    load = "".join(f"Recipe.load({str(recipe)!r});" for recipe in recipes)
    assert fresh(f"import json, sys\nfrom posttrain import Recipe\n{load}\n{REPORT_HEAVY}") == []


def test_the_catalogue_and_the_schema_are_made_without_torch():
    code = (
        "import json, sys\nfrom posttrain.pipeline.schema import catalogue, json_schema\ncatalogue(); json.dumps(json_schema())"
    )
    assert fresh(f"{code}\n{REPORT_HEAVY}") == []


def catalogue():
    return fresh("import json\nfrom posttrain.pipeline.schema import catalogue\nprint(json.dumps(catalogue()))")


def test_every_kind_of_every_family_is_documented():
    """In docs/: a heading with the kind's name, or the name between backticks."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    headings = "\n".join(re.findall(r"^#+ .*$", text, re.MULTILINE))
    missing = [
        f"{family} {kind}"
        for family, kinds in catalogue().items()
        for kind in kinds
        if f"`{kind}`" not in text and not re.search(rf"(?<![\w-]){re.escape(kind)}(?![\w-])", headings)
    ]
    assert not missing, f"no page of docs/ has a heading or a mention in backticks of: {', '.join(missing)}"


def test_every_kind_and_every_field_says_what_it_is():
    silent = [
        f"{family} {kind}{'.' + name if name else ''}"
        for family, kinds in catalogue().items()
        for kind, described in kinds.items()
        for name, about in [("", described["about"]), *((name, field["about"]) for name, field in described["fields"].items())]
        if not about.strip()
    ]
    assert not silent, f"without a description: {', '.join(silent)}"


def test_every_module_of_the_package_can_be_imported():
    names = [".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__") for file in FILES]
    names = [name for name in names if not name.endswith("__main__")]
    assert fresh(
        f"import importlib, json\nfor name in {names!r}: importlib.import_module(name)\nprint(json.dumps(len({names!r})))"
    ) == len(names)
