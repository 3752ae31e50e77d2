"""Heads of our own on any Transformers base model, and what builds them as Transformers' Auto classes do.

To copy: this file, torch and transformers.
"""

import inspect
from functools import cache
from typing import Any

from torch import nn


class OnBase:
    """A Transformers model with a head, which `build` makes; the base model inside has its usual name."""

    def __init__(self, config: Any):
        super().__init__(config)
        pools = "add_pooling_layer" in inspect.signature(self.base_class).parameters
        options = {"add_pooling_layer": False} if pools else {}
        setattr(self, self.base_model_prefix, self.base_class(config, **options))
        self.build(config)
        self.post_init()

    def build(self, config: Any) -> None: ...


@cache
def class_on(base: type, head: type, ending: str) -> type:
    """The class of a head on a base model's class, a PreTrainedModel: BertForRelationClassification, say."""
    parent = next(kind for kind in base.__mro__[1:] if kind.__name__.endswith("PreTrainedModel"))
    name = base.__name__.removesuffix("Model") + ending

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return head.forward(self, *args, **inputs)

    own, its = ({n: p for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}
                for f in (head.forward, base.forward))  # fmt: skip
    more = [p.replace(kind=p.KEYWORD_ONLY) for name, p in its.items() if name not in own]
    forward.__signature__ = inspect.Signature([*own.values(), *more])  # by which it is known what the model takes
    return type(name, (head, parent), {"base_class": base, "__module__": head.__module__, "forward": forward})


class Auto:
    """As Transformers' Auto classes: `from_pretrained` and `from_config`, for any encoder or decoder."""

    head: type  # an OnBase with a forward
    ending: str  # of the classes' names
    what: str  # is read off the base model, as a message says it
    settings: tuple[str, ...] = ()  # of the head, in the config

    @classmethod
    def class_of(cls, config: Any) -> type:
        """The model class for a config; ValueError for an encoder-decoder."""
        from transformers import AutoModel

        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{cls.what} are read off an encoder or a decoder; {config.model_type} is both")
        return class_on(AutoModel._model_mapping[type(config)], cls.head, cls.ending)

    @classmethod
    def from_config(cls, config: Any) -> nn.Module:
        return cls.class_of(config)(config)

    @classmethod
    def from_pretrained(cls, name: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
        from transformers import AutoConfig

        labels = ("num_labels", "id2label", "label2id", "problem_type")
        names = {key: options.pop(key) for key in labels if key in options}
        places = {key: options[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in options}
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **places, **names)
        vars(config).update({key: options.pop(key) for key in cls.settings if key in options})
        return cls.class_of(config).from_pretrained(name, config=config, **options)
