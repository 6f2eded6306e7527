"""Slim, distil and replay: KDC-Diff re-created as a small library under a research book.

The public names stand in `__init__.pyi`. Each is imported when it is first asked for, so that
`import kdc` and `python -m kdc --help` do not wait for PyTorch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
