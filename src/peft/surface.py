"""The public names of `peft`: name -> the module that holds it. A test holds this table against reality."""

HOMES = {
    "errors": ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"],
    "enums": ["PeftType", "TaskType"],
    "registry": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"],
    "config": ["PeftConfig", "PromptLearningConfig", "get_peft_config"],
    "model": ["PeftModel"],
    "wrap": ["get_peft_model"],
    "mixed": ["PeftMixedModel"],
    "tasks": [
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ],
    "auto": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
    "functional": ["inject_adapter_in_model"],
    "core.checkpoint": [
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ],
    "core.defaults": ["TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"],
    "weights": ["load_peft_weights"],
    "status": ["get_layer_status", "get_model_status"],
    "integrations.training": ["cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"],
    "methods.lora.config": ["LoraConfig", "LoraRuntimeConfig"],
    "methods.lora.convert": ["convert_to_lora", "save_as_lora"],
    "methods.lora.lora": ["LoraModel"],
    "methods.trainable_tokens": ["TrainableTokensConfig", "TrainableTokensModel"],
    "prompts.prefix": ["PrefixEncoder", "PrefixTuningConfig"],
}

HOME_OF = {name: home for home, names in HOMES.items() for name in names}
