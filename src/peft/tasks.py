"""One PeftModel class a task. They differ in the heads that the task trains and in what a prompt does to the batch."""

from peft.model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """Classifies sequences; the classification head is trained whole and saved with the adapter."""

    task_modules = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """Classifies tokens; the classification head is trained whole and saved with the adapter."""

    task_modules = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """Finds answers in a text; the span head is trained whole and saved with the adapter."""

    task_modules = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """Continues text."""


class PeftModelForSeq2SeqLM(PeftModel):
    """Turns one text into another with an encoder and a decoder."""


class PeftModelForFeatureExtraction(PeftModel):
    """Gives embeddings."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
