"""XLNet."""

from .model import XLNet as XLNet
