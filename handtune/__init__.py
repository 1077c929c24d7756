"""handtune: a fine-tuning engine written by hand.

Nothing is imported here before it is used, so that `import handtune` and `handtune --help` cost nothing. `predict` asks
a model with a head; the work is done in
`handtune.kernels` (operations), `handtune.models` (architectures) and `handtune.engine` (everything that trains), whose
folders lie beside this one, with links to them in it.
"""

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from .adapted.predictor import predict as predict

__version__ = "0.1.0"

# A clone without symbolic links (core.symlinks = false) has text files in place of the links: then the folders beside
# this one are searched, too.
if not _os.path.isdir(_os.path.join(__path__[0], "engine")):
    __path__.append(_os.path.dirname(__path__[0]))


def __getattr__(name: str) -> _Any:
    if name != "predict":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .adapted.predictor import predict

    globals()[name] = predict  # Python asks this function no second time
    return predict
