"""Where upstream's names live here: legacy module -> {home: its names}, "legacy=real" where they differ. Data only.

Delete a name when its last user is gone. Names of methods that are not here yet are absent.
"""

from peft import compat_methods

CONSTANTS = {
    "config": "CONFIG_NAME",
    "weights": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "core.match": "INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR",
    "core.defaults": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    + compat_methods.target_tables()["core.defaults"],
    "legacy": "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES",
}
ERRORS = {"errors": "NoMatchingPeftModuleError PeftError"}
WARNING = {"errors": "PeftWarning"}
TYPES = {"enums": "PeftType TaskType", "registry": "register_peft_method"}
STATE_DICTS = {
    "core.checkpoint": "get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict "
    "set_peft_model_state_dict",
    "weights": "load_peft_weights",
}
WRAPPERS = {"core.wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"}
TRAINING = {
    "integrations.training": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
    "weights": "infer_device",
}
INTERNALS = {
    "legacy": "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match _set_adapter "
    "_set_trainable get_quantization_config id_tensor_storage set_additional_trainable_modules transpose"
}
MAPPINGS = {
    "registry": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
    "PEFT_TYPE_TO_TUNER_MAPPING"
}
TASKS = {
    "tasks": "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification",
}
LORA_CONFIGS = {
    "methods.lora.config": "LoraConfig LoraRuntimeConfig",
    "methods.lora.arrow": "ArrowConfig",
    "methods.lora.bdlora": "BdLoraConfig",
    "methods.lora.kasa": "KasaConfig",
    "methods.lora.loftq": "LoftQConfig",
    "methods.lora.monteclora": "MontecloraConfig",
    "methods.lora.velora": "VeloraConfig",
    "methods.lora.eva": "EvaConfig",
    "methods.lora.loraga": "LoraGAConfig",
}
LORA_FUNCTIONS = {
    "methods.lora.arrow": "create_arrow_model",
    "methods.lora.convert": "convert_to_lora save_as_lora",
    "methods.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "methods.lora.loraga": "preprocess_loraga",
}
LORA_LAYERS = {
    "by_kind": "Conv2d=lora.conv2 Conv3d=lora.conv3 Embedding=lora.embedding Linear=lora.linear "
    "ParamWrapper=lora.param",
    "methods.lora.lora": "LoraLayer",
}
LORA_QUANTIZED = {  # module -> its classes
    "aqlm": "AqlmLoraLinear=lora.aqlm",
    "awq": "AwqLoraLinear=lora.awq",
    "bnb": "Linear4bit=lora.4bit Linear8bitLt=lora.8bit",
    "eetq": "EetqLoraLinear=lora.eetq",
    "gptq": "GPTQLoraLinear=lora.gptq",
    "hqq": "HqqLoraLinear=lora.hqq",
    "inc": "IncLoraLinear=lora.inc",
    "te": "TeLinear=lora.te",
    "torchao": "TorchaoLoraLinear=lora.torchao",
}
LOFTQ = {"methods.lora.loftq": "replace_lora_weights_loftq"}
LORA_VARIANTS = {  # how the names of its classes begin -> the kinds of layers
    "ALora": "Linear",
    "Arrow": "Linear",
    "BdLora": "Linear",
    "Dora": "Linear Embedding Conv1d Conv2d Conv3d",
    "Kasa": "Linear",
    "MiCA": "Linear Embedding",
    "Monteclora": "Linear",
    "QALora": "Linear",
    "Velora": "Linear",
}
MIXED = {"mixed": "COMPATIBLE_TUNER_TYPES MixedModel"}
SHARED_VERBS = {"functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"}


def _merged(*parts):
    """One {home: names} of several."""
    result = {}
    for part in parts:
        for home, names in part.items():
            result[home] = f"{result[home]} {names}" if home in result else names
    return result


ALIASES = {
    # -- the package itself --------------------------------------------------------------------------------------
    "mapping": _merged(
        MAPPINGS,
        {"config": "get_peft_config", "functional": "inject_adapter_in_model", "enums": "PeftType"},
    ),
    "mapping_func": {"wrap": "get_peft_model", "tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"},
    "mixed_model": {"mixed": "PeftMixedModel", "legacy": "_set_adapter _set_trainable"},
    "peft_model": _merged(
        TASKS,
        WRAPPERS,
        {
            "model": "PeftModel",
            "config": "PeftConfig",
            "enums": "PeftType TaskType",
            "status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
            "registry": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING",
            "core.checkpoint": "get_peft_model_state_dict set_peft_model_state_dict",
            "core.layer": "BaseTunerLayer=AdapterLayer",
            "core.tuner": "BaseTuner=Tuner",
            "weights": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME infer_device load_peft_weights",
            "integrations.training": "shift_tokens_right",
            "legacy": "DUMMY_MODEL_CONFIG _get_batch_size _set_adapter _set_trainable id_tensor_storage "
            "set_additional_trainable_modules",
        },
    ),
    # -- methods -------------------------------------------------------------------------------------------------
    "tuners": _merged(
        LORA_CONFIGS,
        {"methods.lora.model": "LoraModel"},
        LORA_FUNCTIONS,
        {"mixed": "MixedModel"},
        compat_methods.public(),
    ),
    **compat_methods.aliases(),
    "tuners._buffer_dict": {"core.adapter": "BufferDict"},
    "tuners.tuners_utils": _merged(
        SHARED_VERBS,
        ERRORS,
        WARNING,
        {
            "core.adapter": "BufferDict",
            "core.checkpoint": "EMBEDDING_LAYER_NAMES",
            "core.layer": "BaseTunerLayer=AdapterLayer",
            "core.match": "DUMMY_TARGET_MODULES INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR "
            "MIN_TARGET_MODULES_FOR_OPTIMIZATION=CONDENSE_FROM SEQ_CLS_HEAD_NAMES=HEAD_NAMES",
            "core.tuner": "BaseTuner=Tuner",
            "core.wrappers": "AuxiliaryTrainingWrapper",
            "config": "PeftConfig",
            "enums": "PeftType TaskType",
            "methods.lora.replicate": "replicate_layers",
            "prompts.encoder": "BasePromptEncoder=PromptEncoder",
            "registry": "PEFT_TYPE_TO_PREFIX_MAPPING",
            "legacy": "DUMMY_MODEL_CONFIG UPCAST_DTYPES _ExcludedModule _find_minimal_target_modules "
            "_get_in_out_features _get_module_names_tied_with_embedding _get_submodules "
            "_maybe_include_all_linear_layers _remove_adapter_name_from_state_dict_key _set_adapter "
            "check_adapters_to_merge check_target_module_exists clone_module find_parameter_name_by_module "
            "get_device_map inspect_matched_modules match_target_against_key onload_layer "
            "set_additional_trainable_modules",
        },
    ),
    "tuners.lora": _merged(
        LORA_CONFIGS,
        LORA_LAYERS,
        {"by_kind": " ".join(LORA_QUANTIZED[module] for module in ("bnb", "eetq", "gptq"))},
        {"methods.lora.model": "LoraModel"},
        LORA_FUNCTIONS,
    ),
    **{f"tuners.lora.{module}": {"by_kind": classes} for module, classes in LORA_QUANTIZED.items()},
    "tuners.lora.arrow": {"methods.lora.arrow": "ArrowConfig create_arrow_model"},
    "tuners.lora.config": _merged(LORA_CONFIGS, {"methods.lora.corda": "CordaConfig"}),
    "tuners.lora.conversion": {"methods.lora.convert": "convert_to_lora save_as_lora"},
    "tuners.lora.corda": {"methods.lora.corda": "CordaEigens preprocess_corda"},
    "tuners.lora.eva": {
        "methods.lora.eva": "forward_fn_dict get_eva_state_dict initialize_lora_eva_weights "
        "prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling"
    },
    "tuners.lora.intruders": {"methods.lora.intruders": "reduce_intruder_dimension"},
    "tuners.lora.layer": _merged(
        LORA_LAYERS, {"by_kind": "Conv1d=lora.conv1 MultiheadAttention=lora.mha _ConvNd=lora.conv"}
    ),
    "tuners.lora.loraga": {"methods.lora.loraga": "preprocess_loraga"},
    "tuners.lora.model": {
        "methods.lora.lora": "LoraLayer",
        "methods.lora.model": "LoraModel",
        "methods.lora.config": "LoraConfig",
    },
    "tuners.lora.monteclora": {"methods.lora.monteclora": "MontecloraSampler=Sampler"},
    "tuners.lora.variants": {
        "methods.lora.variants": " ".join(
            f"{v}{kind}Variant" for v, kinds in LORA_VARIANTS.items() for kind in kinds.split()
        )
    },
    "tuners.lycoris_utils": {"methods.lycoris": "LycorisConfig LycorisLayer"},
    "tuners.mixed": MIXED,
    "tuners.mixed.model": MIXED,
    # -- utilities -----------------------------------------------------------------------------------------------
    "utils": _merged(CONSTANTS, ERRORS, WARNING, TYPES, STATE_DICTS, WRAPPERS, TRAINING, INTERNALS, LOFTQ),
    "utils.constants": _merged(
        CONSTANTS,
        {
            "core.checkpoint": "EMBEDDING_LAYER_NAMES",
            "core.match": "DUMMY_TARGET_MODULES MIN_TARGET_MODULES_FOR_OPTIMIZATION=CONDENSE_FROM "
            "SEQ_CLS_HEAD_NAMES=HEAD_NAMES",
            "legacy": "DUMMY_MODEL_CONFIG TOKENIZER_CONFIG_NAME bloom_model_postprocess_past_key_value "
            "starcoder_model_postprocess_past_key_value",
        },
    ),
    "utils.error": ERRORS,
    "utils.hotswap": {
        "integrations.hotswap": "CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter "
        "hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap"
    },
    "utils.incremental_pca": {"ops.incremental_pca": "IncrementalPCA"},
    "utils.integrations": {
        "integrations.parallel": "check_deepspeed_zero3_enabled gather_params_ctx",
        "legacy": "dequantize_module_weight get_bnb_param_type init_empty_weights skip_init_on_device",
    },
    "utils.loftq_utils": LOFTQ,
    "utils.merge_utils": {
        "methods.lora.merge_utils": "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge "
        "magnitude_based_pruning magnitude_prune prune random_pruning reshape_weight_task_tensors task_arithmetic ties"
    },
    "utils.other": _merged(
        CONSTANTS,
        WRAPPERS,
        TRAINING,
        INTERNALS,
        {
            "core.checkpoint": "EMBEDDING_LAYER_NAMES",
            "integrations.parallel": "_get_no_split_modules fsdp_auto_wrap_policy",
            "legacy": "_get_module_names_tied_with_embedding _get_submodules_with_grandparent "
            "check_file_exists_on_hf_hub get_pattern_key match_target_against_key str_to_bool",
        },
    ),
    "utils.peft_types": TYPES,
    "utils.save_and_load": _merged(
        STATE_DICTS,
        {
            "core.checkpoint": "EMBEDDING_LAYER_NAMES",
            "weights": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME infer_device torch_load",
            "legacy": "_insert_adapter_name_into_state_dict check_file_exists_on_hf_hub get_embedding_layer_name "
            "has_valid_embedding_base_layer",
        },
    ),
    "utils.transformers_weight_conversion": {"integrations.transformers5": "build_peft_weight_mapping"},
    "utils.warning": WARNING,
}


def rows(module):
    """{legacy name: (home, name there)} of a legacy module."""
    found = {}
    for home, names in ALIASES[module].items():
        for entry in names.split():
            legacy, _, real = entry.partition("=")
            found[legacy] = (home, real or legacy)
    return found
