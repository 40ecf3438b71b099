"""The one exception that carries a message for the person at the keyboard."""

import re


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a recipe key, a shape, a count.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    alone and ends with status 2; every other exception is a defect and keeps its traceback.
    """


class DivergedError(InputError):
    """A number that must be finite is not: a loss, a bound, a posterior. Nothing that was saved is at fault."""


def one_sentence(error: Exception) -> str:
    """What an exception of another library says, on one line and without the names of its validators and types."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(Class validation error for validator '\w+'|Validation error for field '(\w+)'):?\s*", r"\2 ", text)
    text = re.sub(r"\s*\b(TypeError|ValueError): *", " ", text).strip()
    text = re.sub(r"\b(\w+) +Field '\1' expected", r"\1: expected", text)
    return re.sub(_NO_TYPE_FITS, lambda found: f"{found[1]} must be {_types(found[3])}, not {found[2]}", text)


_NO_TYPE_FITS = r"(?:\w+ +)?Field '(\w+)' with value (.+?) doesn't match any type in \((.*?),?\)\. Errors:.*"


def _types(listed: str) -> str:
    names = {"NoneType": "null", "str": "a word", "int": "a whole number", "float": "a number", "bool": "true or false"}
    found = re.findall(r"'(\w+)'", listed)
    if "float" in found:
        found = [name for name in found if name != "int"]
    return " or ".join(names.get(name, name) for name in found) or listed
