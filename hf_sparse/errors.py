"""The exceptions that users meet: what was wrong, where, and what to do."""


class SparsityError(ValueError):
    """A request that cannot be carried out exactly; the message is one line and names the cure."""


class UnknownInputsError(SparsityError):
    """Example inputs cannot be made from a model's config: a batch of its data has to be given."""


class NonFiniteLossError(SparsityError):
    """The loss has led to weights that are NaN or infinite; training has stopped before anything was overwritten."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of somebody else says, or its name where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]
