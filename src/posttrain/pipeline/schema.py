"""What there is: every family and kind with its fields, for people, programs and editors."""

import inspect
from typing import Any

from posttrain.component import Component, Settings
from posttrain.pipeline.recipe import Recipe


def families() -> dict[str, type[Component]]:
    """Every family by its name, those that have kinds."""
    found = {cls.family(): cls for cls in Component.__subclasses__() if cls.__module__.startswith("posttrain.")}
    return {name: found[name] for name in sorted(found) if found[name].kinds}


def describe(kind: type[Component]) -> dict[str, Any]:
    """A kind's formula and notes (its docstring), and its fields with type, default and meaning."""
    return {"about": inspect.cleandoc(kind.__doc__ or ""), "fields": {name: field(kind, name) for name in kind.model_fields}}


def field(section: type[Settings], name: str) -> dict[str, Any]:
    info = section.model_fields[name]
    sections = [cls for cls in section.__mro__ if issubclass(cls, Settings)]
    above = [cls.meaning(name) for cls in sections if name in cls.model_fields]
    about = " ".join(next((text for text in above if text), "").split())
    found: dict[str, Any] = {"type": type_name(info.annotation), "about": about}
    if info.is_required():
        return {**found, "required": True}
    default = info.get_default(call_default_factory=True, validated_data={})
    return {**found, "default": default.model_dump(mode="json") if isinstance(default, Settings) else default}


def type_name(annotation: Any) -> str:
    """`float | None`, `sft|grpo` of a Literal, the name of a section."""
    if annotation is type(None):
        return "null"
    options: tuple[Any, ...] = getattr(annotation, "__args__", ())
    origin = getattr(annotation, "__origin__", None)
    if str(annotation).startswith("typing.Literal"):
        return " | ".join(repr(option) for option in options)
    if str(annotation).startswith("typing.Annotated"):
        return type_name(options[0])
    if origin in (list, dict, tuple):
        return f"{origin.__name__}[{', '.join(type_name(option) for option in options)}]"
    if options:
        return " | ".join(type_name(option) for option in options)
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return annotation.family()
    return str(getattr(annotation, "__name__", annotation))


def catalogue() -> dict[str, dict[str, Any]]:
    """{family: {kind: description}}."""
    return {
        name: {kind: describe(cls.kinds[kind]) for kind in sorted(cls.kinds) if ":" not in kind}
        for name, cls in families().items()
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    definitions: dict[str, Any] = {}
    for family in families().values():
        names = [kind for kind in sorted(family.kinds) if ":" not in kind]
        options: list[Any] = [{"type": "string", "enum": names}]
        for kind in names:
            schema = family.kinds[kind].model_json_schema(ref_template="#/$defs/{model}")
            definitions |= schema.pop("$defs", {})
            if kind != family.default_kind:
                schema["required"] = ["kind", *schema.get("required", [])]
            definitions[f"{family.__name__}.{kind}"] = schema
            options.append({"$ref": f"#/$defs/{family.__name__}.{kind}"})
        own = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
        options.append(own)
        if family.plain_string is not None:
            options.append({"type": "string", "description": family.plain_string})
        definitions[family.__name__] = {"anyOf": options, "description": inspect.cleandoc(family.__doc__ or "")}
    pipeline = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= {name: each for name, each in pipeline.pop("$defs", {}).items() if name not in definitions}
    single = dict(definitions["Stage.train"])
    single["properties"] = {**{name: pipeline["properties"][name] for name in ("name", "title", "seed")}, **single["properties"]}
    whole = {"title": "posttrain recipe", "anyOf": [pipeline, single], "$defs": definitions}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **referring(whole)}


def referring(value: Any) -> Any:
    """The schema with each {"family": name} turned into a reference to that family's definition."""
    if isinstance(value, list):
        return [referring(each) for each in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("family"), str):
        rest = {name: each for name, each in value.items() if name != "family"}
        return {**rest, "$ref": f"#/$defs/{value['family']}"}
    return {name: referring(each) for name, each in value.items()}
