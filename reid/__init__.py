"""Human re-identification: find the same person in a gallery of crops from other cameras."""

__version__ = "1.0.0"


class ReidError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do about it."""
