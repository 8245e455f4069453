"""Components: the named, validated, frozen parts of a recipe.

A *family* (Objective, Tuner, Task, ...) subclasses `Component` directly. A *kind* subclasses its family with `kind="name"`,
and that is all the registration there is. In a recipe a component is a mapping with `kind` and the kind's fields, or just the
kind's name. `kind: my_package.module:MyClass` brings one's own.
"""

import ast
import difflib
import importlib
import inspect
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ModelWrapValidatorHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Settings(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False,
        defer_build=True,  # most are never used
    )  # fmt: skip

    @classmethod
    def meaning(cls, name: str) -> str:
        """What a field is: the text below it in the nearest class that declares it, read from the source when it is asked for."""
        text = next((texts[name] for each in cls.__mro__ if name in (texts := _texts(each))), "")
        return cls.model_fields[name].description or text

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: with the meaning of each field."""
        schema = handler.resolve_ref_schema(handler(core))
        for name in cls.model_fields:
            if about := cls.meaning(name):
                schema["properties"][name]["description"] = about
        return schema


class Component(Settings):
    """A part of a recipe that comes in kinds."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]
    default_kind: ClassVar[str | None] = None
    """The kind that is meant where a mapping names none."""
    plain_string: ClassVar[str | None] = None
    """What a plain string means that is no kind's name, for families that take one."""

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Component in cls.__bases__:
            cls.kinds = {}
        elif kind is not None:
            if kind in cls.kinds and cls.kinds[kind].__qualname__ != cls.__qualname__:
                raise TypeError(f"{cls.__name__}: the kind {kind!r} is already {cls.kinds[kind].__name__}")
            cls.kind = kind
            cls.kinds[kind] = cls

    @classmethod
    def is_family(cls) -> bool:
        return Component in cls.__bases__

    @classmethod
    def family(cls) -> str:
        """The family's name as recipes and messages say it."""
        return next(base.__name__.lower() for base in cls.__mro__ if Component in base.__bases__)

    @classmethod
    def lookup(cls, kind: Any) -> type[Self]:
        """The class of a kind of this family; ValueError with the nearest right name where there is none."""
        if not isinstance(kind, str):
            raise ValueError(f"which {cls.family()}? add `kind:` with one of {', '.join(sorted(cls.kinds))}")
        if ":" in kind:
            return cls._user_class(kind)
        if kind not in cls.kinds:
            raise ValueError(f"unknown {cls.family()} {kind!r}{did_you_mean(kind, cls.kinds)}")
        return cls.kinds[kind]

    @classmethod
    def _user_class(cls, path: str) -> type[Self]:
        module_name, _, name = path.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"cannot import {module_name!r} for kind {path!r}: {error}") from None
        found = getattr(module, name, None)
        if found is None:
            raise ValueError(f"module {module_name!r} has no {name!r}{did_you_mean(name, vars(module))}")
        base = next(base for base in cls.__mro__ if Component in base.__bases__)
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise ValueError(f"{path!r} is not a {cls.family()}: it must subclass {base.__module__}.{base.__name__}")
        chosen = cast("type[Self]", found)
        if "kind" not in vars(chosen):
            chosen.kind = path
        return chosen

    @model_validator(mode="wrap")
    @classmethod
    def _build_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Where a recipe names a family, build the kind that it asks for."""
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            return handler(value)
        fields = dict(value)
        if not cls.is_family():
            fields.pop("kind", None)
            return handler(fields)
        return cls.lookup(fields.pop("kind", cls.default_kind)).model_validate(fields)

    @model_serializer(mode="plain")
    def _with_kind(self) -> dict[str, Any]:
        """All fields of the kind it is, also where a field names only the family."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in type(self).model_fields}}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: a field that takes a family refers to it by name; a kind is a mapping with its name in it."""
        if cls.is_family():
            return {"family": cls.__name__}  # becomes a reference in `pipeline.schema`, which knows all kinds
        schema = dict(super().__get_pydantic_json_schema__(core, handler))
        named = {"kind": {"const": cls.kind, "type": "string", "description": cls.summary()}}
        schema["properties"] = {**named, **schema.get("properties", {})}
        return schema

    @classmethod
    def summary(cls) -> str:
        """The first line of the kind's docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


@cache
def _texts(section: type) -> dict[str, str]:
    """{field: the text below it} of a class; nothing where it has no source, as in an interactive session."""
    if not issubclass(section, Settings) or section is Settings:
        return {}
    try:
        source = inspect.getsource(section)
    except (OSError, TypeError):
        return {}
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    defined = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for node, below in pairwise([*defined.body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    found[node.target.id] = inspect.cleandoc(text)
                case _:
                    found[node.target.id] = ""
    return found


def imported(path: str, choices: str = "`my_package.module:my_function`") -> Any:
    """What `my_package.module:name` names. Raises ValueError where there is no such thing."""
    module_name, colon, name = path.partition(":")
    if not colon or not name:
        raise ValueError(f"{path!r} names no function; write {choices}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} for {path!r}: {error}") from None
    if not hasattr(module, name):
        raise ValueError(f"module {module_name!r} has no {name!r}{did_you_mean(name, vars(module))}")
    return getattr(module, name)


def did_you_mean(word: str, known: Any) -> str:
    """`; did you mean 'x'?`, or the list of what there is."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    names = sorted(str(name) for name in known if not str(name).startswith("_"))
    return f" (have {', '.join(names)})" if len(names) <= 40 else ""
