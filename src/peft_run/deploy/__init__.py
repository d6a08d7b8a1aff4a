"""From a finished run to something that others can load: merged models, GGUF files, Ollama, vLLM."""
