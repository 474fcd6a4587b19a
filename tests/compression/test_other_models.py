"""Models of torchvision, timm and Hugging Face's transformers with their layers made of cores."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tenzoo import find_core_groups
from tenzoo.compression import apply_, fold_, plan, restore_
from tenzoo.layers import TensorizedLayer

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
WORDS = {"input_ids": TOKENS}


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about their own imports
        return pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")


def torchvision_vit():
    sizes = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    model = library("torchvision").models.VisionTransformer(image_size=32, **sizes)
    nn.init.normal_(model.heads.head.weight)  # it is zero, and would hand no gradient on
    return model


def torchvision_swin():
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
    return library("torchvision").models.SwinTransformer(**sizes, num_classes=10)


def timm_vit():
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    return library("timm").models.VisionTransformer(img_size=32, **sizes)


def timm_swin():
    sizes = {"patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    return library("timm").models.SwinTransformer(img_size=32, **sizes, num_classes=10)


def timm_convnext():
    return library("timm").models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=10)


BERT_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def bert():
    transformers = library("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT_SIZES))


def t5():
    """Before it calls a layer, it reads ``self.wo.weight.dtype``."""
    transformers = library("transformers")
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def gpt2():
    transformers = library("transformers")
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **NO_TOKENS))


def llama():
    transformers = library("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BERT_SIZES, num_key_value_heads=2, **NO_TOKENS))


MODELS = {
    "torchvision_vit": (torchvision_vit, IMAGES, "encoder.layers.encoder_layer_0.mlp.0"),
    "torchvision_swin": (torchvision_swin, IMAGES, "features.1.0.attn.qkv"),
    "timm_vit": (timm_vit, IMAGES, "blocks.0.attn.qkv"),
    "timm_swin": (timm_swin, IMAGES, "layers.1.blocks.0.attn.qkv"),
    "timm_convnext": (timm_convnext, IMAGES, "stages.2.blocks.0.mlp.fc1"),
    "bert": (bert, WORDS, "bert.encoder.layer.0.attention.self.query"),
    "t5": (t5, {**WORDS, "decoder_input_ids": TOKENS}, "encoder.block.0.layer.1.DenseReluDense.wo"),
    "gpt2": (gpt2, WORDS, "transformer.h.0.attn.c_attn"),
    "llama": (llama, WORDS, "model.layers.0.mlp.down_proj"),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model in evaluation mode, an input, and the name of a layer in it."""
    make, inputs, name = MODELS[request.param]
    torch.manual_seed(0)
    return make().eval(), inputs, name


def outputs(model, inputs):
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, torch.Tensor) else result["logits"]


def test_it_does_what_the_dense_model_with_these_weights_does(case):
    model, inputs, name = case
    made = plan(model, factorization="tt", budget=0.5, example_input=inputs)
    small = apply_(copy.deepcopy(model), made, example_input=inputs)
    assert sum(parameter.numel() for parameter in small.parameters()) == made.parameters <= 0.5 * made.dense_parameters
    layer, dense = small.get_submodule(name), model.get_submodule(name)
    assert isinstance(layer, TensorizedLayer)
    assert isinstance(layer, type(dense))
    assert (layer.weight.shape, layer.weight.dtype) == (dense.weight.shape, dense.weight.dtype)
    folded = fold_(copy.deepcopy(small))
    assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = outputs(folded, inputs)
        torch.testing.assert_close(outputs(small, inputs), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs(small, inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_step_of_training_moves_all_cores_and_weights_come_back(case):
    model, inputs, _ = case
    made = plan(model, factorization="tucker", ranks=4)
    small = apply_(copy.deepcopy(model), made)
    cores = [core for group in find_core_groups(small) for core in group.cores]
    before = [core.detach().clone() for core in cores]
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01, eps=1e-20)  # moves what has the smallest gradient too
    outputs(small.train(), inputs).square().sum().backward()
    assert all(core.grad is not None and core.grad.isfinite().all() for core in cores)
    optimizer.step()
    assert not any(core.equal(old) for core, old in zip(cores, before, strict=True))
    again = restore_(copy.deepcopy(model), made, small.state_dict()).eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs(again, inputs), outputs(small.eval(), inputs))


def initialize(module):
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif type(module).__name__ == "TensorizedTransposedLinear":
        nn.init.normal_(module.weight)


def test_initializing_the_model_anew_is_refused(case):
    model, _, _ = case
    small = apply_(model, plan(model, factorization="tt", ranks=2))
    ways = [lambda: small.apply(initialize)]
    if hasattr(small, "_init_weights") and hasattr(small, "config"):  # of transformers
        ways += [small.init_weights, lambda: small.apply(small._init_weights)]
    elif hasattr(small, "init_weights"):  # of timm
        ways.append(small.init_weights)
    for way in ways:
        with pytest.raises(RuntimeError, match=r"expected a weight of its own for .*, got one that cores reconstruct"):
            way()


def test_a_language_model_writes_with_its_layers_made_of_cores():
    model = gpt2().eval()
    small = apply_(model, plan(model, factorization="tt", ranks=8))
    written = small.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.equal(fold_(small).generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0))
