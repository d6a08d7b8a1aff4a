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
    on_decoder = False  # True: the second half of the table goes in front of a decoder's input, in training
    extra_tables: tuple[str, ...] = ()  # parameters that a file holds beside `prompt_embeddings`, by their names
    frozen: tuple[str, ...] = ()  # submodules and parameters that are never trained
    network: tuple[str, ...] = ()  # submodules that make the table from the embedding; a file holds the result alone

    @classmethod
    def make(cls, config, word_embeddings):
        """The encoder of a config whose sizes are filled in."""
        return cls(config)

    @classmethod
    def fill_sizes(cls, config, model_config):
        """Correct the sizes read from the base model's config where the method counts differently."""

    def set_trainable(self, trainable):
        """Train what the prompt is made from, or freeze all of it."""
        self.requires_grad_(trainable)
        for part in self.frozen:
            if getattr(self, part) is not None:
                getattr(self, part).requires_grad_(False)

    def run(self, forward, kwargs):
        """The output of `forward(kwargs)`, the base model over prompt and batch; a method may have its own loss."""
        return forward(kwargs)

    def table(self):
        """What a file holds as `prompt_embeddings`: (virtual tokens, width)."""
        return self.embedding.weight

    def tables(self):
        """Everything that a file holds of the prompt."""
        return {"prompt_embeddings": self.table(), **{name: getattr(self, name) for name in self.extra_tables}}

    def load_tables(self, tensors):
        """Take the tensors of a file. Raises AdapterMismatchError, changing nothing, where they do not fit."""
        current = self.tables()
        for name, place in current.items():
            value = tensors.get(name)
            if value is None or value.shape != place.shape:
                found = "nothing" if value is None else tuple(value.shape)
                raise AdapterMismatchError(
                    f"Error(s) in loading state_dict: size mismatch for {name}: file {found}, model "
                    f"{tuple(place.shape)}. The file was made with other settings or for another model; load it with "
                    "its own config, or pass ignore_mismatched_sizes=True to keep the initial values."
                )
        with torch.no_grad():
            self.load_table(tensors["prompt_embeddings"])
            for name in self.extra_tables:
                getattr(self, name).copy_(tensors[name])

    def load_table(self, table):
        """Make this the table. A network that made it has done its work: the table itself is trained from now on."""
        weight = self.embedding.weight
        if table.shape != weight.shape or any(getattr(self, name) is not None for name in self.network):
            table = table.to(weight)
            self.embedding = nn.Embedding.from_pretrained(table.clone(), freeze=not weight.requires_grad)
            for name in self.network:
                setattr(self, name, None)
            return
        weight.copy_(table)
