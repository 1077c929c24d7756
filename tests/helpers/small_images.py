"""Tiny pictures that can be told apart, in class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

# Each kind is brighter where its pattern (8, 8) is one; none of them changes when it is mirrored.
PATTERNS = {
    "sky": np.repeat([[1], [1], [1], [1], [0], [0], [0], [0]], 8, 1),
    "sea": np.repeat([[0], [0], [0], [0], [1], [1], [1], [1]], 8, 1),
    "rows": np.repeat([[1], [1], [0], [0], [1], [1], [0], [0]], 8, 1),
    "columns": np.repeat([[1, 1, 0, 0, 0, 0, 1, 1]], 8, 0),
}


def picture(kind: str, seed: int, side: int = 16) -> Image.Image:
    """A noisy picture of a kind, side × side."""
    generator = np.random.default_rng([seed, len(kind)])
    pattern = PATTERNS[kind].repeat(side // 8, 0).repeat(side // 8, 1)[..., None]
    values = 60 + 110 * pattern + generator.normal(0, 20, (side, side, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def class_folders(folder: Path, kinds: tuple[str, ...] = ("sky", "sea"), count: int = 12, seed: int = 0) -> Path:
    """A folder of class folders with `count` pictures each, as PNG."""
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            picture(kind, seed + i).save(folder / kind / f"{i:03}.png")
    return folder
