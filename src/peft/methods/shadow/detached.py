"""A Shadow backbone as a model of its own."""

import copy as copying

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from peft.methods.shadow.backbone import last_tokens
from peft.prompts.cache import name_of
from peft.prompts.insert import CACHE_NAMES


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """head(projection(backbone(x))); `embeddings` are the base model's where the backbone has none."""

    def __init__(self, config, backbone, projection, head, embeddings, classifies):
        super().__init__(config)
        self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
        self.embeddings, self.classifies = embeddings, classifies

    @classmethod
    def of(cls, tuner, name, copy):
        """From an adapter of a ShadowModel."""
        config, base, backbone = tuner.peft_config[name], tuner.model, tuner.shadow_backbone[name]
        classifies = name in tuner.shadow_head
        head = tuner.shadow_head[name] if classifies else base.get_output_embeddings() or nn.Identity()
        reads_base = (
            config.shadow_model == "mirror"
            and config.share_embeddings
            and backbone.config.hidden_size == (base.config.get_text_config().hidden_size)
        )
        parts = [backbone, tuner.shadow_projection[name], head, base.get_input_embeddings() if reads_base else None]
        parts = [copying.deepcopy(p) if copy else p for p in parts]
        own = copying.deepcopy(backbone.config)
        own.num_labels = getattr(base.config, "num_labels", 2)
        model = cls(own, *parts, classifies)
        model.generation_config = copying.deepcopy(getattr(base, "generation_config", None))
        return model.train(tuner.training)

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings() if self.embeddings is None else self.embeddings

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, cache=None, inputs_embeds=None, **kwargs):
        """Logits as the backbone alone predicts them."""
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if self.embeddings is not None and inputs_embeds is None:
            input_ids, inputs_embeds = None, self.embeddings(input_ids)
        kwargs = {n: v for n, v in kwargs.items() if n in ("position_ids", "use_cache")}
        kwargs |= {name_of(self.backbone): cache} if cache is not None else {}
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        out = self.backbone(**kwargs)
        state = self.shadow_hidden_projection(out.last_hidden_state)
        if self.classifies:
            logits = self.head(last_tokens(state, attention_mask))
            loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
            return SequenceClassifierOutput(loss=loss, logits=logits)
        logits = self.head(state)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, logits.shape[-1])
        found = next((out[n] for n in CACHE_NAMES if out.get(n) is not None), None)
        name = next(n for n in CACHE_NAMES if n in CausalLMOutputWithPast.__dataclass_fields__)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{name: found})
