"""The callback with which transformers' Trainer runs AdaMSS's adaptive subspace allocation."""

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """Calls `AdamssModel.update_and_allocate` after each optimizer step. All settings are in the AdamssConfig."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        tuner = getattr(model, "base_model", model)
        if hasattr(type(tuner), "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)
