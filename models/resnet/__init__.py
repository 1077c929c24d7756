"""ResNet."""

from .model import ResNet as ResNet
