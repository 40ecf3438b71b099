"""The one exception that carries a message for the person at the keyboard."""

import re


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a recipe key, a shape, a count.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    alone and ends with status 2; every other exception is a defect and keeps its traceback.
    """


class DivergedError(InputError):
    """A number that must be finite is not: a loss, a bound, a posterior. Nothing that was saved is at fault.

    Args:
        what: which number, without an end of the sentence.
        advice: the rest of the sentence.
    """

    def __init__(
        self,
        what: str,
        advice: str = "the model or its inference has diverged; lower the learning rate or the rate of inference",
    ):
        super().__init__(f"{what}: {advice}.")
        self.what = what


def shown(value: object) -> str:
    """A value as a message quotes it: on one line, and the beginning alone of a long one."""
    try:
        text = ascii(value) if isinstance(value, bytes) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list that holds itself a thousand deep
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, numpy's, or torch's, which has a class of its own for devices alone."""
    allocator = isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )
    return isinstance(error, MemoryError) or allocator


def one_sentence(error: Exception) -> str:
    """What an exception of another library says, on one line and without the names of its validators and types."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(Class validation error for validator '\w+'|Validation error for field '(\w+)'):?\s*", r"\2 ", text)
    text = re.sub(r"\s*\b(TypeError|ValueError): *", " ", text).strip()
    text = re.sub(_OTHER_TYPE, lambda found: f"{found[1]} must be {_types(repr(found[2]))}, not {found[3]}", text)
    text = re.sub(_NO_TYPE_FITS, lambda found: f"{found[1]} must be {_types(found[3])}, not {found[2]}", text)
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "…"


OUT_OF_MEMORY = "this does not fit in memory: take a smaller model, shorter texts or a smaller batch size."
_LONGEST_VALUE, _LONGEST_REASON = 60, 200
_OTHER_TYPE = r"\b(\w+) +Field '\1' expected (\w+), got \w+ \(value: (.+?)\)(?=$|\.)"
_NO_TYPE_FITS = r"(?:\w+ +)?Field '(\w+)' with value (.+?) doesn't match any type in \((.*?),?\)\. Errors:.*"


def _types(listed: str) -> str:
    names = {"NoneType": "null", "str": "a word", "int": "a whole number", "float": "a number", "bool": "true or false"}
    found = re.findall(r"'(\w+)'", listed)
    if "float" in found:
        found = [name for name in found if name != "int"]
    return " or ".join(names.get(name, name) for name in found) or listed
