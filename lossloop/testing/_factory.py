"""`module:function`, a function that makes what is to be verified."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

WANTED = (
    "It must take no arguments and return (objective, data), or a dictionary with the "
    "arguments of lossloop.testing.verify."
)


def load_factory(text: str) -> Callable[[], Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: If there is none, or it cannot be called without arguments.
    """
    module_name, colon, name = text.partition(":")
    if not (colon and module_name and name):
        raise ValueError(
            f"{text!r} is not of the form module:function, like train:check or "
            f"package.train:check."
        )
    if "/" in module_name or module_name.endswith(".py"):
        raise ValueError(
            f"{text!r} names a file. Give the module, as in "
            f"{module_name.removesuffix('.py').rsplit('/')[-1]}:{name}, in its folder."
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ValueError(
                f"{text!r}: there is no module {missing}. Modules are looked for in "
                f"the current directory and where Python finds others."
            ) from None
        raise ValueError(
            f"{text!r}: importing {module_name} raised {type(error).__name__}: {error}."
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{text!r}: {module_name} has no function {name}. {WANTED}")
    if not callable(function):
        raise ValueError(
            f"{text!r}: {name} is a {type(function).__name__}, not a function. {WANTED}"
        )
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise ValueError(
            f"{text!r}: {name} takes {inspect.signature(function)}. {WANTED}"
        ) from None
    return function


def factory_name(factory: Any) -> str:
    """What another process can find a factory by.

    Raises:
        ValueError: If it cannot.
    """
    if isinstance(factory, str):
        return factory
    module = getattr(factory, "__module__", None)
    name = getattr(factory, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        raise ValueError(
            f"factory={factory!r} cannot be found by another process. Define it with "
            f"def at the top of a module that can be imported, and pass it or its name "
            f"'module:function'."
        )
    return f"{module}:{name}"


def made_by(text: str) -> dict[str, Any]:
    """The arguments of `verify` that a factory returns, by name.

    Raises:
        ValueError: If it returns something else, or cannot be loaded.
    """
    try:
        made = load_factory(text)()
    except SystemExit as error:
        raise ValueError(f"{text!r} ends the program: SystemExit({error}).") from error
    if isinstance(made, tuple) and len(cast(Any, made)) == 2:
        return dict(zip(("subject", "data"), made, strict=True))
    if isinstance(made, dict) and {"subject", "data"} <= made.keys():
        return cast(dict[str, Any], made)
    got = f"a {type(made).__name__}"
    if isinstance(made, tuple | list):
        got += f" of length {len(cast(Any, made))}"
    if isinstance(made, dict):
        got += f" with {sorted(map(str, cast(Any, made)))}, without subject or data"
    raise ValueError(f"{text!r} returned {got}. {WANTED}")
