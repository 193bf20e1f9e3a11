"""Trained policies for other programs: peft and transformers, GGUF readers, vLLM, Ollama."""
