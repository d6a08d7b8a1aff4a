"""The road around the library: the command `peft` and the stages behind it. Uses only the public API of `peft`."""
