"""The public names: the table equals reality, upstream's paths lead to their homes, and importing peft stays light."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from helpers import needs, python
from torch import nn

import peft
from peft import LoraConfig, get_peft_model, surface
from peft.compat_table import ALIASES, rows

HERE = """
LoftQConfig replace_lora_weights_loftq
AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig AutoPeftModel
AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM
AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig
BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel
DeloraConfig DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel
GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig
LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig LoKrModel LoraConfig LoraGAConfig LoraModel
LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel MontecloraConfig MultitaskPromptTuningConfig
MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel PEFT_TYPE_TO_CONFIG_MAPPING
PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel PeftConfig PeftError
PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PeftWarning
PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel
PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig
ShiraModel SupertuningConfig SupertuningModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType
TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig
VBLoRAModel VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig
XLoraModel bloom_model_postprocess_past_key_value
cast_mixed_precision_params compose_cartridge_adapters convert_to_lora create_arrow_model
find_kappa_target_modules
get_base_model_state_dict get_eva_state_dict get_layer_status get_model_status get_peft_config get_peft_model
get_peft_model_state_dict initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
initialize_lora_eva_weights inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training
preprocess_loraga prompt_embeddings_from_past_key_values save_as_lora set_base_model_state_dict
set_peft_model_state_dict shift_tokens_right
"""

# What upstream does not have.
OURS = """
Average BottleneckConfig BottleneckModel FusionConfig FusionModel MergeReport Parallel PeftStackedModel Plan ReftConfig
ReftModel Split Stack pack_linears plan save_merged use_onednn
"""

# What transformers 5.24, TRL 1.16, diffusers 0.42 and accelerate 1.15 import.
CONSUMERS = {
    "peft": """LoraConfig PeftConfig PeftMixedModel PeftModel PeftType PrefixTuningConfig PromptLearningConfig
        AutoPeftModelForCausalLM get_peft_model get_peft_model_state_dict inject_adapter_in_model
        prepare_model_for_kbit_training set_peft_model_state_dict""",
    "peft.functional": "delete_adapter",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.tuners.lora": "LoraLayer",
    "peft.tuners.lora.layer": "LoraLayer",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "peft.utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy",
    "peft.utils.hotswap": """check_hotswap_configs_compatible hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap""",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(self.words(x)))


# -- the table --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(surface.HOME_OF))
def test_public_name(name):
    value = getattr(peft, name)
    assert value is getattr(importlib.import_module(f"peft.{surface.HOME_OF[name]}"), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == f"peft.{surface.HOME_OF[name]}"
        assert value.__doc__ or issubclass(value, peft.AutoPeftModel | nn.Module)


def test_table_is_the_surface():
    assert set(peft.__all__) == {"__version__", *surface.HOME_OF}
    assert len(peft.__all__) == len(set(peft.__all__))
    assert set(surface.HOME_OF) == {*HERE.split(), *OURS.split()}
    assert len(HERE.split()) == 154


def test_star_import():
    scope = {}
    exec("from peft import *", scope)
    assert set(peft.__all__) <= set(scope)


# -- legacy paths -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", sorted(ALIASES))
def test_legacy_module(module):
    if module.endswith("transformers_weight_conversion"):
        pytest.importorskip("transformers")
    legacy = importlib.import_module(f"peft.{module}")
    for name, (home, real) in rows(module).items():
        assert getattr(legacy, name) is getattr(importlib.import_module(f"peft.{home}"), real) or not callable(
            getattr(legacy, name)
        )
    assert set(legacy.__all__) == set(rows(module))
    assert not Path(peft.__file__).parent.joinpath(*module.split(".")).with_suffix(".py").exists(), (
        "a real module shadows these rows"
    )
    with pytest.raises(AttributeError):
        _ = legacy.no_such_name
    scope = {}
    exec(f"from peft.{module} import *", scope)
    assert set(rows(module)) <= set(scope)


@pytest.mark.parametrize(("module", "names"), CONSUMERS.items())
def test_what_others_import(module, names):
    if "transformers" in module and needs("transformers"):
        pytest.skip("transformers is not installed")
    for name in names.split():
        exec(f"from {module} import {name}", {})


def test_modules_without_memory():
    from peft.utils.integrations import init_empty_weights, skip_init_on_device

    with init_empty_weights():
        norm, small = nn.BatchNorm1d(4), skip_init_on_device(Small)()
        again = nn.Linear(2, 2)
    assert norm.weight.is_meta and not norm.running_mean.is_meta and again.weight.is_meta
    assert not any(p.is_meta for p in small.parameters())
    with init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(4).running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_shapes_of_old_caches():
    from peft.utils.constants import bloom_model_postprocess_past_key_value as bloom
    from peft.utils.constants import starcoder_model_postprocess_past_key_value as starcoder

    layers, batch, heads, length, width = 2, 3, 4, 5, 6
    pairs = [torch.randn(2, batch, heads, length, width) for _ in range(layers)]
    found = bloom(pairs)
    assert len(found) == layers
    for key, value in found:
        assert key.shape == (batch * heads, width, length) and value.shape == (batch * heads, length, width)
    assert torch.equal(found[1][1], pairs[1][1].reshape(batch * heads, length, width))
    pairs = [torch.randn(2, batch, 1, length, width) for _ in range(layers)]
    assert torch.equal(starcoder(pairs)[1], torch.cat([pairs[1][0, :, 0], pairs[1][1, :, 0]], -1))


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, None),
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"init_lora_weights": "mica"}, "MiCALinearVariant"),
        ({"kasa_config": peft.KasaConfig()}, "KasaLinearVariant"),
        ({"velora_config": peft.VeloraConfig()}, "VeloraLinearVariant"),
    ],
)
def test_variants_by_class(options, title):
    from peft.tuners.lora import variants

    layer = get_peft_model(Small(), LoraConfig(r=2, target_modules=["a"], **options)).base_model.model.a
    known = {name: getattr(variants, name) for name in variants.__all__}
    found = [name for name, cls in known.items() for v in layer.lora_variant.values() if isinstance(v, cls)]
    assert found == ([title] if title else [])


def test_ways_to_import():
    script = """
import peft
assert peft.utils.other.str_to_bool("yes") == 1
assert peft.tuners.lora.layer.Linear
from peft.tuners import lora
import peft.tuners.lora.layer as layer
assert lora.Linear is layer.Linear and lora.layer is layer
from peft.utils import *
assert TaskType.CAUSAL_LM and callable(_get_submodules)
import peft.peft_model, peft.mapping
assert peft.peft_model.PeftModel is peft.PeftModel
for missing in ("peft.tuners.nothing", "peft.nothing"):
    try:
        __import__(missing)
    except ModuleNotFoundError as error:
        assert error.name == missing
    else:
        raise AssertionError(missing)
try:
    from peft.tuners import NoSuchModel
except ImportError:
    pass
else:
    raise AssertionError
"""
    python("-c", script)


def test_classes_keep_their_home_through_pickle():
    for module in ALIASES:
        if module.endswith("transformers_weight_conversion"):
            continue
        legacy = importlib.import_module(f"peft.{module}")
        for name in rows(module):
            value = getattr(legacy, name)
            if inspect.isclass(value):
                assert pickle.loads(pickle.dumps(value)) is value
                assert value.__module__ not in {f"peft.{m}" for m in ALIASES}


def test_import_is_light():
    script = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import peft
took = time.perf_counter() - start
from peft import LoraConfig, get_peft_model, PeftModel, PeftMixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
import peft.import_utils
new = set(sys.modules) - before
heavy = {"transformers", "accelerate", "bitsandbytes", "diffusers", "datasets", "scipy", "pandas", "huggingface_hub",
         "sklearn", "peft.compat_table"} & set(sys.modules)
assert heavy <= {"peft.compat_table"}, heavy
assert took < 0.1, took
print(len(new))
"""
    count = int(python("-c", script))
    assert count < 80


# -- classes per layer kind -------------------------------------------------------------------------------------------
LAYERS = {
    "Linear": nn.Linear(4, 5),
    "Embedding": nn.Embedding(6, 4),
    "Conv1d": nn.Conv1d(2, 3, 3),
    "Conv2d": nn.Conv2d(2, 3, 3),
    "Conv3d": nn.Conv3d(2, 3, 3),
    "MultiheadAttention": nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_class_of_kind(name):
    from peft.tuners.lora import LoraLayer, layer

    made = getattr(layer, name)(copy.deepcopy(LAYERS[name]), "one", config=LoraConfig(), r=2, lora_alpha=6)
    assert [other for other in LAYERS if isinstance(made, getattr(layer, other))] == [name]
    assert isinstance(made, LoraLayer) and type(made) is LoraLayer
    assert isinstance(made, layer._ConvNd) == name.startswith("Conv")
    assert (made.r, made.scaling, made.active_adapters) == ({"one": 2}, {"one": 3.0}, ["one"])
    assert not isinstance(LAYERS[name], getattr(layer, name))
    assert issubclass(getattr(layer, name), LoraLayer) and not issubclass(LoraLayer, getattr(layer, name))


def test_class_of_kind_in_a_model():
    from peft.tuners import lora

    model = get_peft_model(Small(), LoraConfig(target_modules=["words", "a"]))
    assert isinstance(model.base_model.model.a, lora.Linear)
    assert isinstance(model.base_model.model.words, lora.Embedding)
    assert not isinstance(model.base_model.model.b, lora.Linear)


def test_class_of_kind_refuses_another_kind():
    from peft.tuners import lora

    with pytest.raises(TypeError, match="Linear cannot adapt a Conv2d"):
        lora.Linear(nn.Conv2d(2, 3, 1), "one", LoraConfig())


def test_param_wrapper():
    from peft.tuners.lora import Linear, ParamWrapper

    made = ParamWrapper(nn.Linear(4, 5), "one", parameter_name="weight", config=LoraConfig(), r=2)
    assert isinstance(made, ParamWrapper) and not isinstance(made, Linear)


def test_deriving_from_a_class_of_kind():
    from peft.tuners import lora

    class Mine(lora.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    made = Mine(nn.Linear(4, 5), "one", config=LoraConfig(), r=2)
    assert type(made) is Mine and isinstance(made, lora.Linear)
    assert not isinstance(lora.Linear(nn.Linear(4, 5), "one", config=LoraConfig()), Mine)
    x = torch.randn(2, 4)
    torch.testing.assert_close(made(x), made.base_layer(x) + 1)
