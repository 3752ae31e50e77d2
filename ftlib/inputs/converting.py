"""Weights in other files, written anew as the folder that Transformers opens: llama.cpp's GGUF, 8-bit ONNX, pickles.

Nothing in an ONNX file is run, and of a pickle only tensors are taken.

To copy: this file alone, torch and transformers; gguf or onnx, by the kind of file.
Source: the operator DequantizeLinear of ONNX 1.17.
"""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np


def from_gguf(folder: Path, gguf: str) -> None:
    """Write the model in a GGUF file of llama.cpp as Transformers' files in its place, float32, bit for bit."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with redirect_stderr(io.StringIO()):  # three bars
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        # llama.cpp's way to split a text called smollm: GPT-2's, as Transformers has it, after digits were set apart
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
        # <|endoftext|>: as padding, the end of a turn, which it is in the file, would get no gradient as an input
        tokenizer.pad_token, model.config.pad_token_id = tokenizer.unk_token, tokenizer.unk_token_id
        tokenizer.model_max_length = model.config.max_position_embeddings
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
        model.hf_quantizer = None  # it and its config refuse to be saved, but the weights are float32 by now
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / gguf).unlink()


def from_pickle(folder: Path) -> None:
    """Write an encoder-decoder's pytorch_model.bin as safetensors in its place; the tokenizer's files stay."""
    from transformers import AutoModelForSeq2SeqLM

    with redirect_stderr(io.StringIO()):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto", use_safetensors=False, weights_only=True)
        model.save_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()


def from_onnx(folder: Path, *files: str) -> None:
    """Write the T5 in a folder's ONNX files, encoder and decoder, as Transformers' files in their place.

    tokenizer.json lies beside them.  The sizes are those of the weights; what these do not tell (gated GELU, distances
    up to 128) is as in T5 1.1.  The output layer has weights of its own, the embeddings of both sides are one.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    weights = {}
    for file in files:
        weights |= {re.sub(r"^enc\.", "encoder.", n).removeprefix("m."): w for n, w in read_onnx(folder / file).items()}
    words, first = weights["shared.weight"], "encoder.block.0.layer."
    if not np.array_equal(words, weights.setdefault("encoder.embed_tokens.weight", words)):
        raise ValueError(f"{' and '.join(files)} have two sets of embeddings")
    weights["decoder.embed_tokens.weight"] = words
    buckets, heads = weights[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
    layers = [sum(bool(re.fullmatch(rf"{s}\.block\.\d+\.layer\.0\.SelfAttention\.q.*", n)) for n in weights)
              for s in ("encoder", "decoder")]  # fmt: skip
    config = T5Config(
        vocab_size=len(words), d_model=words.shape[1], num_layers=layers[0], num_decoder_layers=layers[1],
        num_heads=heads, d_kv=len(weights[f"{first}0.SelfAttention.q.weight"]) // heads, decoder_start_token_id=0,
        d_ff=len(weights[f"{first}1.DenseReluDense.wi_0.weight"]), relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()}, assign=True)
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    config.tie_word_embeddings = False  # T5Config says True, whatever it is given, which would tie the output layer
    model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.no_truncation()  # the file says 48
    words.no_padding()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **special)
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in files:
        (folder / file).unlink()


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """The weights in an ONNX file as {name: float32 array}; 8-bit ones are (number - zero point) * scale.

    A matrix of (inputs, outputs) that has only a number for a name, as exporters leave it, gets the name of the layer
    that multiplies by it, and torch's form, (outputs, inputs).
    """
    import onnx

    graph, layers, found = onnx.load(path, load_external_data=False).graph, {}, {}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type.startswith("MatMul"):
            layers |= dict.fromkeys(node.input, node.name.lstrip("/").rpartition("/")[0].replace("/", "."))
    for name, numbers in tensors.items():
        plain = re.sub("_(quantized|scale|zero_point)$", "", name)
        if f"{plain}_quantized" in tensors:
            if name != f"{plain}_quantized":
                continue
            zero = tensors[f"{plain}_zero_point"].astype(np.int32)
            numbers = (numbers.astype(np.int32) - zero).astype(np.float32) * tensors[f"{plain}_scale"]
        named = "::" not in plain
        found[plain if named else f"{layers[name]}.weight"] = numbers if named else numbers.T
    return found
