"""The one exception that carries a message for the person at the keyboard."""

import re


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a recipe key, a shape, a count.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    alone and ends with status 2; every other exception is a defect and keeps its traceback.
    """


def one_sentence(error: Exception) -> str:
    """What an exception of another library says, on one line and without the names of its validators and types."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(Class validation error for validator '\w+'|Validation error for field '(\w+)'):?\s*", r"\2 ", text)
    return re.sub(r"\s*\b(TypeError|ValueError): *", " ", text).strip()
