"""Human re-identification: find the same person in a gallery of crops from other cameras."""

import importlib

__version__ = "1.0.0"

_EXPORTS = {"Extractor": "reid.retrieval.extract", "GalleryIndex": "reid.retrieval.index", "evaluate": "reid.retrieval.metrics"}
__all__ = [*_EXPORTS, "ReidError", "__version__"]


class ReidError(Exception):
    """An error that the user can correct. The message is one line: what is wrong, where, and what to do about it."""


class BusyError(ReidError):
    """A ReidError that may pass by itself, such as another process that holds a lock."""


def __getattr__(name):
    """Import the public classes and functions on first use: `import reid` alone loads neither PyTorch nor Pillow."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'reid' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted({*globals(), *__all__})
