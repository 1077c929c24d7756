"""What the engine may ask of a model."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class KnownModel(Protocol):
    """What the engine may ask of a model of this project; a foreign module has none of it."""

    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    tied_keys: ClassVar[dict[str, tuple[str, str]]]
    head_keys: ClassVar[dict[str, tuple[str, ...]]]
    base_prefix: ClassVar[tuple[str, ...]]
    position_modules: ClassVar[tuple[str, ...]]  # globs of modules that see positions or distances, and no rows
    task: str
    source: str | None
    head: nn.Module
    head_is_new: bool  # made, for its task, and in no checkpoint

    def key_map(self) -> dict[str, Any]: ...
    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor: ...
    def pool(
        self, states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor: ...


class ForeignModel:
    """What is known of any other module: nothing. Its own names are published, and it has no groups of targets."""

    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {}
    tied_keys: ClassVar[dict[str, tuple[str, str]]] = {}
    base_prefix = ()
    position_modules = ()
    task = ""
    source = None
    head_is_new = False

    def key_map(self) -> dict[str, Any]:
        return {}


def facts_of(model: nn.Module) -> KnownModel | ForeignModel:
    """What the model says of itself: the `CheckpointKey` of each of its tensors, its task, and so on."""
    return model if isinstance(model, KnownModel) else ForeignModel()
