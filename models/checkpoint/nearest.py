"""What to name to someone whose checkpoint is of no architecture that is there: the nearest one of the same kind."""

from difflib import get_close_matches
from typing import Any

from ..families import FAMILIES

IMAGE_FIELDS = {"image_size", "patch_size", "num_channels", "vision_config"}  # config.json's, of what reads images


def nearest_family(published: dict[str, Any]) -> str:
    """How the error for an unknown model_type goes on; "" where nothing is near. What reads images is like a ViT."""
    model_type = str(published.get("model_type"))
    text = published.get("text_config")
    if isinstance(text, dict) and isinstance(published.get("vision_config"), dict):
        texts = _similar(model_type, False) or _similar(str(text.get("model_type")), False)
        for_texts = f", {texts!r} for texts alone" if texts else ""
        return f"; it reads texts and images together, and near there is 'vit' for images alone{for_texts}"

    reads_images = not IMAGE_FIELDS.isdisjoint(published)
    nearest = _similar(model_type, reads_images) or ("vit" if reads_images else "")
    return f"; the nearest there is {nearest!r}" if nearest else ""


def _similar(model_type: str, reads_images: bool) -> str:
    """The most similar name among the families for images, or for texts; "" where none is near."""
    names = [name for name, family in FAMILIES.items() if family.reads_images == reads_images]
    of_this_name = [name for name in names if name.startswith(f"{model_type}_")]
    return next(iter(of_this_name or get_close_matches(model_type, names, n=1, cutoff=0.55)), "")
