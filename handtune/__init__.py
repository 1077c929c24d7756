"""handtune: a fine-tuning engine written by hand.

Nothing is imported here, so that `import handtune` and `handtune --help` cost nothing. The work is done in
`handtune.kernels` (operations), `handtune.models` (architectures) and `handtune.engine` (everything that trains).
"""

__version__ = "0.1.0"
