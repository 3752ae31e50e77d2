"""MiniLM's sentence vectors with ONNX Runtime, as fast as we can make it: an opponent for extract_features.

    python tests/benchmarks/onnx_twin.py    # says how far the two are apart; measures nothing

The model is exported from the same weights with mean pooling inside the graph, then ONNX Runtime's own optimizer for
BERT fuses attention, embeddings, GELU and LayerNorm (as the optimized exports of sentence-transformers do), and the
session runs with all graph optimizations.  Texts are tokenized together, sorted by length, and padded to the longest
of their batch.  Needs onnx and onnxruntime.
"""

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ftlib


class MeanPooled(nn.Module):
    """Token ids to vectors: what is exported."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        hidden = self.encoder(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, tokens, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (batch, hidden)


def exported(module: nn.Module, encoder: nn.Module, int8: bool = False) -> bytes:
    """A module that takes ids, mask and token types, with a BERT inside, as ONNX, its layers fused.

    int8: products of 8-bit numbers, the weights rounded once, by channel, the activations as they come.
    """
    from onnxruntime.transformers import optimizer

    encoder.set_attn_implementation("eager")  # the form that the optimizer knows how to fuse
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = (torch.tensor([[101, 2204, 102], [101, 102, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    example = (*example, torch.zeros_like(example[0]))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is the older one; the newer one's graphs are fused less
        plain, fused = Path(folder) / "model.onnx", Path(folder) / "fused.onnx"
        torch.onnx.export(
            module.eval(), example, str(plain), input_names=names, output_names=["found"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names} | {"found": {0: "batch"}},
            opset_version=17, dynamo=False,
        )  # fmt: skip
        sizes = dict(num_heads=encoder.config.num_attention_heads, hidden_size=encoder.config.hidden_size)
        better = optimizer.optimize_model(str(plain), model_type="bert", opt_level=0, **sizes)
        found = better.get_fused_operator_statistics()["Attention"]
        if found != encoder.config.num_hidden_layers:
            raise RuntimeError(f"{found} of {encoder.config.num_hidden_layers} attention layers were fused")
        better.save_model_to_file(str(fused))
        if int8:
            from onnx import TensorProto
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(fused, fused, per_channel=True, extra_options={"DefaultTensorType": TensorProto.FLOAT})
        return fused.read_bytes()


def running(graph: bytes, threads: int) -> Any:
    """An ONNX Runtime session of what was exported."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@functools.cache
def session(threads: int = 2, int8: bool = False) -> Any:
    """One with MiniLM's vectors as its output; made once a process, in about 10 seconds."""
    model = ftlib.load_model("minilm").eval()
    return running(exported(MeanPooled(model), model, int8), threads)


@functools.cache
def _tokenizer() -> Any:
    return ftlib.load_tokenizer("minilm")


def encode(
    texts: list[str], *, max_length: int = 128, batch_size: int = 16, threads: int = 2, int8: bool = False
) -> np.ndarray:
    """Mean-pooled vectors of MiniLM's last layer: float32 (texts, 384), in the order given."""
    rows = _tokenizer()(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    out = np.empty((len(rows), 384), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = np.zeros((len(chosen), len(rows[chosen[0]])), dtype=np.int64)  # (batch, tokens)
        mask = np.zeros_like(ids)
        for place, i in enumerate(chosen):
            ids[place, : len(rows[i])] = rows[i]
            mask[place, : len(rows[i])] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        out[chosen] = session(threads, int8).run(None, feed)[0]
    return out


def main() -> None:
    texts = list(ftlib.load_corpus("rotten-tomatoes")["train"]["text"][:320])
    expected = ftlib.extract_features("minilm", texts, max_length=128, normalize=False)
    found = encode(texts)
    print(f"{len(texts)} sentences, largest difference to extract_features: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-4)


if __name__ == "__main__":
    main()
