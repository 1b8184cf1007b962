"""The one exception that users meet: what was wrong, where, and what to do."""


class SparsityError(ValueError):
    """A request that cannot be carried out exactly; the message is one line and names the cure."""
