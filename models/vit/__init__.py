"""ViT and DINOv2."""

from .dinov2 import Dinov2 as Dinov2
from .model import ViT as ViT
