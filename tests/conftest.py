"""Tiny random models and a tokenizer that need no download; state that every test gives back."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FTLIB_PRECISION"] = "fp32"  # tests of half precision ask for it; the others compare with 1e-5 on every CPU

import pytest
import torch

WORDS = (
    "the a film is good bad great dull we you book flight from to boston denver and not very plot fun".split()
)


@pytest.fixture(autouse=True)
def _restore_global_state():
    """Threads, default dtype and the random generator are as before after every test."""
    threads, dtype, rng = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(rng)


def tiny_config(model_type: str = "bert", **options):
    from transformers import AutoConfig

    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    if model_type == "distilbert":
        sizes = dict(
            vocab_size=64,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=40,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            pad_token_id=0,
        )
    if model_type == "albert":
        sizes |= dict(embedding_size=8, classifier_dropout_prob=0.0)
    return AutoConfig.for_model(model_type, **{**sizes, **options})


_AUTO = {
    "encoder": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
_PROBLEM = {"multi-label-classification": "multi_label_classification", "regression": "regression"}


def make_tiny_model(
    task: str = "sequence-classification", num_labels: int = 2, *, model_type="bert", seed=0, **options
):
    import transformers

    if task != "encoder":
        options |= dict(num_labels=num_labels, problem_type=_PROBLEM.get(task))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, _AUTO[task]).from_config(tiny_config(model_type, **options)).eval()


@pytest.fixture
def tiny_model():
    """Factory: tiny_model(task, num_labels, model_type=..., **config options), random weights, eval mode."""
    return make_tiny_model


def make_tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*WORDS, "##s", "##ing", "un", "##fun", "."]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*specials, *pieces])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=40,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A WordPiece tokenizer over a few English words, BERT's special tokens, at most 40 tokens."""
    return make_tiny_tokenizer()
