"""The one exception that carries a message for the person at the keyboard."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a recipe key, a shape, a count.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    alone and ends with status 2; every other exception is a defect and keeps its traceback.
    """
