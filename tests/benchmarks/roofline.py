"""How fast this machine multiplies matrices, and how many multiplications a piece of work needs.

    python tests/benchmarks/roofline.py    # prints the rate of each shape on this device; stores nothing

The speed programs take the rate inside their own rounds.  Utilisation = FLOPs of the real tokens / (seconds * rate):
padding, dropout, GELU, normalization, the embeddings, the optimizer and Python count as time but not as work.
The rate is the fastest of the shapes below, so utilisation is rather too low than too high: the two products of the
model's feed-forward block, where most of its FLOPs are, and a large square product, which is what a device does best.
In float32 on a CPU there are two libraries to ask, MKL, which torch.mm calls, and oneDNN, which ftlib.speedups calls:
the faster one is the machine's rate, and torch.mm's own is kept beside it.
"""

import time
from typing import Any

import torch
from torch import nn

from ftlib.core import anatomy
from ftlib.methods import speedups


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shapes(tokens: int, hidden: int, inner: int, square: int) -> dict[str, tuple[int, int, int]]:
    """{name: (m, k, n)} of the products (m, k) x (k, n)."""
    return {
        "feed-forward, up": (tokens, hidden, inner),
        "feed-forward, down": (tokens, inner, hidden),
        "square": (square, square, square),
    }


def product_rate(
    m: int, k: int, n: int, *, device: Any, dtype: torch.dtype, seconds: float = 0.05, onednn: bool = False
) -> float:
    """FLOPs a second of (m, k) x (k, n): the best of 3 bursts of about `seconds`."""
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
    out, weight = a @ b, b.T.contiguous()
    product = (lambda: speedups.linear(a, weight)) if onednn else (lambda: torch.mm(a, b, out=out))

    def burst(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            product()
        synchronize()
        return time.perf_counter() - start

    burst(2)
    count = max(1, round(seconds / max(burst(3) / 3, 1e-6)))
    return max(2 * m * k * n * count / burst(count) for _ in range(3))


def best_rate(products: dict[str, tuple[int, int, int]], **options: Any) -> dict[str, Any]:
    """The fastest of the shapes: {"rate": FLOPs a second, "shape": which, "rate_mm": by torch.mm, "rates": of all}."""
    rates = {name: product_rate(*sizes, **options) for name, sizes in products.items()}
    by_mm = max(rates.values())
    if speedups.ONEDNN and str(options["device"]) == "cpu" and options["dtype"] == torch.float32:
        rates |= {f"{name}, oneDNN": product_rate(*sizes, onednn=True, **options) for name, sizes in products.items()}
    name = max(rates, key=rates.__getitem__)
    return {
        "rate": rates[name], "shape": f"{name} {products[name.removesuffix(', oneDNN')]}", "rate_mm": by_mm,
        "rates": rates,
    }  # fmt: skip


def encoder_flops(model: nn.Module, lengths: list[int], *, training: bool) -> float:
    """FLOPs of the encoder's matrix products on rows of so many real tokens; multiply and add count as two.

    Linear layers: 2 * parameters a token.  Attention: 4 * L * L * hidden a row and layer (scores, and the mean of
    the values).  The backward pass needs twice the forward pass: gradients of the inputs and of the weights.
    """
    layers = anatomy.layers(model)
    linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
    hidden = anatomy.base_of(model).config.hidden_size
    forward = 2 * linear * sum(lengths) + len(layers) * 4 * hidden * sum(length**2 for length in lengths)
    return float(forward * (3 if training else 1))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"MiniLM": (874, 384, 1536), "BERT-base": (32 * 512, 768, 3072)}
    for dtype in (torch.float32, torch.bfloat16):
        for model, (tokens, hidden, inner) in sizes.items():
            found = best_rate(shapes(tokens, hidden, inner, 8192 if device.type == "cuda" else 2048),
                              device=device, dtype=dtype)  # fmt: skip
            for name, rate in found["rates"].items():
                print(f"{device}, {dtype}, {model}: {name:<20}{rate / 1e9:10.1f} GFLOP/s")


if __name__ == "__main__":
    main()
