"""docs/reference.md, written from the kinds themselves: `python -m posttrain.pipeline.reference > docs/reference.md`."""

import inspect
import json
from typing import Any

from posttrain.component import Component, Settings
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.schema import families, field

HEAD = """\
# Recipe reference

Written from the code by `python -m posttrain.pipeline.reference`; a test keeps it true. `posttrain kinds FAMILY KIND` prints the
same for one kind, `posttrain kinds --schema` a JSON Schema for editors.

A recipe is the section *recipe* below, or one training stage without it. A component of a *family* is written as a mapping with
`kind` and the kind's fields, or as the kind's name alone; `kind: my_module:MyClass` is a class of yours, found beside the recipe.
"""


def reference() -> str:
    """The whole page."""
    pages = [HEAD, section("recipe", Recipe, 2)]
    for name, family in families().items():
        about = inspect.cleandoc(family.__doc__ or "")
        default = f" Where no kind is given: `{family.default_kind}`." if family.default_kind else ""
        plain = f" A plain string is {family.plain_string}." if family.plain_string else ""
        pages.append(f"## family {name}\n\n{about}{default}{plain}\n")
        pages += [section(f"{name}: {kind}", family.kinds[kind], 3) for kind in sorted(family.kinds) if ":" not in kind]
    pages.append("## sections\n")
    pages += [section(each.__name__, each, 3) for each in sections()]
    return "\n".join(pages)


def section(title: str, settings: type[Settings], level: int) -> str:
    """A heading, what it is, and a table of its fields."""
    lines = [f"{'#' * level} {title}", "", inspect.cleandoc(settings.__doc__ or ""), ""]
    if settings.model_fields:
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name in settings.model_fields:
        facts = field(settings, name)
        default = "required" if facts.get("required") else f"`{json.dumps(facts['default'])}`"
        cells = [f"`{name}`", facts["type"], default, facts["about"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def sections() -> list[type[Settings]]:
    """The plain sections that kinds hold, each once, by name."""
    found: dict[str, type[Settings]] = {}

    def look(annotation: Any) -> None:
        for part in getattr(annotation, "__args__", ()):
            look(part)
        if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Component):
            if annotation.__name__ in found:
                return
            found[annotation.__name__] = annotation
            for info in annotation.model_fields.values():
                look(info.annotation)

    for family in families().values():
        for kind in family.kinds.values():
            for info in kind.model_fields.values():
                look(info.annotation)
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    print(reference(), end="")
