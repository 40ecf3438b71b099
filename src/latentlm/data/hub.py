"""The Hugging Face hub, and what to do where it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentlm.errors import InputError

_SECONDS = 10.0


def is_reachable() -> bool:
    """Asked once, since every reader of the hub tries again for half a minute and tells each time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # no route, no name, no certificate, a proxy: each has a type of its own
        return False
    return True


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[None]:
    """Reads a name of the hub in its body; where the hub cannot be reached, from what was downloaded before.

    Raises:
        InputError: neither has it.
    """
    from huggingface_hub import constants

    if Path(name).exists() or is_reachable():
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except Exception as error:
        raise unreachable(name) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable(name: str | Path) -> InputError:
    return InputError(
        f"{name} is not on this machine and the Hugging Face hub cannot be reached: "
        "check the name and the network, or give a local folder or file."
    )
