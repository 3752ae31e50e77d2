"""Weights out of ONNX files: against numbers read node by node, ONNX Runtime, and by hand."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from ftlib.inputs import assets, converting

WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁b", "▁", *"cdefghijklmnopqrstuvwxyz"]
FILES = ["encoder.onnx", "decoder.onnx", "tokenizer.json"]
NEEDS = "pip install onnx onnxruntime"


class Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.enc = model.encoder

    def forward(self, ids, mask):
        return self.enc(input_ids=ids, attention_mask=mask).last_hidden_state


class Decoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.m = model

    def forward(self, ids, hidden, mask):
        hidden = (hidden,)
        return self.m(encoder_outputs=hidden, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """(folder of FILES, the model they were made of): exported by torch, made 8-bit by ONNX Runtime's own tool."""
    pytest.importorskip("onnx", reason=NEEDS)
    tool = pytest.importorskip("onnxruntime.quantization", reason=NEEDS)
    folder = tmp_path_factory.mktemp("onnx")
    config = T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, initializer_factor=3.0,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(WORDS), 16))
    for parameter in model.parameters():  # norms too
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids, mask = torch.tensor([[3, 4, 6, 7, 1]]), torch.ones(1, 5, dtype=torch.long)
    inputs = {"encoder": (Encoder(model), (ids, mask)), "decoder": (Decoder(model), (ids, torch.rand(1, 5, 16), mask))}
    for name, (part, example) in inputs.items():
        names = ["ids", "mask"] if name == "encoder" else ["ids", "hidden", "mask"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                part, example, folder / "plain.onnx", dynamo=False, input_names=names, opset_version=18,
                dynamic_axes={key: {1: f"{key}_length"} for key in names},
            )  # fmt: skip
        tool.quantize_dynamic(folder / "plain.onnx", folder / f"{name}.onnx", weight_type=tool.QuantType.QInt8)
    (folder / "plain.onnx").unlink()
    words = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=2))
    words.add_special_tokens(WORDS[:3])
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.enable_truncation(3)
    words.enable_padding(length=3)
    words.save(str(folder / "tokenizer.json"))
    return folder, model


@pytest.fixture
def copies(exported, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes((exported[0] / name).read_bytes())
    return tmp_path


@pytest.fixture
def made(copies):
    return copies, assets._made(copies, *FILES)


def unrounded(path):
    """ONNX Runtime on a file whose steps round no activations to 8 bits: the weights alone are."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    file = onnx.load(path)
    graph, nodes = file.graph, []
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            nodes.append(helper.make_node("Identity", node.input[:1], node.output[:1]))
            graph.initializer.append(numpy_helper.from_array(np.float32(1), node.output[1]))
        elif node.op_type == "MatMulInteger":
            plain = held[node.input[1]].astype(np.float32) - held[node.input[3]].astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(plain, f"{node.name}_plain"))
            nodes.append(helper.make_node("MatMul", [node.input[0], f"{node.name}_plain"], node.output))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **inputs: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_weights_are_those_of_the_graph_bit_for_bit(exported, part):
    import onnx
    from onnx import numpy_helper

    graph, right = onnx.load(exported[0] / f"{part}.onnx").graph, {}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMul"):
            layer = node.name.rsplit("/", 1)[0].strip("/").replace("/", ".")
            right |= {name: f"{layer}.weight" for name in node.input if name in held}
    expected = {}
    for name, numbers in held.items():
        if name.endswith("_quantized"):
            stem = name.removesuffix("_quantized")
            zero, scale = held[f"{stem}_zero_point"], held[f"{stem}_scale"]
            numbers = (numbers.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale
            name = right.get(name, stem)
        if not name.endswith(("_scale", "_zero_point")):
            expected[name] = numbers.T if name in right.values() else numbers
    found = converting.read_onnx(exported[0] / f"{part}.onnx")
    assert found.keys() == expected.keys() and len(found) > 15
    for name, numbers in found.items():
        assert numbers.dtype == np.float32 and numbers.shape == expected[name].shape, name
        assert numbers.tobytes() == expected[name].tobytes(), name


def test_onnx_files_become_a_folder_that_transformers_opens(made, exported):
    """Every weight where it was before it was made 8-bit; logits those of ONNX Runtime on the files."""
    (folder, listed), (files, original) = made, exported
    assert sorted(path.name for path in folder.iterdir()) == sorted(listed) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert all(pin["sha256"] == assets.sha256(folder / name) for name, pin in listed.items())
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    before = original.state_dict()
    assert model.state_dict().keys() == before.keys()
    for name, weight in model.state_dict().items():
        step = 2 * before[name].abs().max().item() / 254 if before[name].ndim == 2 else 0.0  # of 8 bits
        torch.testing.assert_close(weight, before[name], atol=0.51 * step + 1e-7, rtol=0, msg=name)
    assert model.num_parameters() == original.num_parameters()
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.shared.weight and not model.config.scale_decoder_outputs
    ids, mask, out = torch.tensor([[3, 4, 6, 9, 12, 1]]), torch.ones(1, 6, dtype=torch.long), torch.tensor([[0, 7, 5]])
    hidden = unrounded(files / "encoder.onnx")(ids=ids, mask=mask)
    logits = unrounded(files / "decoder.onnx")(ids=out, hidden=hidden, mask=mask)
    with torch.no_grad():
        mine = model.eval()(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits
    torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    for holder in (model.config, model.generation_config):
        assert (holder.pad_token_id, holder.eos_token_id, holder.decoder_start_token_id) == (0, 1, 0)


def test_the_tokenizer_is_that_of_the_file_without_its_limits(made, exported):
    plain, tokenizer = Tokenizer.from_file(str(exported[0] / "tokenizer.json")), AutoTokenizer.from_pretrained(made[0])
    assert len(plain.encode("a b c d e").ids) == 3  # cut
    plain.no_truncation()
    plain.no_padding()
    for text in ("a b c d e", "", "ａ é  x", "</s> a"):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 512
    batch = tokenizer(["a", "a b c d e"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, -3:].tolist() == [0, 0, 0] and batch["attention_mask"][0, -3:].tolist() == [0, 0, 0]


def test_two_runs_write_the_same_bytes_and_random_numbers_are_left_alone(copies, exported, tmp_path):
    torch.manual_seed(3)
    first = assets._made(copies, *FILES)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    again = tmp_path / "again"
    again.mkdir()
    for name in FILES:
        (again / name).write_bytes((exported[0] / name).read_bytes())
    assert assets._made(again, *FILES) == first and len(load_file(again / "model.safetensors")) > 30


def test_embeddings_that_differ_between_the_files_are_refused(copies):
    import onnx

    file = onnx.load(copies / "encoder.onnx")
    (scale,) = [tensor for tensor in file.graph.initializer if tensor.name == "enc.embed_tokens.weight_scale"]
    scale.float_data[0] *= 2
    onnx.save(file, copies / "encoder.onnx")
    with pytest.raises(ValueError, match=r"encoder\.onnx and decoder\.onnx have two sets of embeddings"):
        converting.from_onnx(copies, "encoder.onnx", "decoder.onnx")


def test_a_matrix_under_a_number_gets_the_name_of_its_layer_and_torchs_form(tmp_path):
    onnx = pytest.importorskip("onnx", reason=NEEDS)
    weight = onnx.numpy_helper.from_array(np.float32([[1.5, -2]]), "onnx::MatMul_7")
    step = onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], "/a/b.0/q/MatMul")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([step], "g", [], [], [weight])), tmp_path / "x.onnx")
    ((name, found),) = converting.read_onnx(tmp_path / "x.onnx").items()
    assert name == "a.b.0.q.weight" and found.tolist() == [[1.5], [-2.0]]
