"""The model card, README.md: metadata that the hub reads, above text that people write."""

import os

from peft.storage.files import commit_files
from peft.version import __version__

BODY = """# {method} adapter{for_base}

Trained with [PEFT](https://pypi.org/project/peft/). It holds only the trained part;
load it onto its base model:

```python
from peft import {auto_class}

model = {auto_class}.from_pretrained("path/or/hub-id/of/this/adapter")
```

## What it was trained for

[What the adapter does, and for whom]

## Training data and procedure

[Data, settings, hardware]

## Results

[How it was evaluated, and the scores, next to the base model's]
"""


def model_card(model, folder):
    """The bytes of README.md for a PeftModel's folder: its metadata brought up to date, its text kept."""
    import yaml

    data, text = _read(os.path.join(folder, "README.md"))
    config = next(iter(model.peft_config.values()))
    method = str(getattr(config.peft_type, "value", config.peft_type))
    base_name = config.base_model_name_or_path or ""
    base_name = base_name if isinstance(base_name, str) and "\n" not in base_name else ""
    data["base_model"] = base_name
    data["library_name"] = "peft"
    tags = set(data.get("tags") or ()) if isinstance(data.get("tags"), list) else set()
    tags |= {f"base_model:adapter:{base_name}", method.lower()}
    base = model.get_base_model()
    if hasattr(base, "config") and type(base).__module__.startswith("transformers."):
        tags.add("transformers")
    data["tags"] = sorted(tags)
    if config.task_type == "CAUSAL_LM":
        data.setdefault("pipeline_tag", "text-generation")
    if not text.strip():
        task_classes = {"CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification"}
        suffix = task_classes.get(config.task_type)
        text = BODY.format(
            method=method,
            for_base=f" for `{base_name}`" if base_name else "",
            auto_class=f"AutoPeftModelFor{suffix}" if suffix else "AutoPeftModel",
        )
    text = _with_framework_version(text)
    text = _with_quantization(text, getattr(getattr(base, "config", None), "quantization_config", None))
    front = yaml.safe_dump(data, sort_keys=True, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n\n{text.strip()}\n".encode()


def write_model_card(model, folder):
    """Write README.md alone."""
    commit_files(folder, {"README.md": model_card(model, folder)})


def _read(path):
    """(metadata, text) of a card that may not exist or may have no metadata."""
    import yaml

    if not os.path.isfile(path):
        return {}, ""
    with open(path, encoding="utf-8", errors="replace") as f:
        content = f.read()
    if not content.startswith("---\n") or "\n---" not in content[4:]:
        return {}, content
    front, _, text = content[4:].partition("\n---")
    try:
        data = yaml.safe_load(front)
    except yaml.YAMLError:
        data = None
    return (data if isinstance(data, dict) else {}), text.lstrip("-").strip()


def _with_framework_version(text):
    heading, line = "### Framework versions", f"- PEFT {__version__}"
    lines = [row for row in text.rstrip().splitlines() if not row.startswith("- PEFT ")]
    if heading in lines:
        lines.insert(lines.index(heading) + 1, "")
        lines.insert(lines.index(heading) + 2, line)
        return "\n".join(lines).replace(f"{heading}\n\n{line}\n\n", f"{heading}\n\n{line}\n")
    return "\n".join([*lines, "", heading, "", line])


def _with_quantization(text, quantization):
    heading = "## Training procedure: quantization"
    if quantization is None or heading in text:
        return text
    settings = quantization.to_dict() if hasattr(quantization, "to_dict") else dict(quantization)
    rows = "\n".join(f"- {k}: {v}" for k, v in settings.items())
    return f"{text}\n\n{heading}\n\nThe base model was loaded with:\n\n{rows}"
