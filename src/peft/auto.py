"""Load an adapter together with its base model, whose name the adapter's config tells."""

import importlib
import os

from peft.config import PeftConfig
from peft.model import PeftModel
from peft.storage import hub
from peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")  # what a downloaded config may name


def get_default_import_allowlist():
    """Libraries whose classes an adapter's config may name as its base model."""
    return set(IMPORT_ALLOWLIST)


def check_import_allowlist(library, allowlist=None):
    """Raise ValueError unless a module path belongs to an allowed library."""
    allowed = get_default_import_allowlist() if allowlist is None else set(allowlist)
    if library.split(".")[0] not in {a.replace("-", "_") for a in allowed} | allowed:
        raise ValueError(
            f"The adapter's config names a base model class from {library!r}, which is not one of "
            f"{sorted(allowed)}. Load the base model yourself and pass it to PeftModel.from_pretrained."
        )


class AutoPeftModel:
    """Base model and adapter in one call; the config's task or auto_mapping tells the classes."""

    _target_class: str | None = None  # the transformers auto class
    _target_peft_class: type[PeftModel] = PeftModel

    def __init__(self, *args, **kwargs):
        raise OSError(
            f"{type(self).__name__} has no instances of its own; call {type(self).__name__}.from_pretrained(adapter)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        adapter_name="default",
        is_trainable=False,
        config=None,
        revision=None,
        **kwargs,
    ):
        """Load the base model that the adapter's config names, its embedding resized to the tokenizer beside the
        adapter if there is one, then the adapter.

        revision: of the adapter. kwargs go to both loads. Raises ValueError where the config's task is another.
        """
        checks = {k: kwargs.pop(k) for k in ("strict", "check_base", "key_mapping") if k in kwargs}
        options, _ = hub.split_options(kwargs)
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **{**options, "revision": revision})
        target = cls._target_class_for(peft_config)
        base = target.from_pretrained(peft_config.base_model_name_or_path, revision=peft_config.revision, **kwargs)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, revision, options, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **checks,
            **kwargs,
        )

    @classmethod
    def _target_class_for(cls, peft_config):
        if cls._target_class is not None:
            expected = cls._target_peft_class.__name__
            from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

            found = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type)
            if found is not None and found.__name__ != expected:
                raise ValueError(
                    f"The adapter's task_type is {peft_config.task_type}: that is for {found.__name__}, not {expected}."
                )
            return getattr(importlib.import_module("transformers"), cls._target_class)
        mapping = peft_config.auto_mapping
        if peft_config.task_type is not None:
            from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

            name = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[peft_config.task_type].__name__
            auto = next(c for c in cls.__subclasses__() if c._target_peft_class.__name__ == name)
            return getattr(importlib.import_module("transformers"), auto._target_class)
        if not mapping:
            raise ValueError(
                "The adapter's config has neither task_type nor auto_mapping, so it does not tell the class of its "
                "base model. Load the base model yourself and pass it to PeftModel.from_pretrained."
            )
        check_import_allowlist(mapping["parent_library"])
        return getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])

    @staticmethod
    def _fit_vocabulary(base, adapter, revision, options, kwargs):
        """Where a tokenizer was saved beside the adapter, give the embedding as many rows as it has tokens."""
        tokenizer_there = hub.find_file(
            adapter, "tokenizer_config.json", **{**options, "revision": revision or options.get("revision")}
        )
        if tokenizer_there is None or not hasattr(base, "resize_token_embeddings"):
            return
        from transformers import AutoTokenizer

        trust = kwargs.get("trust_remote_code", False)
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(adapter), trust_remote_code=trust, revision=revision)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:  # padded embeddings stay as they are
            base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    _target_class, _target_peft_class = "AutoModel", PeftModelForFeatureExtraction
