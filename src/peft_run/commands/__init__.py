"""The commands, one file each; what such a file has is written in `peft_run/cli.py`."""
