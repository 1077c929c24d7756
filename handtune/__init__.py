"""handtune: a fine-tuning engine written by hand.

Nothing is imported here, so that `import handtune` and `handtune --help` cost nothing. The work is done in
`handtune.kernels` (operations), `handtune.models` (architectures) and `handtune.engine` (everything that trains), whose
folders lie beside this one, with links to them in it.
"""

import os as _os

__version__ = "0.1.0"

# A clone without symbolic links (core.symlinks = false) has text files in place of the links: then the folders beside
# this one are searched, too.
if not _os.path.isdir(_os.path.join(__path__[0], "engine")):
    __path__.append(_os.path.dirname(__path__[0]))
