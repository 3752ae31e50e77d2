"""Tiny random encoder-decoder models of several types, a tokenizer of bytes for them, and batches."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = 264
T5 = dict(d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
BART = dict(
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
    decoder_ffn_dim=32, max_position_embeddings=40, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    forced_eos_token_id=1,
)  # fmt: skip
KINDS = {  # name: (model type, options)
    "t5": ("t5", T5),
    "t5, own head": ("t5", T5 | {"tie_word_embeddings": False}),
    "umt5": ("umt5", T5),
    "mt5": ("mt5", T5),
    **{kind: (kind, BART) for kind in ("bart", "marian", "mbart", "pegasus", "plbart", "m2m_100", "blenderbot")},
}


def byte_tokenizer(**options):
    """A token a byte; <s> before a text and </s> behind it, as BART's."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2, "<unk>": 3}
    vocabulary |= {sign: i + 4 for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    ends = {"special_tokens": [("<s>", 2), ("</s>", 1)]}
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", **ends)
    special = dict(eos_token="</s>", pad_token="<pad>", bos_token="<s>", unk_token="<unk>", model_max_length=40)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special | options)


TOKENIZER = byte_tokenizer()
ROWS = [{"source": f"{i}+{i}={'?' * (i % 4)}", "target": f"{2 * i}" + "!" * (i % 5)} for i in range(12)]


def tiny(name="bart", seed=0, large=True, **options):
    """A random model; large: with weights so large that logits are far from each other (not the computed positions)."""
    kind, own = KINDS[name]
    sizes = dict(vocab_size=WORDS, d_model=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **own, **options})
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        with torch.no_grad():
            if "own" in name:
                model.lm_head.weight = torch.nn.Parameter(torch.randn(WORDS, config.d_model) / 4)
            sines = {p for m in model.modules() if "Sinusoidal" in type(m).__name__ for p in m.parameters()}
            for parameter in [p for p in model.parameters() if p not in sines] if large else ():
                parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 4)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
    return model


def talkative(name="bart", **options):
    """A model whose answers differ from source to source: the head is not the embeddings."""
    model = tiny(name, tie_word_embeddings=False, large=False, **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model


def batch(seed=1):
    """Sources of 9, 5 and 7 tokens, targets of 4, 6 and 6, one of them with a hole."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (3, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 7:] = 0
    labels = torch.randint(4, WORDS, (3, 6), generator=random)
    labels[0, 3:] = torch.tensor([1, -100, -100])
    labels[1:, -1] = 1
    labels[2, 1] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}
