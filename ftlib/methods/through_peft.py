"""PEFT's methods through PEFT, and PEFT's files: the one place that imports it.

To copy: this file, methods/adapters.py, core/{anatomy,batches}.py, torch and peft (tasks/, inputs/files.py to read).
"""

import copy
import inspect
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..core import anatomy
from ..core.batches import IGNORE
from .adapters import Bottleneck, adapters_of, experts, linears, matching, replace, turned

_CACHED = ("PREFIX_TUNING", "CARTRIDGE")  # prompts as keys and values of every layer, not as words


def task_type(model: nn.Module) -> str:
    """PEFT's word for the kind of task a model is for."""
    from ..tasks.task import TASKS, kind_of

    kind = kind_of(model)
    return TASKS[kind].peft_type if kind else "FEATURE_EXTRACTION"


def add_peft(model: nn.Module, config: Any, head: list[str]) -> Any:
    """Apply a PEFT configuration in place, the head trained and saved too; returns the PeftModel of a shallow copy."""
    import peft

    from ..tasks.task import DEFAULT, TASKS, kind_of

    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"{config!r} is no strategy and no PEFT configuration; pass e.g. peft.LoraConfig(r=8)")
    record = TASKS[kind_of(model) or DEFAULT]
    if config.is_prompt_learning and (record.columns or record.vectors):
        raise ValueError(f"{config.peft_type.value} moves the tokens whose positions the head reads; use LoRA, say")
    if config.is_prompt_learning and getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{config.peft_type.value} does not go into {anatomy.kind_of(model)}'s head; use LoRA, say")
    config = copy.deepcopy(config)
    config.inference_mode, config.task_type = False, config.task_type or task_type(model)
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head]))
    longest = anatomy.max_positions(model.config) or float("inf")
    prompt = (getattr(config, "num_virtual_tokens", 0) or 0) if config.is_prompt_learning else 0
    if config.is_prompt_learning and not 0 < prompt < longest:
        raise ValueError(f"num_virtual_tokens={prompt}: need 1 to {longest - 1}, the model takes {longest} positions")
    takes = inspect.signature(anatomy.base_of(model).forward).parameters
    if config.peft_type in _CACHED and "past_key_values" not in takes:
        which = f"{config.peft_type.value} goes into past_key_values, which {anatomy.kind_of(model)} models do not take"
        raise ValueError(f"{which}; use peft.PromptTuningConfig, or a BERT, RoBERTa or ELECTRA model")
    _fill(model, config, head)
    inner = copy.copy(model)  # called inside the model's own call: hooks run once, out there
    vars(inner).update({name: OrderedDict() for name in vars(model) if name.startswith(("_forward_", "_backward_"))})
    try:
        wrapper = peft.get_peft_model(inner, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name in linears(model)})
        raise ValueError(f"{error} (linear layers here: {', '.join(names)})") from error
    if config.is_prompt_learning:
        model.prompt_encoder = wrapper.prompt_encoder
        anatomy.put_forward(model, _with_prompt, wrapper, prompt, longest, signature=True)
    return wrapper


def _fill(model: nn.Module, config: Any, head: list[str]) -> None:
    """What PEFT would ask for, because it does not know the model type or reads one name in its config only."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if config.is_prompt_learning and config.token_dim is None:
        words = config.peft_type in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
        wide = model.get_input_embeddings().weight.shape[1]  # ELECTRA's and ALBERT's are narrower than their layers
        config.token_dim = wide if words else model.config.hidden_size
        config.num_layers = config.num_layers or model.config.num_hidden_layers
        config.num_attention_heads = config.num_attention_heads or model.config.num_attention_heads
    # PEFT would take linear layers of the embeddings too; but where experts are one parameter, it knows how
    if getattr(config, "target_modules", None) == "all-linear" and not experts(model):
        config.target_modules = matching(linears(model), "all-linear")
    unset = getattr(config, "target_modules", ()) is None and not getattr(config, "target_parameters", None)
    if unset and config.peft_type == "LN_TUNING":
        norms = [name for name, module in model.named_modules() if anatomy.normalizes(module)]
        config.target_modules = [n for n in norms if not n.startswith(tuple(f"{name}." for name in head))]
    elif unset and config.peft_type != "IA3" and (model.config.model_type not in known or experts(model)):
        # whole names would pass by layers_to_transform
        config.target_modules = sorted({name.rsplit(".", 1)[-1] for name in matching(linears(model), None)})


def _with_prompt(model: nn.Module, wrapper: Any, prompt: int, longest: float, *args: Any, **kwargs: Any) -> Any:
    kwargs |= zip(inspect.signature(type(model).forward.__get__(model)).parameters, args, strict=False)
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is not None and inputs.shape[1] + prompt > longest:
        many = f"{inputs.shape[1]} tokens and {prompt} of the prompt exceed the model's {longest} positions"
        raise ValueError(f"{many}; tokenize with max_length={longest - prompt}")
    config, run = wrapper.active_peft_config, wrapper
    if config.task_type == "QUESTION_ANS":  # for which PEFT 0.21 drops token_type_ids, and for tags it does not
        from peft import PeftModelForTokenClassification

        run = partial(PeftModelForTokenClassification.forward, wrapper)
    if config.peft_type in _CACHED or config.task_type not in ("TOKEN_CLS", "QUESTION_ANS"):  # no logits of the prompt
        return run(**kwargs)
    if kwargs.get("labels") is not None:
        kwargs["labels"] = F.pad(kwargs["labels"], (prompt, 0), value=IGNORE)
    output = run(**kwargs)
    for name in {"logits", "start_logits", "end_logits"} & output.keys():
        output[name] = output[name][:, prompt:]  # (batch, tokens, labels) or (batch, tokens): those of the text
    return output


def merge_peft(wrapper: Any) -> None:
    """Fold PEFT's adapter into the layers and take it out, in place.  Raises ValueError for what has no such form."""
    if wrapper.active_peft_config.is_prompt_learning or not hasattr(wrapper.base_model, "merge_and_unload"):
        raise ValueError(f"{wrapper.active_peft_config.peft_type.value} can't be merged into weights; save it as it is")
    from peft.utils import ModulesToSaveWrapper

    inner = anatomy.unwrapped(wrapper)  # its heads are taken out here: PEFT can't for a pooler, nor after LN tuning
    heads = {name: m for name, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    replace(inner, {name: head.modules_to_save[wrapper.active_adapter] for name, head in heads.items()})
    try:
        wrapper.merge_and_unload()
    except NotImplementedError as error:
        replace(inner, heads)
        raise ValueError(f"PEFT can't merge {wrapper.active_peft_config.peft_type.value}: {error}") from error


def peft_config(model: nn.Module, head: list[str]) -> dict[str, Any]:
    """The adapter_config.json of our own adapters, as PEFT writes it; it does not know the type BOTTLENECK."""
    own = adapters_of(model)
    first, config = next(iter(own.values())), {"inference_mode": True, "task_type": task_type(model)}
    config |= {"modules_to_save": head or None, "target_modules": sorted(own)}
    if isinstance(first, Bottleneck):
        return config | {"peft_type": "BOTTLENECK", "size": first.down.out_features}
    return config | {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora,
        "lora_dropout": first.dropout.p, "bias": "none", "fan_in_fan_out": turned(first.base_layer),
    }  # fmt: skip


def settings_in(folder: Path) -> Any:
    """PEFT's configuration in a folder, without what would load or compute first values: the file replaces those."""
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    plain = dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"))
    plain |= {"prompt_tuning_init": "RANDOM", "prefix_projection": False}  # the file holds what the projection made
    for name in [name for name in plain if hasattr(settings, name)]:
        setattr(settings, name, plain[name])
    if settings.peft_type == "P_TUNING":  # and here the prompt itself, not the network that made it
        names = ("task_type", "num_virtual_tokens", "token_dim", "modules_to_save")
        settings = peft.PromptTuningConfig(**{name: getattr(settings, name) for name in names})
    return settings


def head_guess(folder: Path, config: dict) -> dict[str, Any]:
    """Kind ("task") and size ("num_labels") of the head of an adapter that PEFT wrote; config: its settings."""
    from ..inputs.files import read_tensors
    from ..tasks.task import TASKS

    kinds = {task.peft_type: kind for kind, task in reversed(TASKS.items())} | {"FEATURE_EXTRACTION": None}
    if config.get("task_type") not in kinds:
        raise ValueError(f"{folder}/adapter_config.json: task_type {config.get('task_type')!r}; pass base=a model")
    ends = ("classifier.weight", "score.weight", "out_proj.weight")
    heads = [t for name, t in read_tensors(folder / "adapter_model.safetensors").items() if name.endswith(ends)]
    return {"task": kinds[config["task_type"]], **({"num_labels": len(heads[-1])} if heads else {})}
