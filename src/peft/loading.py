"""Load adapters into models: `PeftModel.from_pretrained` and `load_adapter`."""

import warnings

from peft.config import PeftConfig
from peft.core import checkpoint, extras
from peft.core.wrappers import ModulesToSaveWrapper
from peft.errors import PeftWarning
from peft.storage import hub, provenance
from peft.weights import load_peft_weights


class Loadable:
    """The part of PeftModel that reads files. A file that does not do what it should leaves no trace."""

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        autocast_adapter_dtype=True,
        ephemeral_gpu_offload=False,
        low_cpu_mem_usage=False,
        key_mapping=None,
        **kwargs,
    ):
        """A base model with an adapter loaded from a folder or the hub; the task in its config picks the class.

        is_trainable: False freezes the adapter and switches to eval mode. config: use this one instead of the file's.
        Further options as for `load_adapter`. If anything is wrong with the file, the model stays as it was.
        """
        from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        if config is None:
            options, _ = hub.split_options(kwargs)
            config = PeftConfig.from_pretrained(model_id, **options)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        config.inference_mode = not is_trainable
        cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)
        trainable = requires_grad_of(model)
        wrapped = cls(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=True,
        )
        try:
            wrapped.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                key_mapping=key_mapping,
                **kwargs,
            )
        except BaseException:
            if config.is_prompt_learning:
                wrapped._delete_prompt(adapter_name)
            else:
                wrapped.base_model.unload()
            restore_requires_grad(trainable)
            raise
        return wrapped

    def load_adapter(
        self,
        model_id,
        adapter_name,
        is_trainable=False,
        torch_device=None,
        autocast_adapter_dtype=True,
        ephemeral_gpu_offload=False,
        low_cpu_mem_usage=False,
        key_mapping=None,
        ignore_mismatched_sizes=False,
        strict=False,
        check_base=True,
        **kwargs,
    ):
        """Load an adapter from a folder or the hub, beside those already there; it is not made active.

        The tensors are mapped from the file, so the cost is that of reading it, however many adapters there are. An
        adapter of that name gets the file's values in place. strict: leftover tensors or places are errors, not
        warnings. check_base: refuse an adapter whose file says that it was trained on other base weights.
        kwargs: hub options (subfolder, revision, token, ...). Returns LoadResult(missing, unexpected, mismatched keys).
        Raises CheckpointError or a subclass, and leaves no trace, where the file does not do what it should.
        """
        options, _ = hub.split_options(kwargs)
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **options)
            config.inference_mode = not is_trainable
            self.add_adapter(
                adapter_name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast_adapter_dtype
            )
        try:
            tensors = load_peft_weights(
                model_id,
                device=torch_device,
                key_mapping=key_mapping or getattr(self.get_base_model(), "_checkpoint_conversion_mapping", None),
                use_safetensors=kwargs.get("use_safetensors"),
                **options,
            )
            if check_base:
                path = hub.find_file(model_id, provenance.FILE_NAME, **options)
                layers = {} if self._is_prompt_learning else self.base_model.layers
                provenance.check(self.get_base_model(), layers, adapter_name, path)
            self._make_room_for_tokens(tensors)
            result = checkpoint.set_peft_model_state_dict(
                self, tensors, adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
            )
            if result.missing_keys or result.mismatched_keys:
                self._settle_meta_tensors(adapter_name)
        except BaseException:
            if new and len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            raise
        checkpoint.warn_about(result, adapter_name)
        if is_trainable and new is False:
            self.peft_config[adapter_name].inference_mode = False
        if not is_trainable and self.training:
            self.eval()
        return result

    def _settle_meta_tensors(self, adapter_name):
        """Initialise what the file left out."""
        if self._is_prompt_learning:
            return
        for layer in [*self.base_model.layers.values(), *map(extras.hosted_layer, self.base_model.extras.values())]:
            if layer is not None and adapter_name in layer.adapters:
                layer.adapters[adapter_name].settle()
        for wrapper in self.base_model.extras.values():
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.adapter_names:
                wrapper.settle(adapter_name)

    def _make_room_for_tokens(self, tensors):
        """Grow the base's embedding where the adapter was trained, and saved, with more tokens."""
        base = self.get_base_model()
        if not hasattr(base, "resize_token_embeddings") or not hasattr(base, "get_input_embeddings"):
            return
        weight = getattr(base.get_input_embeddings(), "weight", None)
        rows = {
            t.shape[0]
            for k, t in tensors.items()
            if k.endswith((".embed_tokens.weight", ".embed_tokens.base_layer.weight")) and t.ndim == 2
        }
        if weight is not None and len(rows) == 1 and (size := rows.pop()) > weight.shape[0]:
            warnings.warn(
                f"The adapter was trained with {size} tokens, the base model has {weight.shape[0]}: its embedding is "
                "resized to fit.",
                PeftWarning,
                stacklevel=3,
            )
            base.resize_token_embeddings(size, mean_resizing=False)


def requires_grad_of(model):
    """[(parameter, whether it is trained)], for `restore_requires_grad`."""
    return [(p, p.requires_grad) for p in model.parameters()]


def restore_requires_grad(before):
    """Train what was trained when `requires_grad_of` was asked."""
    for p, was in before:
        p.requires_grad = was
