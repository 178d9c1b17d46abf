"""Where float models and token data come from: files, GGUF, Hugging Face, built-ins, exporters."""
