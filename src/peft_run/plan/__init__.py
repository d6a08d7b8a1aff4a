"""What a recipe takes of memory, and which changes of it would fit."""
