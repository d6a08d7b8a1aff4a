"""What a prompt method defines: the module that makes its virtual tokens."""

import torch
from torch import nn

from peft.errors import AdapterMismatchError


class PromptEncoder(nn.Module):
    """Makes the prompt of one adapter; lives at `PeftModel.prompt_encoder[name]`.

    where = "embeds": forward(batch_size, task_ids) gives (batch, virtual tokens, dim), put in front of the input's
    embeddings. where = "cache": key_values(table, layer, batch_size) gives (keys, values) of each of the `layers`, both
    (batch, heads, virtual tokens, head dim), which its attention finds in front of its own.
    """

    where = "embeds"

    @classmethod
    def make(cls, config, word_embeddings):
        """The encoder of a config whose sizes are filled in."""
        return cls(config)

    @classmethod
    def fill_sizes(cls, config, model_config):
        """Correct the sizes read from the base model's config where the method counts differently."""

    def table(self):
        """What a file holds as `prompt_embeddings`: (virtual tokens, width)."""
        return self.embedding.weight

    def load_table(self, table):
        """Take the tensor of a file. Raises AdapterMismatchError where it does not fit."""
        weight = self.embedding.weight
        if table.shape != weight.shape:
            raise AdapterMismatchError(
                f"Error(s) in loading state_dict: size mismatch for prompt_embeddings: file {tuple(table.shape)}, "
                f"model {tuple(weight.shape)}. The file was made with other settings or for another model; load it "
                "with its own config, or pass ignore_mismatched_sizes=True to keep the initial values."
            )
        with torch.no_grad():
            weight.copy_(table)
